"""What a sweep looks like at one moment: a row per run, as a table for people and as plain data for programs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.grid import Run
from jobs.state import LIVE, STATES, RunState, Survey
from vitpa.config import RunDir, RunError, read_json
from vitpa.datasets import facts_of

REFRESH_S = 1.0
TAIL_BYTES = 16_384
COLOURS = {"done": "green", "running": "cyan", "pending": "blue", "failed": "red", "broken": "red", "lost": "yellow"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come, from its own records. None where nothing is known."""

    step: int | None = None
    steps_total: int | None = None
    epoch: float | None = None
    val_top1: float | None = None  # of the last evaluation, fraction
    images_per_s: float | None = None


def progress_of(state: RunState, root: Path) -> Progress:
    """Progress of a run: from its result, or else from the ends of its records."""
    if state.result is not None:
        result = state.result
        return Progress(result.steps, result.steps, result.epochs, result.val_top1, result.images_per_s)
    if state.attempt is None:
        return Progress()
    directory = state.run.directory(root)
    last: dict[str, Any] = {}
    for row in _last_rows(directory):
        last.update(row)
    return Progress(
        last.get("step"), _steps_total(directory), last.get("epoch"), last.get("val/top1"), last.get("perf/images_per_s")
    )


def _last_rows(directory: RunDir) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl, oldest first; a line cut at either end is left out."""
    try:
        with directory.metrics_jsonl.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _steps_total(directory: RunDir) -> int | None:
    try:
        total = (read_json(directory.env_json) or {}).get("steps_total")
    except RunError:
        return None
    return total if isinstance(total, int) else None


def row_of(state: RunState, root: Path) -> dict[str, Any]:
    """One run as plain data; times in seconds, accuracy as a fraction."""
    progress = progress_of(state, root)
    eta_s = None
    if state.state == "running" and progress.step is not None and progress.steps_total and progress.images_per_s:
        images = (progress.steps_total - progress.step) * state.run.config.train.global_batch_size
        eta_s = round(images / progress.images_per_s, 1)
    return {
        "run": state.run.label,
        "signature": state.run.signature,
        "dataset": state.run.dataset,
        "attention": state.run.attention,
        "seed": state.run.seed,
        "state": state.state,
        "step": progress.step,
        "steps_total": progress.steps_total,
        "epoch": progress.epoch,
        "epochs": state.run.config.train.epochs,
        "val_top1": progress.val_top1,
        "images_per_s": progress.images_per_s,
        "eta_s": eta_s,
        "attempts": state.attempts,
        "reason": state.reason,
    }


def table_of(rows: list[dict[str, Any]], title: str) -> Group:
    """Rows as a table; below it a line for each reason to be as they are."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("step", "epoch", "top-1 %", "images/s", "ETA", "try"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["run"],
            Text(row["state"], style=COLOURS.get(row["state"], "")),
            "" if row["step"] is None else f"{row['step']}/{row['steps_total'] or '?'}",
            "" if row["epoch"] is None else f"{row['epoch']:.1f}/{row['epochs']}",
            "" if row["val_top1"] is None else f"{100 * row['val_top1']:.2f}",
            "" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
            duration(row["eta_s"]),
            str(row["attempts"] or ""),
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            reasons.setdefault((row["state"], row["reason"]), []).append(row["run"])
    lines = []
    for (state, reason), runs in reasons.items():
        others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        lines.append(Text(f"{runs[0]}{others} {state}: {reason}"))
    return Group(table, *lines)


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds is None:
        return ""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def summary(states: list[RunState]) -> str:
    """Counts per state, such as `4 of 6 done, 2 running`."""
    counts = Counter(state.state for state in states)
    parts = [f"{counts['done']} of {len(states)} done"]
    return ", ".join(parts + [f"{counts[name]} {name}" for name in STATES if name != "done" and counts[name]])


def watch(runs: list[Run], root: Path, name: str, console: Console, until: Callable[[list[RunState]], bool]) -> list[RunState]:
    """Show the table until `until` says so; without a terminal, a line whenever the counts change.

    Returns the last states.
    """
    if not console.is_terminal:
        shown = ""
        while True:
            states = Survey(root).states(runs)
            if summary(states) != shown:
                shown = summary(states)
                console.print(f"{name}: {shown}")
            if until(states):
                return states
            time.sleep(REFRESH_S)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            states = Survey(root).states(runs)
            rows = [row_of(state, root) for state in states]
            live.update(table_of(_fitting(rows, console.height - 6), f"{name}: {summary(states)}"), refresh=True)
            if until(states):
                return states
            time.sleep(REFRESH_S)


def _fitting(rows: list[dict[str, Any]], height: int) -> list[dict[str, Any]]:
    """The rows that matter most now, if not all fit on the screen: what runs, then trouble, then the rest."""
    if len(rows) <= height:
        return rows
    order = ("running", "failed", "broken", "lost", "uncertain", "interrupted", "cancelled", "pending", "missing", "done")
    chosen = sorted(range(len(rows)), key=lambda index: (order.index(rows[index]["state"]), index))[: max(1, height)]
    return [rows[index] for index in sorted(chosen)]


def nothing_live(states: list[RunState]) -> bool:
    """Whether no run is in progress or about to be."""
    return not any(state.state in LIVE for state in states)


def estimated_s(states: list[RunState]) -> float | None:
    """Training time of the runs that are not done, one after the other; None unless each kind has been measured.

    A run takes (training images x epochs) / (images per second of finished runs of its data set and attention).
    """
    measured: dict[tuple[str, str], list[float]] = {}
    for state in states:
        if state.result is not None and state.result.images_per_s > 0:
            measured.setdefault((state.run.dataset, state.run.attention), []).append(state.result.images_per_s)
    total = 0.0
    for state in states:
        if state.state == "done":
            continue
        speeds = measured.get((state.run.dataset, state.run.attention))
        images = facts_of(state.run.dataset).num_train
        if not speeds or images is None:
            return None
        total += images * state.run.config.train.epochs * len(speeds) / sum(speeds)
    return total
