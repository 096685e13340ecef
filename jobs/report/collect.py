"""The results of a sweep as statistics over seeds, and the report files.

Mean, standard deviation (n - 1 in the denominator), 95 % interval of the mean by Student's t, and the difference
content - positional paired by seed. Fractions everywhere here; per cent in the Markdown and LaTeX tables. Only valid
results count; everything else is listed with its reason, never averaged.
"""

from __future__ import annotations

import csv
import io
import math
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.state import RunState
from jobs.sweep import Attention, Sweep, SweepError
from vitpa.records import to_json, utc_now, write_atomic
from vitpa.rundir import Result
from vitpa.terminal import printable

OLDER = "older-than-the-last-attempt"  # the folder of a report that a later `collect` could not replace


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds. `std` and the interval exist from two seeds on."""

    n: int
    mean: float | None
    std: float | None
    ci95_low: float | None
    ci95_high: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Mean, standard deviation (ddof = 1) and the 95 % t interval of the mean."""
        n = len(values)
        if n == 0:
            return Estimate(0, None, None, None, None)
        mean = math.fsum(values) / n
        if n == 1:
            return Estimate(1, mean, None, None, None)
        from scipy.special import stdtrit  # noqa: PLC0415 - a quarter of a second that only this needs

        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        quantile = float(stdtrit(n - 1, 0.975))  # 97.5 % of Student's t, n - 1 degrees of freedom
        half = quantile * std / math.sqrt(n)
        return Estimate(n, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Cell:
    """One data set and attention."""

    dataset: str
    attention: Attention
    wanted: int  # seeds in the sweep
    val_top1: Estimate
    seeds: list[int]  # that are in the mean
    gpu_hours: float
    code_versions: list[str]
    data_versions: list[str]
    reference_val_top1: float | None
    reference_source: str

    @property
    def complete(self) -> bool:
        """Whether every seed is in the mean."""
        return self.val_top1.n == self.wanted


@dataclass(frozen=True)
class Difference:
    """content - positional on one data set, over the seeds that both have."""

    dataset: str
    wanted: int
    val_top1: Estimate
    seeds: list[int]


@dataclass(frozen=True)
class CollectedTable:
    """Everything `collect` finds out."""

    sweep: str
    description: str
    collected_utc: str
    mixed: list[str]  # data sets whose runs are of different code or data, averaged because the user said so
    cells: list[Cell]
    differences: list[Difference]
    results: list[Result]
    absent: list[dict[str, str]]  # runs without a valid result: run, state, reason

    @property
    def complete(self) -> bool:
        """Whether every run is in it."""
        return not self.absent

    def as_json(self) -> dict[str, Any]:
        """Plain data: accuracies are fractions."""
        return {
            "sweep": self.sweep,
            "description": self.description,
            "collected_utc": self.collected_utc,
            "complete": self.complete,
            "mixed": self.mixed,
            "cells": [{**asdict(cell), "complete": cell.complete} for cell in self.cells],
            "differences_content_minus_positional": [asdict(difference) for difference in self.differences],
            "absent": self.absent,
            "results": [result.model_dump(mode="json") for result in self.results],
        }


def collect(sweep: Sweep, states: list[RunState], *, allow_mixed: bool = False) -> CollectedTable:
    """The table of a sweep from the states of its runs.

    Raises:
        SweepError: runs of one data set were made by different code or from different data, and `allow_mixed` is not set.
    """
    datasets = list(dict.fromkeys(state.run.dataset for state in states))
    mixed = [dataset for dataset in datasets if _mixture(dataset, states)]
    if mixed and not allow_mixed:
        raise SweepError("; ".join(_mixture(dataset, states) for dataset in mixed) + _MEND_MIXED)
    groups = list(dict.fromkeys((state.run.dataset, state.run.attention) for state in states))
    groups.sort(key=lambda group: (datasets.index(group[0]), group[1]))
    absent = [
        {"run": state.run.label, "state": state.state, "reason": state.reason} for state in states if state.result is None
    ]
    return CollectedTable(
        sweep=sweep.name,
        description=sweep.config.description,
        collected_utc=utc_now(),
        mixed=mixed,
        cells=[_cell(sweep, dataset, attention, states) for dataset, attention in groups],
        differences=[difference for dataset in datasets if (difference := _difference(dataset, states))],
        results=[state.result for state in states if state.result is not None],
        absent=absent,
    )


_MEND_MIXED = (
    ". Train the older ones again (delete their folders under runs/, then submit), select with filters, or average all the "
    "same with --allow-mixed"
)


def _mixture(dataset: str, states: list[RunState]) -> str:
    """What is different between the results of a data set, and which runs have which; empty if nothing is."""
    parts = []
    for name, version in (("code_version", _code), ("beton_sha256", _data)):
        runs: dict[str, list[str]] = {}
        for state in states:
            if state.result is not None and state.run.dataset == dataset:
                runs.setdefault(version(state.result), []).append(f"{state.run.attention}-s{state.run.seed}")
        if len(runs) > 1:
            which = ", ".join(
                f"{value} ({' '.join(runs[whole])})" for whole, value in zip(runs, _shown(list(runs)), strict=True)
            )
            parts.append(f"{dataset}: runs of different {name}: {which}")
    return "; ".join(parts)


def _code(result: Result) -> str:
    return result.code_version


def _data(result: Result) -> str:
    """The whole digests: what is compared, and what programs get."""
    return " ".join(f"{split}:{digest}" for split, digest in sorted(result.beton_sha256.items()))


def _shown(versions: Sequence[str]) -> list[str]:
    """Versions for people to read: digests with 12 digits where that does not make two of them alike."""
    short = [re.sub(r"(:[0-9a-f]{12})[0-9a-f]{52}\b", r"\1", version) for version in versions]
    return short if len(set(short)) == len(set(versions)) else list(versions)


def _cell(sweep: Sweep, dataset: str, attention: Attention, states: list[RunState]) -> Cell:
    members = [state for state in states if (state.run.dataset, state.run.attention) == (dataset, attention)]
    results = [state.result for state in members if state.result is not None]
    reference = sweep.config.reference.get(dataset, {}).get(attention)
    return Cell(
        dataset=dataset,
        attention=attention,
        wanted=len(members),
        val_top1=Estimate.of([result.val_top1 for result in results]),
        seeds=sorted(result.seed for result in results),
        gpu_hours=math.fsum(result.gpu_hours for result in results),
        code_versions=sorted({_code(result) for result in results}),
        data_versions=sorted({_data(result) for result in results}),
        reference_val_top1=reference.val_top1 if reference else None,
        reference_source=reference.source if reference else "",
    )


def _difference(dataset: str, states: list[RunState]) -> Difference | None:
    """Paired by seed; None if the sweep does not have both attentions on this data set."""
    top1: dict[str, dict[int, float | None]] = {"content": {}, "positional": {}}
    for state in states:
        if state.run.dataset == dataset:
            top1[state.run.attention][state.run.seed] = state.result.val_top1 if state.result else None
    wanted = sorted(set(top1["content"]) & set(top1["positional"]))
    if not wanted:
        return None
    pairs = [(seed, top1["content"][seed], top1["positional"][seed]) for seed in wanted]
    differences = {seed: a - b for seed, a, b in pairs if a is not None and b is not None}
    return Difference(dataset, len(wanted), Estimate.of(list(differences.values())), list(differences))


def write_report(table: CollectedTable, folder: Path) -> None:
    """Write table.csv, runs.csv, table.md, table.tex and report.json. They replace others when all of them are written."""
    files = {
        "report.json": to_json(table.as_json()),
        "table.md": markdown(table) + "\n",
        "table.tex": latex(table),
        "table.csv": _csv(_table_rows(table)),
        "runs.csv": _csv(_run_rows(table)),
    }
    draft = folder / f".draft-{secrets.token_hex(4)}"
    draft.mkdir(parents=True)
    try:
        for name, text in files.items():
            write_atomic(draft / name, text)
        for name in files:
            (draft / name).replace(folder / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(folder / OLDER, ignore_errors=True)


def set_report_aside(folder: Path) -> Path | None:
    """Move the report in `folder` into a folder there, so that nobody takes it for a new one; None if there is none."""
    files = [path for path in folder.glob("*") if path.is_file()]
    if not files:
        return None
    older = folder / OLDER
    older.mkdir(exist_ok=True)
    for path in files:
        path.replace(older / path.name)
    return older


def _table_rows(table: CollectedTable) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell in table.cells:
        rows.append(
            {
                "dataset": cell.dataset,
                "quantity": cell.attention,
                **_estimate_columns(cell.val_top1, cell.wanted),
                "mixed": cell.dataset in table.mixed,
                "reference_val_top1_fraction": cell.reference_val_top1,
                "reference_source": cell.reference_source,
                "gpu_hours": round(cell.gpu_hours, 4),
                "code_version": "; ".join(cell.code_versions),
                "data_version": "; ".join(cell.data_versions),
            }
        )
    for difference in table.differences:
        columns = _estimate_columns(difference.val_top1, difference.wanted)
        row = {"dataset": difference.dataset, "quantity": "content - positional, paired by seed", **columns}
        rows.append({**row, "mixed": difference.dataset in table.mixed})
    return rows


def _estimate_columns(estimate: Estimate, wanted: int) -> dict[str, Any]:
    return {
        "n_seeds": estimate.n,
        "n_seeds_wanted": wanted,
        "complete": estimate.n == wanted,
        "val_top1_mean_fraction": estimate.mean,
        "val_top1_std_fraction": estimate.std,
        "val_top1_ci95_low_fraction": estimate.ci95_low,
        "val_top1_ci95_high_fraction": estimate.ci95_high,
    }


def _run_rows(table: CollectedTable) -> list[dict[str, Any]]:
    return [
        {
            "dataset": result.dataset,
            "attention": result.attention,
            "seed": result.seed,
            "signature": result.signature,
            "val_top1_fraction": result.val_top1,
            "val_top5_fraction": result.val_top5,
            "val_loss": result.val_loss,
            "epochs": result.epochs,
            "steps": result.steps,
            "train_time_s": result.train_time_s,
            "gpu_hours": result.gpu_hours,
            "images_per_s": result.images_per_s,
            "attempts": result.attempts,
            "weights_sha256": result.weights_sha256,
            "code_version": result.code_version,
            "data_version": _data(result),
            "finished_utc": result.finished_utc,
        }
        for result in table.results
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _percent(value: float | None, sign: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.2f}"


def _mean_std(estimate: Estimate, sign: bool = False) -> str:
    mean = _percent(estimate.mean, sign)
    return mean if estimate.std is None else f"{mean} ± {_percent(estimate.std)}"


def _interval(estimate: Estimate, sign: bool = False) -> str:
    if estimate.ci95_low is None:
        return "-"
    return f"[{_percent(estimate.ci95_low, sign)}, {_percent(estimate.ci95_high, sign)}]"


def _of_wanted(estimate: Estimate, wanted: int) -> str:
    return f"{estimate.n}/{wanted}" + ("" if estimate.n == wanted else " incomplete")


def _cells_text(table: CollectedTable) -> tuple[list[str], list[list[str]]]:
    header = ["data set", "attention", "val top-1 %", "95 % interval", "seeds", "reference %", "GPU-hours"]
    rows = []
    for cell in table.cells:
        mark = " (mixed)" if cell.dataset in table.mixed else ""
        rows.append(
            [
                cell.dataset,
                cell.attention,
                _mean_std(cell.val_top1) + mark,
                _interval(cell.val_top1),
                _of_wanted(cell.val_top1, cell.wanted),
                _percent(cell.reference_val_top1),
                f"{cell.gpu_hours:.2f}",
            ]
        )
    return header, rows


def _differences_text(table: CollectedTable) -> tuple[list[str], list[list[str]]]:
    header = ["data set", "content - positional, points", "95 % interval", "seeds in both"]
    rows = []
    for difference in table.differences:
        mark = " (mixed)" if difference.dataset in table.mixed else ""
        rows.append(
            [
                difference.dataset,
                _mean_std(difference.val_top1, sign=True) + mark,
                _interval(difference.val_top1, sign=True),
                _of_wanted(difference.val_top1, difference.wanted),
            ]
        )
    return header, rows


def markdown(table: CollectedTable) -> str:
    """The tables in Markdown, readable as plain text."""
    parts = [f"## {table.sweep}: {_one_line(table.description)}" if table.description else f"## {table.sweep}"]
    parts.append(_markdown_table(*_cells_text(table)))
    if table.differences:
        parts.append(_markdown_table(*_differences_text(table)))
    parts.append("\n".join(_notes(table)))
    return "\n\n".join(parts)


def _notes(table: CollectedTable) -> list[str]:
    notes = [
        "Mean ± standard deviation (n - 1) over seeds; 95 % interval of the mean by Student's t; differences paired by seed."
    ]
    for cell in table.cells:
        if cell.reference_source:
            notes.append(f"Reference {cell.dataset} {cell.attention}: {cell.reference_source}.")
    code = sorted({version for cell in table.cells for version in cell.code_versions})
    notes.append(f"Code {', '.join(code) or '-'}; collected {table.collected_utc}.")
    for dataset in dict.fromkeys(cell.dataset for cell in table.cells):
        data = sorted({version for cell in table.cells if cell.dataset == dataset for version in cell.data_versions})
        notes.append(f"Data {dataset}: {', '.join(_shown(data)) or '-'}.")
    if table.mixed:
        notes.append(f"MIXED: runs of different code or data are averaged for {', '.join(table.mixed)}.")
    if not table.complete:
        notes.append(f"INCOMPLETE: {len(table.absent)} runs are not in these means:")
        notes += [f"- {entry['run']}: {entry['state']}" + _because(entry["reason"]) for entry in table.absent]
    return [_one_line(note) for note in notes]


def _one_line(text: str) -> str:
    """A text of the user's or of a record as one line: a comment in LaTeX, or an entry of a list, ends with its line."""
    return printable(" ".join(text.split()))


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def latex(table: CollectedTable) -> str:
    """The tables in LaTeX (package booktabs); the notes as comments."""
    parts = [f"% {note}" for note in _notes(table)]
    parts.append(_latex_table(*_cells_text(table)))
    if table.differences:
        parts.append(_latex_table(*_differences_text(table)))
    return "\n".join(parts) + "\n"


def _latex_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" & ".join(_escape(cell) for cell in line) + r" \\" for line in [header, *rows]]
    columns = "l" * len(header)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )


LATEX = {
    **{character: "\\" + character for character in "&%_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def _escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in printable(text)).replace(" - ", " $-$ ")
