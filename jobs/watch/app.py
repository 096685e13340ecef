"""The screen of `vitpa sweep watch`: the table of runs in groups, with keys for a run's curve and log, to cancel and retry."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable, Footer, Input, Static
from textual.worker import get_current_worker

from jobs.report.status import STYLES, duration
from jobs.watch.details import ConfirmScreen, CurveScreen, LogScreen, RunScreen
from jobs.watch.look import Group, Grouping, Look, Row, groups_of, matching, terms_of
from vitpa.rundir import RunDir
from vitpa.terminal import printable

COLUMNS = {"run": 30, "state": 12, "epoch": 9, "top-1 %": 13, "ETA": 7}  # widths, for a screen of 80 columns; `run` grows
WIDE_COLUMNS = {"images/s": 9, "try": 3, "node": 16, "job": 12}  # where there is room, in this order
GROUP = "group "  # before the name of a group, in the key of its line


class RunTable(DataTable[Text]):
    """The table, whose columns follow the width of the screen."""

    class Resized(Message):
        """The table has another width."""

    def on_resize(self) -> None:
        """Tell the application."""
        self.post_message(self.Resized())


class WatchApp(App[None]):
    """A sweep's runs, looked at again and again."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { height: 1; text-style: bold; }
    #search { height: auto; max-height: 6; }
    #whole { height: auto; max-height: 3; text-style: italic; }
    #said { height: auto; max-height: 3; }
    DataTable { height: 1fr; }
    #filter { height: 1; border: none; padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("enter", "curve", "curve", priority=False),
        Binding("l", "log", "log"),
        Binding("c", "act('cancel')", "cancel"),
        Binding("r", "act('retry')", "retry"),
        Binding("j", "group", "by cell/job"),
        Binding("q", "quit", "quit"),
        Binding("escape", "clear_filter", "all", show=False),
    ]

    def __init__(
        self, name: str, root: Path, look: Callable[[], Look], command: Callable[[str, Sequence[str]], list[str]]
    ) -> None:
        """`look` looks at the runs, in a thread of its own; `command` is the command line of a verb with filters."""
        super().__init__()
        self.sweep_name, self.root, self.look_again, self.command = name, root, look, command
        self.now: Look | None = None
        self.grouping: Grouping = "cells"
        self._keys: list[str] = []  # of the lines of the table
        self._columns: dict[str, int] = {}

    # --- what is on the screen

    def compose(self) -> ComposeResult:
        """The parts, from top to bottom."""
        yield Static(f"{self.sweep_name}: looking", id="title", markup=False)
        yield Static("", id="search", markup=False)
        table = RunTable(cursor_type="row")
        table.cell_padding = 0
        yield table
        yield Static("", id="whole", markup=False)
        yield Static("", id="said", markup=False)
        found = Input(placeholder="words that a run's name, state, node, job or reason has; Enter keeps, Escape shows all")
        found.id, found.display = "filter", False
        yield found
        yield Footer()

    @property
    def table(self) -> RunTable:
        """The runs."""
        return self.query_one(RunTable)

    @property
    def typed(self) -> str:
        """The words of the filter."""
        return self.query_one("#filter", Input).value

    def on_mount(self) -> None:
        """Begin to look."""
        self.table.focus()
        self.keep_looking()

    @work(thread=True, exclusive=True, group="look")
    def keep_looking(self) -> None:
        """Look, and show what was seen, until the screen is closed."""
        worker, next_s = get_current_worker(), time.monotonic()
        while not worker.is_cancelled:
            if time.monotonic() < next_s:
                time.sleep(0.1)  # a longer one would keep the screen from closing
                continue
            seen = self.look_again()
            if worker.is_cancelled:
                return
            self.call_from_thread(self.show, seen)
            next_s = time.monotonic() + seen.pause_s

    def show(self, seen: Look) -> None:
        """Show what was seen."""
        self.now = seen
        self.query_one("#title", Static).update(printable(seen.title(self.sweep_name)))
        search = self.query_one("#search", Static)
        search.display = bool(seen.search)
        search.update(printable("\n".join(seen.search), keep="\n"))
        self.draw()

    def draw(self) -> None:
        """Bring the table up to date; the cursor stays on its run."""
        if self.now is None:
            return
        columns = columns_of(self.size.width)
        lines: dict[str, list[Text]] = {}
        for group in self.groups:
            lines[GROUP + group.name] = _group_line(group, columns)
            lines |= {row["signature"]: _run_line(row, columns) for row in group.rows}
        table, keys = self.table, list(lines)
        if (keys, columns) == (self._keys, self._columns):
            for y, cells in enumerate(lines.values()):
                for x, cell in enumerate(cells):
                    if table.get_cell_at(Coordinate(y, x)) != cell:
                        table.update_cell_at(Coordinate(y, x), cell)
            return
        under_cursor = self._under_cursor()
        table.clear(columns=True)
        for name, width in columns.items():
            table.add_column(name, width=width, key=name)
        for key, cells in lines.items():
            table.add_row(*cells, key=key)
        self._keys, self._columns = keys, columns
        if under_cursor in lines:
            table.move_cursor(row=keys.index(under_cursor))

    @property
    def groups(self) -> list[Group]:
        """What the typed words leave."""
        return groups_of(matching(self.now.rows, self.typed), self.grouping) if self.now is not None else []

    def _under_cursor(self) -> str:
        row = self.table.cursor_row
        return self._keys[row] if 0 <= row < len(self._keys) else ""

    @property
    def chosen(self) -> list[Row]:
        """The run under the cursor, or those runs of the group there that are shown."""
        key = self._under_cursor()
        if key.startswith(GROUP):
            return next((list(group.rows) for group in self.groups if GROUP + group.name == key), [])
        return [row for group in self.groups for row in group.rows if row["signature"] == key]

    def say(self, text: str) -> None:
        """Say something below the table."""
        self.query_one("#said", Static).update(printable(text, keep="\n"))

    def on_run_table_resized(self) -> None:
        """Lay the columns out again."""
        self.draw()

    # --- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key does something now: over a curve or a log only their own do."""
        return len(self.screen_stack) == 1 or not hasattr(self, f"action_{action}") or action == "pop_screen"

    def action_filter(self) -> None:
        """Type words to find runs by."""
        found = self.query_one("#filter", Input)
        found.display = True
        found.focus()

    def on_input_changed(self) -> None:
        """Show what the words leave, as they are typed."""
        self.draw()

    def on_input_submitted(self) -> None:
        """Back to the table, with what the words leave."""
        self.query_one("#filter", Input).display = bool(self.typed)
        self.table.focus()

    def action_clear_filter(self) -> None:
        """All runs."""
        found = self.query_one("#filter", Input)
        found.value, found.display = "", False
        self.table.focus()

    def action_group(self) -> None:
        """By cells of the sweep, or by jobs of SLURM."""
        self.grouping = "jobs" if self.grouping == "cells" else "cells"
        self.draw()

    def on_data_table_row_highlighted(self) -> None:
        """Below the table the whole name of the line under the cursor, where the table cuts it: others may end alike."""
        key = self._under_cursor()
        name = key.removeprefix(GROUP) if key.startswith(GROUP) else next((f"  {row['run']}" for row in self.chosen), "")
        cut = len(printable(name)) >= self._columns.get("run", 0)
        whole = self.query_one("#whole", Static)
        whole.display = cut
        whole.update(printable(name.strip()) if cut else "")

    def on_data_table_row_selected(self) -> None:
        """Enter: the curve of the run under the cursor."""
        self.action_curve()

    def action_curve(self) -> None:
        """The curve of the run under the cursor."""
        self._open(CurveScreen, "curve")

    def action_log(self) -> None:
        """The log of the run under the cursor."""
        self._open(LogScreen, "log")

    def _open(self, screen: type[RunScreen], what: str) -> None:
        if len(self.chosen) == 1:
            self.push_screen(screen(self.chosen[0]["run"], RunDir(self.root, self.chosen[0]["signature"])))
        else:
            self.say(f"a {what} is of one run: move to one")

    def action_act(self, verb: str) -> None:
        """Cancel or retry what is under the cursor, once confirmed."""
        rows = self.chosen
        if not rows:
            return
        whole = len(rows) > 1 or self._under_cursor().startswith(GROUP)
        if whole and self.grouping != "cells":
            self.say(f"{verb}: move to a run, or group by cells (j)")
            return
        terms = terms_of(rows)
        what = (
            f"the {len(rows)} {'run' if len(rows) == 1 else 'runs'} of {self._under_cursor().removeprefix(GROUP)}"
            if whole
            else rows[0]["run"]
        )

        def confirmed(yes: bool | None) -> None:
            if yes:
                self.say(f"{verb} {' '.join(terms)} ...")
                self.carry_out(verb, terms)

        self.push_screen(ConfirmScreen(f"{verb} {what}?"), confirmed)

    @work(thread=True, group="act")
    def carry_out(self, verb: str, terms: Sequence[str]) -> None:
        """Run `vitpa sweep VERB` for these runs, and show what it says."""
        done = subprocess.run(self.command(verb, terms), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        next_words = said.index("next:") if "next:" in said else len(said)  # commands that this screen makes needless
        self.call_from_thread(self.say, "\n".join(said[:next_words][-3:]) or f"{verb}: exit code {done.returncode}")


def columns_of(width: int) -> dict[str, int]:
    """The columns for which a screen has room, with their widths, a space between them included."""
    columns = {name: its + 1 for name, its in COLUMNS.items()}
    for name, its in WIDE_COLUMNS.items():
        if sum(columns.values()) + its + 1 > width:
            break
        columns[name] = its + 1
    columns["run"] += max(0, width - 2 - sum(columns.values()))
    return columns


def _group_line(group: Group, columns: dict[str, int]) -> list[Text]:
    texts = {"run": group.name, "state": group.states, "top-1 %": group.top1, "ETA": duration(group.eta_s)}
    return [Text(_cut(texts.get(name, ""), width), style="bold") for name, width in columns.items()]


def _run_line(row: Row, columns: dict[str, int]) -> list[Text]:
    texts: dict[str, Any] = {
        "run": f"  {row['run']}",
        "state": row["state"],
        "epoch": "" if row["epoch"] is None else f"{row['epoch']:.1f}/{row['epochs']}",
        "top-1 %": "" if row["val_top1"] is None else f"{100 * row['val_top1']:.2f}",
        "ETA": duration(row["eta_s"]),
        "images/s": "" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
        "try": str(row["attempts"] or ""),
        "node": row["node"],
        "job": row["job"],
    }
    styles = {"state": STYLES.get(row["state"])}
    return [Text(_cut(texts[name], width), style=styles.get(name) or "") for name, width in columns.items()]


def _cut(text: str, width: int) -> str:
    """A printable text of at most `width` columns, one of them a space; of a long name the end tells runs apart."""
    text = printable(text)
    return text if len(text) < width else "…" + text[len(text) - width + 2 :]
