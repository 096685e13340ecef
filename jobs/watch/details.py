"""What a key opens over the table: a run's curve, its log, and the question whether to cancel or retry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Log, Sparkline, Static

from jobs.report.logs import tail
from vitpa.metrics_file import read_metrics
from vitpa.rundir import RunDir
from vitpa.terminal import printable

REFRESH_S = 1.0
LOG_LINES = 1000
CURVES = {"val/top1": 100.0, "ema_val/top1": 100.0, "train/loss": 1.0}  # metrics, and what they are multiplied with


class RunScreen(Screen[None]):
    """Something of one run, read again every second until the user goes back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "back"),
        Binding("q", "app.pop_screen", "back", show=False),
    ]
    CSS = "#name { text-style: bold; }"

    def __init__(self, label: str, directory: RunDir) -> None:
        super().__init__()
        self.label, self.directory = label, directory

    def on_mount(self) -> None:
        """Draw, again and again."""
        self.draw()
        self.set_interval(REFRESH_S, self.draw)

    def draw(self) -> None:
        """Read and show what is new."""
        raise NotImplementedError


class CurveScreen(RunScreen):
    """Accuracy and loss of a run over its epochs."""

    CSS = RunScreen.CSS + "Sparkline { height: 1fr; margin: 0 0 1 0; }"

    def compose(self) -> ComposeResult:
        """A line and a curve for each metric."""
        yield Static(printable(self.label), id="name", markup=False)
        for name in CURVES:
            yield Static("", id=_id(name, "text"), markup=False)
            yield Sparkline([], id=_id(name, "curve"), summary_function=_mean)
        yield Footer()

    def draw(self) -> None:
        """Read the run's metrics and draw them."""
        try:
            rows, problem = read_metrics(self.directory.metrics_jsonl), ""
        except OSError as error:
            rows, problem = [], f"{self.directory.metrics_jsonl}: cannot be read ({error.strerror})"
        for name, factor in CURVES.items():
            points = [(row.get("epoch"), factor * row[name]) for row in rows if isinstance(row.get(name), int | float)]
            text, curve = self.query_one(f"#{_id(name, 'text')}", Static), self.query_one(f"#{_id(name, 'curve')}", Sparkline)
            curve.display = text.display = bool(points) or name == "val/top1"
            text.update(problem or _described(name, points))
            curve.data = [value for _, value in points]


class LogScreen(RunScreen):
    """The end of the log of a run's last attempt, as it grows."""

    def __init__(self, label: str, directory: RunDir) -> None:
        super().__init__(label, directory)
        self._shown: list[str] = []

    def compose(self) -> ComposeResult:
        """The path and the lines."""
        yield Static(printable(self.label), id="name", markup=False)
        yield Log(max_lines=LOG_LINES)
        yield Footer()

    def on_mount(self) -> None:
        """As of every run's, with the keys that scroll."""
        self.query_one(Log).focus()
        super().on_mount()

    def draw(self) -> None:
        """Show what is new."""
        last = next(reversed(self.directory.attempts()), None)
        lines = ["it has not been started"] if last is None else [printable(line) for line in tail(last.log, LOG_LINES)]
        if last is not None:
            self.query_one("#name", Static).update(printable(f"{self.label}, attempt {last.number}: {last.log}"))
        log, before = self.query_one(Log), self._shown
        if lines == before:
            return
        if lines[: len(before)] == before:
            log.write_lines(lines[len(before) :])
        else:
            log.clear()
            log.write_lines(lines)
        self._shown = lines


class ConfirmScreen(ModalScreen[bool]):
    """A question that y answers with yes, and any other key with no."""

    CSS = """
    ConfirmScreen { align: center middle; }
    Static { width: auto; max-width: 90%; height: auto; border: round $accent; padding: 0 2; background: $surface; }
    """

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        """The question."""
        yield Static(f"{printable(self.question)}  y: yes, any other key: no", markup=False)

    def on_key(self, event: Any) -> None:
        """The answer."""
        event.stop()
        self.dismiss(event.key == "y")


def _described(name: str, points: Sequence[tuple[Any, float]]) -> str:
    """A metric in words: its first, best and last value."""
    if not points:
        return f"{name}: no value yet"
    best = (min if name.endswith("loss") else max)(points, key=lambda point: point[1])
    unit, form = ("", ".3f") if name.endswith("loss") else (" %", ".2f")
    at = [f"{value:{form}}{unit} at epoch {epoch:g}" if epoch is not None else f"{value:{form}}{unit}" for epoch, value in
          (points[0], best, points[-1])]  # fmt: skip
    return f"{name}: {at[0]}, best {at[1]}, last {at[2]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _id(name: str, part: str) -> str:
    return f"{name.replace('/', '-')}-{part}"
