"""`vitpa analyze RUN|SWEEP`: what runs have learnt of the spatial structure, from their checkpoints, on the CPU."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard import summary

from vitpa.analysis.figures import draw_run, draw_sweep
from vitpa.analysis.findings import ASSOCIATION, AVERAGED, MEASURES, TITLES
from vitpa.analysis.record import document_of, recorded, write_record
from vitpa.analysis.seeds import differences, findings, over_seeds
from vitpa.analysis.structure import IMAGES, NEIGHBOURS, Structure, structure
from vitpa.arguments import path_argument, whole_number
from vitpa.errors import run_command
from vitpa.event_file import EventFile
from vitpa.mixture import HOW, mixed_mark, mixtures
from vitpa.records import RunError, write_atomic, write_json
from vitpa.terminal import printable_output
from vitpa.trained import TrainedRun, TrainedSweep, found_target

ALL = {**TITLES, **ASSOCIATION}
LOGGER = logging.getLogger(__name__)


def listed(titles: dict[str, tuple[str, str]]) -> str:
    """The measures, a line each."""
    return "\n".join(f"  {name:30}{title} ({unit})" for name, (title, unit) in titles.items())


DESCRIPTION = f"""What runs have learnt of their images' spatial structure: from checkpoints, on the CPU; nothing is trained.

Measured at initialisation (made again from the seed), after the epochs of runtime.keep_epochs and at the end:
{listed(TITLES)}
With --block also:
{listed(ASSOCIATION)}
Similarity maps: P^T P, scaled and cut as in the paper's figure 1. The numbers are the field's measures and ours, not the
paper's. Chance: the patches change places at random; the exact expectation, and the interval of 95 % of 1,000 orders.
Of a run with train.ema_decay the average is measured at its newest checkpoint, by which it is judged; snapshots have none.
Attention is that between patches, without the class token; the content model's is a mean over images that
the run is evaluated on: of val, or of the part of train that train.holdout holds out.

Writes <run>/analysis/: structure.json, structure.csv, maps.npz (the matrices after each of these epochs, for `vitpa sweep
report`), similarity, attention, layers and training as .png and .svg, and tb/ for TensorBoard. For a sweep also
<sweep>/analysis/: means over seeds, 95 % t intervals, content - positional paired by seed.
"""


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa analyze",
        description=DESCRIPTION,
        epilog="exit codes: 0 ok, 1 an error that is yours to fix, 2 usage, 4 partial (runs of the sweep are left out)\n\n"
        "example: vitpa analyze demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|SWEEP", type=path_argument, help="a folder, or a name: a signature, a sweep")
    parser.add_argument(
        "--root", type=path_argument, default=Path("outputs"), help="folder of runs/ and sweeps/ (default: outputs)"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data sets (default: the run's)")
    parser.add_argument(
        "--neighbours", type=whole_number(1), default=NEIGHBOURS, metavar="C", help=f"of neighbour recall: {NEIGHBOURS}"
    )
    parser.add_argument(
        "--images",
        type=whole_number(0),
        default=IMAGES,
        metavar="N",
        help=f"images that a run is evaluated on, spread over them, for content attention: {IMAGES}; 0: leave it out",
    )
    parser.add_argument(
        "--block",
        type=whole_number(1),
        default=0,
        metavar="K",
        help="measure patch association (the paper's definition 2.2), too, with squares of K x K patches as the sets",
    )
    parser.add_argument(
        "--allow-mixed", action="store_true", help="average runs of different code or data, and mark the table"
    )
    parser.add_argument("--again", action="store_true", help="measure runs of a sweep again that were measured before")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, 4 if runs of the sweep are missing, 1 with one line for an error of the user's."""
    options = command_parser().parse_args(arguments)
    return run_command("vitpa analyze", lambda: analyze(options))


