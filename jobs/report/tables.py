"""The report of a sweep as files: tables in Markdown, LaTeX (accuracies in per cent) and CSV (fractions), with notes."""

from __future__ import annotations

import csv
import io
import json
import math
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.grid import column_of, short_name
from jobs.report.collect import Cell, CollectedTable, Difference
from jobs.report.compare import Best, Comparison
from vitpa.mixture import data_version, mixed_mark, short_versions
from vitpa.records import to_json, write_atomic
from vitpa.statistics import ROUNDING, Estimate
from vitpa.terminal import printable

AXES = "axes"  # of a row before it is written: the values on the axes, by axis
OLDER = "older-than-the-last-attempt"  # the folder of a report that a later `collect` could not replace
LATEX = {
    **{character: "\\" + character for character in "&%_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def write_report(table: CollectedTable, folder: Path) -> None:
    """Write table.csv, runs.csv, table.md, table.tex and report.json. They replace others when all of them are written."""
    files = {
        "report.json": _json(table),
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


def _json(table: CollectedTable) -> str:
    """The table as JSON, each result on a line of its own: indented, 10,000 of them take a second."""
    document = table.as_json()
    results = ",\n".join(f"    {json.dumps(result, allow_nan=False)}" for result in document.pop("results"))
    rest = to_json(document).removesuffix("\n}\n")
    return f'{rest},\n  "results": [\n{results}\n  ]\n}}\n'


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
    cells = [
        {
            "dataset": cell.dataset,
            "quantity": cell.network,
            AXES: cell.settings,
            "evaluated_on": cell.evaluated_on,
            **_estimate_columns(table, cell),
            "reference_val_top1_fraction": cell.reference_val_top1,
            "reference_source": cell.reference_source,
            "gpu_hours": round(cell.gpu_hours, 4),
            "energy_kwh": cell.energy_kwh,
            "ettr_fraction": cell.ettr,
            "code_version": "; ".join(cell.code_versions),
            "data_version": "; ".join(cell.data_versions),
        }
        for cell in table.cells
    ]
    quantity = "content - positional, paired by seed"
    return cells + [
        {
            "dataset": its.dataset,
            "quantity": quantity,
            AXES: its.settings,
            "evaluated_on": table.evaluated_on[its.dataset],
            **_estimate_columns(table, its),
        }
        for its in table.differences
    ]


def _estimate_columns(table: CollectedTable, its: Cell | Difference) -> dict[str, Any]:
    return {
        "n_seeds": its.val_top1.n,
        "n_seeds_wanted": its.wanted,
        "complete": its.val_top1.n == its.wanted,
        "val_top1_mean_fraction": its.val_top1.mean,
        "val_top1_std_fraction": its.val_top1.std,
        "val_top1_ci95_low_fraction": its.val_top1.ci95_low,
        "val_top1_ci95_high_fraction": its.val_top1.ci95_high,
        "mixed": its.dataset in table.mixed,
    }


def _run_rows(table: CollectedTable) -> list[dict[str, Any]]:
    return [
        {
            "dataset": result.dataset,
            "attention": result.attention,
            AXES: table.settings[result.signature],
            "seed": result.seed,
            "signature": result.signature,
            "evaluated_on": table.evaluated_on[result.dataset],
            "val_top1_fraction": result.top1,
            "val_top5_fraction": result.top5,
            "val_loss": result.loss,
            "epochs": result.epochs,
            "steps": result.steps,
            "train_time_s": result.train_time_s,
            "gpu_hours": result.gpu_hours,
            "energy_j": result.energy_j,
            "images_per_s": result.images_per_s,
            "attempts": result.attempts,
            "weights_sha256": result.weights_sha256,
            "code_version": result.code_version,
            "data_version": data_version(result),
            "finished_utc": result.finished_utc,
        }
        for result in table.results
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        own = rows[0].keys() - {AXES}
        rows = [_flat({**row, AXES: {column_of(axis, own): value for axis, value in row[AXES].items()}}) for row in rows]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns of the axes in their place."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns |= value if name == AXES else {name: value}
    return columns


def hours(value: float) -> str:
    """GPU-hours for people: of short runs, two digits that are not 0."""
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def percent(value: float | None, sign: bool = False, digits: int = 2) -> str:
    """A fraction as tables have it; `-` for None."""
    return "-" if value is None else f"{round(100 * value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"  # never -0.00


def span(ends: tuple[float | None, float | None], sign: bool = False, digits: int = 2) -> str:
    """An interval as tables have it; `-` without one."""
    low, high = (percent(end, sign, digits) for end in ends)
    return "-" if ends[0] is None else f"[{low}, {high}]"


def digits_of(difference: Estimate) -> int:
    """Decimals of its percentage: two, or if its interval is without 0 as many more as show which way a small one goes."""
    mean, low, high = difference.mean, difference.ci95_low, difference.ci95_high
    if mean is None or low is None or high is None or low <= 0 <= high or abs(mean) < ROUNDING:
        return 2
    return 2 if float(percent(mean)) else 1 - math.floor(math.log10(abs(100 * mean)))


def _accuracy(table: CollectedTable, its: Cell | Difference | Comparison, *, sign: bool = False) -> list[str]:
    """Mean and standard deviation, the interval of the mean, and how many seeds are in it."""
    found = its.val_top1
    digits = digits_of(found) if sign else 2
    mean = percent(found.mean, sign, digits) + (f" ± {percent(found.std, digits=digits)}" if found.std is not None else "")
    interval = span((found.ci95_low, found.ci95_high), sign, digits)
    seeds = f"{found.n}/{its.wanted}" + ("" if found.n == its.wanted else " incomplete")
    return [mean + (" (mixed)" if its.dataset in table.mixed else ""), interval, seeds]


def texts(table: CollectedTable) -> Iterator[list[list[str]]]:
    """The table of the cells, and that of the differences if there are any; the first row of each is its header."""
    axes = [short_name(axis) for axis in table.axes]
    first, *others = sorted(set(table.evaluated_on.values())) or ["val"]
    top1 = "top-1 %" if others else f"{first} top-1 %" if first == "val" else f"{first}, top-1 %"  # the notes have each
    energy = any(cell.energy_kwh is not None for cell in table.cells)
    ettr = any(cell.ettr is not None for cell in table.cells)
    header = ["data set", "attention", *axes, top1, "95 % interval", "seeds", "reference %", "GPU-hours"]
    header += [*(["kWh (GPUs)"] if energy else []), *(["ETTR %"] if ettr else [])]
    yield [header] + [
        [
            cell.dataset,
            cell.network,
            *cell.settings.values(),
            *_accuracy(table, cell),
            percent(cell.reference_val_top1),
            hours(cell.gpu_hours),
            *(["-" if cell.energy_kwh is None else f"{cell.energy_kwh:.3g}"] if energy else []),
            *(["-" if cell.ettr is None else f"{100 * cell.ettr:.1f}"] if ettr else []),
        ]
        for cell in table.cells
    ]
    if table.differences:
        header = ["data set", *axes, "content - positional, points", "95 % interval", "seeds in both"]
        yield [header] + [
            [its.dataset, *its.settings.values(), *_accuracy(table, its, sign=True)] for its in table.differences
        ]
    if table.comparisons:
        yield _comparison_rows(table)
    yield from _pivots(table)


def _comparison_rows(table: CollectedTable) -> list[list[str]]:
    common = [axis for axis in ["attention", *table.axes] if axis != table.compared]
    what = f"{short_name(table.compared)}, difference in points"
    header = ["data set", *map(short_name, common), what, "", "95 % interval", "p (Holm)", "seeds in both"]
    rows = []
    for its in table.comparisons:
        mean, interval, seeds = _accuracy(table, its, sign=True)
        p = "-" if its.p_holm is None else f"{its.p_holm:.2g}"
        rows.append([its.dataset, *its.common.values(), f"{its.second} - {its.first}", mean, interval, p, seeds])
    return [header, *rows]


def _pivots(table: CollectedTable) -> Iterator[list[list[str]]]:
    """A table of means for each data set and each point of the axes that are neither its rows nor its columns."""
    if table.pivot is None:
        return
    rows, columns = table.pivot
    found: dict[str, dict[tuple[str, str], str]] = {}
    for cell in table.cells:
        position = {"attention": cell.network, **cell.settings}
        others = [f"{short_name(axis)}={value}" for axis, value in position.items() if axis not in table.pivot]
        mean, _, seeds = _accuracy(table, cell)
        text = mean if cell.complete else f"{mean} ({seeds})"
        found.setdefault(" ".join([cell.dataset, *others]), {})[position[rows], position[columns]] = text
    for name, means in found.items():
        across = list(dict.fromkeys(column for _, column in means))
        header = [f"{name}: {short_name(rows)}", *(f"{short_name(columns)}={column}" for column in across)]
        down = dict.fromkeys(row for row, _ in means)
        yield [header, *([row, *(means.get((row, column), "-") for column in across)] for row in down)]


def markdown(table: CollectedTable) -> str:
    """The tables in Markdown, readable as plain text."""
    title = f"## {table.sweep}: {one_line(table.description)}" if table.description else f"## {table.sweep}"
    return "\n\n".join([title, *map(_markdown_table, texts(table)), "\n".join(_notes(table))])


def about(table: CollectedTable) -> list[str]:
    """How the numbers came to be, and what was found: a line each."""
    notes = [
        "Mean ± standard deviation (n - 1) over seeds; 95 % interval of the mean by Student's t; differences paired by seed."
    ]
    for dataset, part in table.evaluated_on.items():
        if part != "val":
            notes.append(f"HELD OUT: {dataset} was evaluated on {part}, not on val; no reference is of these images.")
    notes += [verdict(best) for best in table.best]
    if table.compared and not table.comparisons:
        values = list(dict.fromkeys(cell.position[table.compared] for cell in table.scores))
        why = f"all cells have {values[0]}" if len(values) == 1 else "no two cells of a data set differ in it alone"
        notes.append(f"No comparison along {table.compared}: {why}.")
    if table.comparisons:
        notes.append("p: paired t test over the seeds, two-sided, corrected for all comparisons of the table (Holm).")
    for cell in table.cells:
        if cell.reference_source:
            notes.append(f"Reference {cell.dataset} {cell.attention}: {cell.reference_source}.")
    if table.goodput is not None and table.goodput.ettr is not None:
        notes.append(
            f"ETTR, effective training time ratio: {100 * table.goodput.ettr:.1f} % of the time of all attempts went into "
            "steps and evaluations that were kept."
        )
    code = sorted({version for cell in table.cells for version in cell.code_versions})
    notes.append(f"Code {', '.join(code) or '-'}; collected {table.collected_utc}.")
    for dataset in dict.fromkeys(cell.dataset for cell in table.cells):
        data = sorted({version for cell in table.cells if cell.dataset == dataset for version in cell.data_versions})
        notes.append(f"Data {dataset}: {', '.join(short_versions(data)) or '-'}.")
    if table.mixed:
        notes.append(mixed_mark(table.mixed))
    return [one_line(note) for note in notes]


def _notes(table: CollectedTable) -> list[str]:
    notes = [f"CHANGED: {table.changed}; this is the sweep as it was submitted."] if table.changed else []
    if not table.complete:
        notes.append(f"INCOMPLETE: {len(table.absent)} runs are not in these means:")
        notes += [
            f"- {entry['run']}: {entry['state']}" + (f" ({entry['reason']})" if entry["reason"] else "")
            for entry in table.absent
        ]
    if table.damaged:
        notes.append("DAMAGED: the curves of these runs have gaps; their results were compared with the last row, and count:")
        notes += [f"- {entry['run']}: {entry['reason']}" for entry in table.damaged]
    return about(table) + [one_line(note) for note in notes]


def verdict(best: Best) -> str:
    """Which cell of a data set is best, and from which it cannot be told apart."""
    ahead = best.others - len(best.alike) - len(best.above)
    text = f"Best of {best.dataset}: {best.cell}, {percent(best.mean)} %; "
    text += f"better than {ahead} of {best.others} other cells (paired t test by seed, 5 %, Holm's correction for all pairs)"
    for what, others in (("not told apart from", best.alike), ("worse, on the seeds that both have, than", best.above)):
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            text += f"; {what}: {'; '.join(others[:5])}{more}"
    if best.uneven:
        text += ". The cells have results of different seeds: means are of all that each has, tests of those that both have"
    return f"{text}."


def one_line(text: str) -> str:
    """A text of the user's or of a record as one line: a comment in LaTeX, or an entry of a list, ends with its line."""
    return printable(" ".join(text.split()))


def _markdown_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def latex(table: CollectedTable) -> str:
    """The tables in LaTeX (package booktabs); the notes as comments."""
    return "\n".join([*(f"% {note}" for note in _notes(table)), *map(_latex_table, texts(table))]) + "\n"


def _latex_table(rows: list[list[str]]) -> str:
    lines = [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    columns = "l" * len(rows[0])
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )


def _escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in printable(text)).replace(" - ", " $-$ ")
