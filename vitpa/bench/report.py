"""What a benchmark says: each line when it comes, on stderr and in the file, and the table with its ratios at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Self

from vitpa.bench.schema import Line
from vitpa.config import RunConfig
from vitpa.records import write_json

NAME_LENGTH = 160  # C++ templates have names of thousands of letters


class Report:
    """The lines of a benchmark so far; with `--json` the file has them, too.

    With `with` the table of what was measured is printed at the end, however that comes.
    """

    def __init__(self, options: argparse.Namespace, config: RunConfig) -> None:
        """`config` is what is measured, the differences between the cases aside."""
        self.file, self.lines = options.json, list[Line]()
        self.facts: dict[str, Any] = {  # what the figures hold for, as jobs/plan/speeds.py reads it
            "name": options.name,
            "network": config.network(),
            "augment": config.augment.model_dump(mode="json"),
            "dataset": options.dataset,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.write(complete=kind is None)
        if self.lines:
            print(table(with_ratios(self.lines)))

    def add(self, line: Line) -> None:
        """One more line; the file is written again, so that an end before the last line loses none."""
        self.lines.append(line)
        self.write(complete=False)
        notes = "".join(f"; {note}" for note in line.notes)
        print(f"{line.case}: {line.images_per_s:,.0f} images/s{notes}", file=sys.stderr, flush=True)
        for each in line.kernels:
            name = f"{each.calls_per_step:6.1f} x {each.name[:NAME_LENGTH]}"
            print(f"  {each.share:6.1%} {each.us_per_step:9.1f} us {name}", file=sys.stderr, flush=True)

    def write(self, *, complete: bool) -> None:
        """Write the file, if there is to be one and a line to be in it."""
        if self.file and self.lines:
            results = [line.model_dump(mode="json") for line in with_ratios(self.lines)]
            write_json(self.file, {**self.facts, "complete": complete, "results": results})


def with_ratios(lines: Sequence[Line]) -> list[Line]:
    """The lines with their ratios.

    Timm's is the first line of its module with the same attention, and with the same augmentation if there is one. That of one
    GPU has the same batch per GPU or in all. The ratio to one run is how many runs a step trains in the time of one alone.
    """

    def rate(**wanted: Any) -> float | None:
        found = (line for line in lines if wanted.items() <= line.case.model_dump().items())
        return next((line.images_per_s for line in found), None)

    found = []
    for line in lines:
        case = line.case
        timm = {"model": "timm", "attention": case.attention}
        one_gpu = {**case.model_dump(exclude={"batch_size"}), "gpus": 1}
        one_run = {**case.model_dump(exclude={"differing"}), "replicas": 1}
        synthetic = {**case.model_dump(), "images": "synthetic", "decoder": None}
        whole = {**case.model_dump(exclude={"step", "decoder", "replicas"}), "without": None}
        others = {
            "times_timm": rate(**timm, augmentation=case.augmentation) or rate(**timm),
            "times_one_gpu": rate(**one_gpu) if case.gpus > 1 else None,
            "times_one_run": rate(**one_run) if case.replicas > 1 else None,
            "of_synthetic": rate(**synthetic) if case.decoder else None,
            "of_whole": rate(**whole) if case.without else None,
        }
        ratios = {name: None if other is None else line.images_per_s / other for name, other in others.items()}
        found.append(line.model_copy(update=ratios))
    return found


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Line], str]] = {
    "case": lambda line: line.case.name,
    "attention": lambda line: line.case.attention or "-",
    "step": lambda line: line.case.step or "-",
    "runs": lambda line: str(line.case.replicas),
    "GPUs": lambda line: str(line.case.gpus),
    "batch": lambda line: str(line.case.batch_size),
    "images/s": lambda line: f"{line.images_per_s:,.0f}",
    "spread": lambda line: f"{line.spread:.1%}",
    "x timm": lambda line: _number(line.times_timm),
    "x 1 GPU": lambda line: _number(line.times_one_gpu),
    "x 1 run": lambda line: _number(line.times_one_run),
    "of synth": lambda line: _number(line.of_synthetic),
    "of whole": lambda line: _number(line.of_whole),
    "MFU": lambda line: _number(line.mfu, ".1%"),
    "GiB": lambda line: _number(line.peak_memory_gib),
    "cores": lambda line: _number(line.cpu_cores, ".1f"),
    "start s": lambda line: f"{line.start_s:.1f}",
}


def table(lines: Sequence[Line]) -> str:
    """The lines for people: words to the left, numbers to the right."""
    rows = [list(COLUMNS), *([cell(line) for cell in COLUMNS.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<" * 3 + ">" * (len(COLUMNS) - 3)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