def analyze(options: argparse.Namespace) -> int:
    """Analyse the run or the sweep, write what is found and print it; the exit code.

    Raises:
        RunError, ConfigError, BetonError, OSError: it cannot be read, or not written.
    """
    target = found_target(options.target, options.root)
    wanted = {name: getattr(options, name) for name in ("neighbours", "images", "data_dir", "block")}
    if isinstance(target, TrainedRun):
        its = structure(target, **wanted)
        written = Written()
        written.attempt(lambda: write_run(its))
        print(json.dumps(document_of(its)) if options.json else run_table(its))
        written.check()
        return 0
    written = Written()
    mixed = mixed_datasets(target, allowed=options.allow_mixed)
    found = SweepStructure.of(target, *structures_of(target, wanted, written, again=options.again), mixed)
    written.attempt(found.write)
    print(json.dumps(found.document()) if options.json else found.table())
    written.check()
    return 4 if found.left_out else 0


class Written:
    """Whether all could be written: what was found is printed all the same, as of runs that belong to somebody else."""

    def __init__(self) -> None:
        self.problem: OSError | None = None  # the first one

    def attempt(self, write: Callable[[], object]) -> None:
        """Write something, if nothing has failed before."""
        if self.problem is None:
            try:
                write()
            except OSError as error:
                self.problem = error

    def check(self) -> None:
        """Say what failed.

        Raises:
            RunError: something could not be written.
        """
        if self.problem is not None:
            raise RunError(
                f"{self.problem.filename}: {self.problem.strerror}; what was found is printed, but not written; "
                "for files and figures copy the runs to a folder of yours"
            )


def mixed_datasets(sweep: TrainedSweep, *, allowed: bool) -> list[str]:
    """The data sets whose runs are of different code or data: none, unless that is `allowed`.

    Raises:
        RunError: there are some.
    """
    done = [(sweep.label(run), run.result) for run in sweep if run.result is not None and run.config.model.kind == "vit"]
    mixed = mixtures(done)
    if mixed and not allowed:
        raise RunError(f"{'; '.join(mixed.values())}. {HOW}, or average all the same with --allow-mixed")
    return list(mixed)


def structures_of(
    sweep: TrainedSweep, wanted: dict[str, Any], written: Written, *, again: bool
) -> tuple[list[Structure], dict[str, str]]:
    """What the finished runs of a sweep have learnt, written into each run's folder; and why the others are left out.

    What was found before, asked in the same way of the same weights, is read unless it is to be measured `again`.

    Raises:
        RunError: no run can be analysed.
    """
    structures, left_out = [], {}
    for run in sweep:
        if run.result is None:
            left_out[sweep.label(run)] = "not finished"
            continue
        try:
            its = None if again else recorded(run, **{name: wanted[name] for name in ("neighbours", "images", "block")})
            if its is None:
                its = structure(run, **wanted)
                written.attempt(partial(write_run, its))
        except RunError as error:
            left_out[sweep.label(run)] = str(error)
            continue
        structures.append(its)
    left_out |= {**sweep.broken, **dict.fromkeys(sweep.missing, "not started")}
    for name, reason in left_out.items():
        LOGGER.warning(f"{name} is left out: {reason}")
    if not structures:
        raise RunError(f"{sweep.path}: none of its runs can be analysed; train them first: vitpa sweep submit {sweep.name}")
    return structures, left_out


def write_run(found: Structure) -> None:
    """Write what was found into the run's folder `analysis`."""
    folder = found.run.path / "analysis"
    folder.mkdir(exist_ok=True)
    write_record(found)
    write_atomic(folder / "structure.csv", pd.DataFrame(map(vars, found.findings)).to_csv(index=False))
    draw_run(found, folder)
    board = folder / "tb"
    for old in board.glob("events.out.tfevents.*"):
        old.unlink()
    events = EventFile(board, 0, 0.0)
    for each in found.findings:
        if each.layer is None:
            events.add(summary.scalar(f"structure/{each.measure}", each.value), round(each.epoch * found.run.steps_per_epoch))
    events.close()


