"""What a sweep looks like at one moment: a row per run, as a table for people and as plain data for programs."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from jobs.records import Claim, Intent, Start
from jobs.report.waiting import advice, needs_action
from jobs.state import LIVE, STATES, RunState, StateReader
from vitpa.config import RunConfig
from vitpa.documents import read_end
from vitpa.flops import full_size_epochs, size_share
from vitpa.metrics_file import parse_line
from vitpa.records import RunError, made_with, read_json, read_record
from vitpa.rundir import RunDir
from vitpa.terminal import printable

REFRESH_S = 1.0
REFRESH_SLURM_S = 10.0  # squeue is a burden on everybody's scheduler
TAIL_BYTES = 16_384
PROGRESS = {name: f'"{name}"'.encode() for name in ("step", "epoch", "perf/images_per_s")}  # as in the file
COLOURS = {"done": "green", "running": "cyan", "pending": "blue", "failed": "red", "broken": "red", "lost": "yellow"}
STYLES = {state: Style(color=colour) for state, colour in COLOURS.items()}


@dataclass(frozen=True)
class Progress:
    """How far a run has come, from its own records. None where nothing is known."""

    step: int | None = None
    steps_total: int | None = None
    epoch: float | None = None
    val_top1: float | None = None  # of the last evaluation, fraction
    images_per_s: float | None = None
    damaged: bool = False  # the end of metrics.jsonl, as far as it was looked at


def progress_of(state: RunState, root: Path) -> Progress:
    """Progress of a run: from its result, or else from the ends of its records."""
    if state.result is not None:
        result = state.result
        return Progress(result.steps, result.steps, result.epochs, result.top1, result.images_per_s)
    if state.attempt is None:
        return Progress()
    directory = state.run.directory(root)
    top1 = state.run.config.top1_metric
    last, damaged = _last_values(directory, top1)
    total = made_with(directory.env_json).get("steps_total")
    total = total if isinstance(total, int) else None
    return Progress(last.get("step"), total, last.get("epoch"), last.get(top1), last.get("perf/images_per_s"), damaged)


def _last_values(directory: RunDir, top1: str) -> tuple[dict[str, Any], bool]:
    """The last value of each metric in PROGRESS and of `top1`, from the end of metrics.jsonl; whether a line there is damaged.

    A line cut at either end is left out.
    """
    try:
        lines = read_end(directory.metrics_jsonl, TAIL_BYTES).split(b"\n")
    except OSError:
        return {}, False
    found: dict[str, Any] = {}
    wanted, damaged = PROGRESS | {top1: f'"{top1}"'.encode()}, any(b"\0" in line for line in lines)
    for number, line in reversed(list(enumerate(lines))):
        if not any(key in line for key in wanted.values()):  # to parse every line takes longer than all the rest of `status`
            continue
        try:
            row = parse_line(line.decode(errors="replace"))
        except ValueError:
            damaged = damaged or 0 < number < len(lines) - 1
            continue
        found |= {name: row[name] for name in wanted if isinstance(row.get(name), int | float)}
        wanted = {name: key for name, key in wanted.items() if name not in found}
        if not wanted:
            break
    return found, damaged


def row_of(state: RunState, root: Path) -> dict[str, Any]:
    """One run as plain data; times in seconds, accuracy as a fraction. Empty texts where something is not known."""
    progress = progress_of(state, root)
    config = state.run.config
    last_epoch = state.run.stop_after_epoch or config.train.epochs
    return {
        "run": state.run.label,
        "cell": state.run.cell,
        "signature": state.run.signature,
        "dataset": state.run.dataset,
        "attention": state.run.attention,
        "seed": state.run.seed,
        "settings": state.run.settings,
        "state": state.state,
        "step": progress.step,
        "steps_total": progress.steps_total,
        "epoch": progress.epoch,
        "epochs": state.run.config.train.epochs,
        "val_top1": progress.val_top1,
        "evaluated_on": state.run.config.evaluated_on,
        "images_per_s": progress.images_per_s,
        "eta_s": eta_s(config, progress, last_epoch) if state.state == "running" else None,
        "attempts": state.attempts,
        "node": _node(state),
        "job": state.job_id,
        "reason": "; ".join(filter(None, [state.reason, "metrics.jsonl has damaged lines" if progress.damaged else ""])),
        "advice": advice(state.job) if state.state == "pending" else "",
    }


def eta_s(config: RunConfig, progress: Progress, last_epoch: int) -> float | None:
    """Seconds of training up to the end of `last_epoch`, at the last speed; images count by their arithmetic."""
    if progress.step is None or not progress.steps_total or not progress.images_per_s:
        return None
    epochs, done = config.train.epochs, progress.step * config.train.epochs / progress.steps_total
    left = max(0.0, full_size_epochs(config, last_epoch) - full_size_epochs(config, done))
    images = left * progress.steps_total / epochs * config.train.global_batch_size
    return round(images / (progress.images_per_s * size_share(config, max(0, math.ceil(done) - 1))), 1)


def _node(state: RunState) -> str:
    """Where its last attempt runs, or ended badly: `node[1-2]`, as SLURM names several."""
    if state.attempt is None or state.state in ("done", "pending", "missing"):
        return ""
    try:
        start = read_json(state.attempt.start_json) or {}
    except RunError:
        return ""
    nodes = start.get("nodes") or start.get("host") or ""
    return ",".join(map(str, nodes)) if isinstance(nodes, list) else str(nodes)


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    text: Callable[[dict[str, Any]], str]
    side: str = ">"  # to which texts are set


HOST = socket.gethostname()
COLUMNS = (
    Column("run", lambda row: row["run"], side="<"),
    Column("state", lambda row: row["state"], side="<"),
    Column("step", lambda row: "" if row["step"] is None else f"{row['step']}/{row['steps_total'] or '?'}"),
    Column("epoch", lambda row: "" if row["epoch"] is None else f"{row['epoch']:.1f}/{row['epochs']}"),
    Column("top-1 %", lambda row: "" if row["val_top1"] is None else f"{100 * row['val_top1']:.2f}"),
    Column("images/s", lambda row: "" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}"),
    Column("ETA", lambda row: duration(row["eta_s"])),
    Column("try", lambda row: str(row["attempts"] or "")),
    Column("node", lambda row: row["node"] if row["job"] or row["node"] != HOST else "", side="<"),
    Column("job", lambda row: row["job"], side="<"),
)
SLURM_COLUMNS = ("node", "job")  # left out where empty
DISPENSABLE = ("job", "epoch", "try", "images/s", "step", "node", "ETA", "top-1 %")  # in this order, on a narrow screen
_WELL = ("pending", "missing", "paused", "done")
MATTERS = ("running", "failed", "broken", "lost", "uncertain", "interrupted", "cancelled", *_WELL)


def table_of(rows: list[dict[str, Any]], title: str, height: int | None = None, more: Sequence[str] = ()) -> StatusTable:
    """Rows of `row_of` as a table; below it a line for each reason to be as they are, and the lines `more`.

    If it must fit on a screen of `height` lines, what matters most now is shown.
    """
    reasons = _reasons(rows)
    if height is not None:
        most = max(1, height // 3)
        if len(reasons) > most:
            reasons = [*reasons[: most - 1], f"and {len(reasons) - most + 1} more reasons"]
        room = max(1, height - 4 - len(reasons) - len(more))
        if len(rows) > room:
            order = sorted(range(len(rows)), key=lambda index: (MATTERS.index(rows[index]["state"]), index))
            rows, title = [rows[index] for index in sorted(order[:room])], f"{title}; {room} of them:"
    return StatusTable(rows, title, [*reasons, *more], one_line_each=height is not None)


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    runs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["reason"]:
            text = f"{row['reason']}; {row['advice']}" if row.get("advice") else row["reason"]
            runs.setdefault((row["state"], text), []).append(row["run"])
    return [
        f"{first_of(runs[state, text])} {state}: {printable(text)}"
        for state, text in sorted(runs, key=lambda key: MATTERS.index(key[0]))
    ]


@dataclass(frozen=True)
class StatusTable:
    """For `Console.print`. rich's own table lays out every cell as a text by itself: a second for 1,000 runs."""

    rows: list[dict[str, Any]]
    title: str
    below: list[str]
    one_line_each: bool  # cut lines below that are longer than a line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment | Text]:
        """The lines, with the columns for which there is room."""
        columns = self._columns(options.max_width)
        bold = Style(bold=True)
        yield Segment(f"{self.title}\n", bold)
        yield Segment(" ".join(f"{column.name:{column.side}{width}}" for column, width, _ in columns).rstrip() + "\n", bold)
        yield Segment(" ".join("-" * width for _, width, _ in columns) + "\n")
        for index, row in enumerate(self.rows):
            cells = [f"{texts[index]:{column.side}{width}}" for column, width, texts in columns]
            yield Segment(f"{cells[0]} ")
            yield Segment(cells[1], STYLES.get(row["state"]))
            yield Segment(" ".join(["", *cells[2:]]).rstrip() + "\n")
        yield Segment("\n")
        for line in self.below:
            yield Text(line, no_wrap=self.one_line_each, overflow="ellipsis" if self.one_line_each else "fold")

    def _columns(self, width: int) -> list[tuple[Column, int, list[str]]]:
        """The columns that are shown, each with its width and its texts."""
        columns = []
        for column in COLUMNS:
            texts = [printable(column.text(row)) for row in self.rows]
            if column.name not in SLURM_COLUMNS or any(texts):
                columns.append((column, max(len(text) for text in [column.name, *texts]), texts))
        for name in DISPENSABLE:
            if sum(width for _, width, _ in columns) + len(columns) - 1 <= width:
                break
            columns = [entry for entry in columns if entry[0].name != name]
        return columns


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
    return by_count([state.state for state in states])


