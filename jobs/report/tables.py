"""The report of a sweep as files: tables in Markdown, LaTeX (accuracies in per cent) and CSV (fractions), with notes."""

from __future__ import annotations

import csv
import io
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from jobs.report.collect import CollectedTable, Estimate, data_version, short_versions
from vitpa.records import to_json, write_atomic
from vitpa.terminal import printable

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
            "data_version": data_version(result),
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
        notes.append(f"Data {dataset}: {', '.join(short_versions(data)) or '-'}.")
    if table.mixed:
        notes.append(f"MIXED: runs of different code or data are averaged for {', '.join(table.mixed)}.")
    if not table.complete:
        notes.append(f"INCOMPLETE: {len(table.absent)} runs are not in these means:")
        notes += [f"- {entry['run']}: {entry['state']}" + _because(entry["reason"]) for entry in table.absent]
    if table.damaged:
        notes.append("DAMAGED: the curves of these runs have gaps; their results were compared with the last row, and count:")
        notes += [f"- {entry['run']}: {entry['reason']}" for entry in table.damaged]
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


def _escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in printable(text)).replace(" - ", " $-$ ")