@dataclass(frozen=True)
class SweepStructure:
    """What is found about the runs of a sweep, over seeds and in pairs; the DataFrames of vitpa/analysis/seeds.py."""

    sweep: TrainedSweep
    structures: list[Structure]
    left_out: dict[str, str]  # names of runs, and why
    cells: pd.DataFrame
    differences: pd.DataFrame
    mixed: list[str]  # data sets whose runs are of different code or data, averaged because the user said so

    @staticmethod
    def of(sweep: TrainedSweep, structures: list[Structure], left_out: dict[str, str], mixed: list[str]) -> SweepStructure:
        """That of the runs that could be analysed."""
        found = findings(structures)
        return SweepStructure(sweep, structures, left_out, over_seeds(found), differences(found), mixed)

    def write(self) -> None:
        """Write numbers, tables and figures into the sweep's folder `analysis`."""
        folder = self.sweep.path / "analysis"
        folder.mkdir(exist_ok=True)
        write_json(folder / "structure.json", self.document())
        write_atomic(folder / "structure.csv", self.cells.to_csv(index=False))
        write_atomic(folder / "differences.csv", self.differences.to_csv(index=False))
        draw_sweep(self.cells, folder)

    def document(self) -> dict[str, Any]:
        """As plain data: `analysis/structure.json`."""
        return {
            "format": 1,
            "sweep": self.sweep.name,
            "runs": [each.run.directory.signature for each in self.structures],
            "left_out": self.left_out,
            "mixed": self.mixed,
            "grid": sorted({each.grid for each in self.structures}),
            "neighbours": self.structures[0].neighbours,
            "images": next((each.images for each in self.structures if each.images), None),
            "images_of": {each.run.config.dataset: each.run.config.evaluated_on for each in self.structures},
            "averaged_epochs": {each.run.directory.signature: each.averaged_epochs for each in self.structures},
            "measures": MEASURES,
            "cells": records(self.cells),
            "differences_content_minus_positional": records(self.differences),
        }

    def table(self) -> str:
        """For people: each measure of each cell at the end, as mean ± std over the seeds, and paired differences."""
        lines = [mixed_mark(self.mixed)] if self.mixed else []
        for measure, (title, unit) in ALL.items():
            cells = of_measure(self.cells, measure)
            if cells.empty:
                continue
            lines.append(f"{measure}: {title} ({unit})")
            for name, rows in cells.groupby("cell", sort=False):
                row = rows.iloc[-1]
                chance = "" if pd.isna(row["chance"]) else f", chance {row['chance']:.3f}"
                lines.append(f"  {name:32} {estimate(row)}; initial {row['initial']:.3f}{chance}")
            for setting, rows in of_measure(self.differences, measure).groupby("setting", sort=False):
                lines.append(f"  {f'{setting} content - positional':32} {estimate(rows.iloc[-1])}")
        if any(each.averaged_epochs for each in self.structures):
            lines.append(AVERAGED)
        return "\n".join([*lines, f"figures and numbers: {self.sweep.path / 'analysis'}"])


def of_measure(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows of a measure that are a mean over layers and heads, or of no attention."""
    return frame[(frame["measure"] == measure) & frame["layer"].isna()]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a DataFrame as plain data, None for what is missing."""
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def run_table(found: Structure) -> str:
    """For people: each measure at initialisation, at the end and by chance."""
    last = found.findings[-1].epoch
    head = f"{found.run.name} ({found.run.path}): {found.grid} x {found.grid} patches, {found.neighbours} neighbours"
    head += f", epoch {last:g}" + (" (the weights' average)" if last in found.averaged_epochs else "")
    lines = [head + (f", {found.images_text}" if found.images else "")]
    lines.append(f"{'':24}{'initial':>10}{'epoch ' + format(last, 'g'):>12}   chance [95 %]")
    for each in found.findings:
        if each.epoch == last and each.layer is None:
            chance = "" if each.chance is None else f"{each.chance:.3f} [{each.chance_low:.3f}, {each.chance_high:.3f}]"
            lines.append(f"{each.measure:24}{each.initial:10.3f}{each.value:12.3f}   {chance}")
    return "\n".join([*lines, f"figures and numbers: {found.run.path / 'analysis'}"])


def estimate(row: pd.Series) -> str:
    """`0.612 ± 0.004 [0.607, 0.617], 5 seeds`."""
    if pd.isna(row["std"]):
        return f"{row['mean']:.3f} (1 seed)"
    return f"{row['mean']:.3f} ± {row['std']:.3f} [{row['ci95_low']:.3f}, {row['ci95_high']:.3f}] ({row['n']:.0f} seeds)"