def by_count(states: Sequence[str]) -> str:
    """The same of names of states."""
    counts = Counter(states)
    parts = [f"{counts['done']} of {len(states)} done"]
    return ", ".join(parts + [f"{counts[name]} {name}" for name in STATES if name != "done" and counts[name]])


def held_out(states: Iterable[RunState]) -> list[str]:
    """A line for each data set whose accuracies are not of val."""
    parts = dict.fromkeys((state.run.dataset, state.run.config.evaluated_on) for state in states)
    return [f"{dataset}: evaluated on {part}, not on val" for dataset, part in parts if part != "val"]


class Watched(Protocol):
    """What is watched."""

    def states(self, reader: StateReader) -> list[RunState]:
        """The states of the moment."""

    def patience_s(self) -> float:
        """How long to wait, when the last run has ended, for others to join."""


def watch(
    watched: Watched,
    root: Path,
    name: str,
    console: Console,
    *,
    tell: Callable[[list[RunState]], object],
    more: Callable[[StateReader], list[str]],
) -> list[RunState]:
    """Show the table until no run is in progress or about to be; without a terminal, lines as they change.

    `tell` is called with the states at each look that SLURM has answered. What `more` says at each look is shown below.

    Returns the last states.
    """
    shown: list[str] = []
    last_live_s = -math.inf
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            reader = StateReader(root)
            states = watched.states(reader)
            warning = f" ({printable(reader.scheduler_error)})" if reader.scheduler_error else ""
            if not reader.scheduler_error:
                tell(states)
            title = "; ".join([f"{name}: {summary(states)}{warning}", *held_out(states)])
            if live is not None:
                below = [part for line in more(reader) for part in wrap(printable(line), console.width)]
                rows = [row_of(state, root) for state in states]
                live.update(table_of(rows, title, console.height - 1, below), refresh=True)
            else:
                said = [title, *stuck(states), *more(reader)]
                if new := [line for line in said if line not in shown]:
                    console.print("\n".join(new), markup=False, highlight=False, soft_wrap=True)
                shown = said
            if any(state.state in LIVE for state in states):
                last_live_s = time.monotonic()
            elif time.monotonic() >= last_live_s + watched.patience_s():
                return states
            time.sleep(pause_s(reader))


def stuck(states: list[RunState]) -> list[str]:
    """A line for each reason for which jobs wait that will not start by themselves."""
    said = [(state.run.label, advice(state.job)) for state in states if state.state == "pending"]
    return by_text((label, text) for label, text in said if needs_action(text))


def in_other_clusters(states: list[RunState]) -> list[str]:
    """A line for each SLURM cluster that has jobs of these runs and cannot be asked from here."""
    return by_text((state.run.label, state.reason) for state in states if state.cluster)


def ran_other_code(root: Path, states: Iterable[RunState]) -> list[str]:
    """A line for each change of the code between a submission and the last executions of its runs."""
    intents: dict[str, str] = {}
    said = []
    for state in states:
        with suppress(RunError):  # its state says what is damaged
            start = read_record(Start, state.attempt.start_json) if state.attempt else None
            if state.attempt is None or start is None or not start.code_version:
                continue
            claim = read_record(Claim, state.attempt.claim_json)
            folder = str(claim and claim.submission)
            if folder not in intents:
                intent = read_record(Intent, root / folder / "intent.json")
                intents[folder] = str(intent and intent.code_version)
            if start.code_version != intents[folder]:
                change = f"{intents[folder]} then, {start.code_version} when started; `submit --code snapshot` prevents that"
                said.append((state.run.label, f"ran other code than was submitted: {change}"))
    return by_text(said)


def by_text(said: Iterable[tuple[str, str]]) -> list[str]:
    """One line per text, with the first of the nodes or runs that it holds for."""
    labels: dict[str, list[str]] = {}
    for label, text in said:
        labels.setdefault(text, []).append(label)
    return [f"{first_of(its)}: {text}" for text, its in labels.items()]


def first_of(labels: Sequence[str], most: int = 1) -> str:
    """The first of some runs, and how many more there are."""
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if labels[most:] else "")


def pause_s(reader: StateReader) -> float:
    """How long to wait before the next look."""
    return REFRESH_SLURM_S if reader.asked_slurm else REFRESH_S
