"""`vitpa sweep watch`: its screen driven by keys over runs of the stand-in, a thousand rows, and without a terminal."""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from textual.pilot import Pilot
from textual.widgets import Input, Log, Sparkline, Static

from jobs.command import add_parser
from jobs.context import Context, load_context
from jobs.rounds import begin
from jobs.standing import Standing
from jobs.state import StateReader
from jobs.sweep import SweepDir
from jobs.watch.app import WatchApp
from jobs.watch.command import screen_of, watch_table
from jobs.watch.look import Look, groups_of, matching, sweep_eta_s, terms_of
from tests.support.jobs_sweeps import command, exits, launch, make_sweep, settle, write_result
from tests.support.repository import ROOT
from tests.support.search_sweeps import make_search
from tests.support.waiting import wait_for
from vitpa.cli import main

SIZE = (80, 24)


def row(name: str, seed: int, state: str = "pending", **values: Any) -> dict[str, Any]:
    """A run as `row_of` makes it."""
    return {
        "run": f"{name}-s{seed}", "cell": name, "signature": f"{name}{seed}", "dataset": "digits", "attention": "content",
        "seed": seed,
        "settings": {}, "state": state, "step": None, "steps_total": None, "epoch": None, "epochs": 10, "val_top1": None,
        "images_per_s": None, "eta_s": None, "attempts": 0, "node": "", "job": "", "reason": "", **values,
    }  # fmt: skip


def context(root: Path, *words: str) -> Context:
    """What a command line is about."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return load_context(parser.parse_args(["sweep", "watch", f"{root}/small.yaml", "--root", str(root), *words]))


def screen(root: Path, *words: str) -> WatchApp:
    """The screen that a command line opens."""
    return screen_of(context(root, *words))


def lines(app: WatchApp) -> list[str]:
    """The texts of the table, a line for each of its own."""
    return [" ".join(" ".join(map(str, app.table.get_row_at(y))).split()) for y in range(app.table.row_count)]


def text(app: WatchApp, name: str) -> str:
    return str(app.screen.query_one(f"#{name}", Static).render())


async def assert_in_time(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    """Wait for what the screen shows."""
    for _ in range(1200):
        if condition():
            return
        await pilot.pause(0.1)
    raise AssertionError(lines(pilot.app)[:20])  # type: ignore[arg-type]


def test_groups_words_and_time() -> None:
    rows = [
        row("a", 0, "done", val_top1=0.5, job="7_0"), row("b", 0, job="8_0", reason="Priority"),
        row("a", 1, "done", val_top1=0.6), row("a", 2, "running", epoch=4.0, eta_s=60.0, job="7_1", node="node3"),
    ]  # fmt: skip
    cells = groups_of(rows, "cells")
    assert [(each.name, each.states, each.top1, each.eta_s) for each in cells] == [
        ("a", "2/3 done", "55.00 ± 7.07", 60.0),
        ("b", "0/1 done", "", None),
    ]
    assert [(each.name, len(each.rows)) for each in groups_of(rows, "jobs")] == [
        ("job 7", 2), ("job 8", 1), ("no job in SLURM", 1),
    ]  # fmt: skip
    assert [each["run"] for each in matching(rows, " NODE3  running")] == ["a-s2"]
    assert [each["run"] for each in matching(rows, "priority")] == ["b-s0"]
    assert len(matching(rows, "")) == 4
    assert sweep_eta_s(rows) == pytest.approx((6 + 10) / (6 / 60))  # six epochs of one, ten of the one that waits
    assert sweep_eta_s(rows[:2]) is None
    said = Look(rows, "squeue: no answer").title("x")
    assert said == "x: 2 of 4 done, 1 running, 1 pending; done in about 3 min; squeue: no answer"
    with_axis = row("a", 0, settings={"optim.lr": "0.001"})
    assert terms_of([with_axis]) == ["dataset=digits", "attention=content", "optim.lr=0.001", "seed=0"]
    assert terms_of([with_axis, {**with_axis, "seed": 2}])[-1] == "seed=0,2", "a cell: its runs that are watched"


def test_a_name_that_is_cut_is_shown_below() -> None:
    ends = "-a_setting_with_a_long_label_of_its_own"
    rows = [row(f"digits-content-lr{rate}{ends}", 0) for rate in ("0.001", "0.002")]
    app = WatchApp("small", Path(), lambda: Look(rows, pause_s=1000), lambda verb, terms: [])

    async def drive() -> None:
        async with app.run_test(size=SIZE) as pilot:
            await assert_in_time(pilot, lambda: text(app, "whole") == f"digits-content-lr0.001{ends}")
            await pilot.press("down", "down", "down")
            await assert_in_time(pilot, lambda: text(app, "whole") == f"digits-content-lr0.002{ends}-s0")
            await pilot.resize_terminal(200, 50)
            await assert_in_time(pilot, lambda: not app.query_one("#whole").display)

    asyncio.run(drive())


def test_status_its_watch_and_the_screen_say_the_same_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_search(tmp_path, budget={"runs": 2}, trials_at_once=2)
    begin(sweep)
    SweepDir(tmp_path, "small").record(sweep)
    write_result(tmp_path, sweep.runs[0], epochs=9, val_top1=0.75)

    def said(*words: str) -> list[str]:
        assert main(["sweep", *words, "--root", str(tmp_path)]) == 4
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("search:", "best so far:"))]

    status = said("status", "small")
    assert status[0].startswith("search: in round 1; 2 trials: 1 finished, 1 in training; budget: 2.0 of 2 runs, 0.25 ")
    assert status[1].startswith("best so far: t000 75.00 % held-out top-1 (epoch 9 of 9, 1 run, 0.25 GPU-hours): augment.")
    assert said("status", "small", "--watch") == status
    assert said("status", "small", "trial=t001", "--watch") == status
    assert said("watch", "small") == status

    app = screen(tmp_path)

    async def drive() -> None:
        async with app.run_test(size=SIZE) as pilot:
            await assert_in_time(pilot, lambda: text(app, "search").splitlines() == status)
            whole = sum(math.ceil(len(line) / SIZE[0]) for line in status)
            await assert_in_time(pilot, lambda: app.query_one("#search").size.height >= whole)

    asyncio.run(drive())
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60, height=24)
    watch_table(replace(context(tmp_path), console=terminal), sweep.runs)
    assert isinstance(terminal.file, io.StringIO)
    assert " ".join(status) in " ".join(terminal.file.getvalue().split())


def test_watching_a_search_follows_its_ledger_and_outlives_a_damaged_one(tmp_path: Path) -> None:
    sweep = make_search(tmp_path, budget={"runs": 2}, trials_at_once=1)
    begin(sweep)
    SweepDir(tmp_path, "small").record(sweep)
    app = screen(tmp_path)
    assert app.look_again().search[0].startswith("search: in round 1; 1 trial: 1 in training")
    write_result(tmp_path, sweep.runs[0], epochs=9, val_top1=0.75)
    standing = Standing.now(sweep, StateReader(tmp_path).states, tmp_path)
    assert standing is not None
    standing.ledger.append(standing.next_round({}))
    assert app.look_again().search[0].startswith("search: in round 2; 2 trials: 1 finished, 1 in training")
    (SweepDir(tmp_path, "small").search / "0002.json").write_text("{")
    (said,) = app.look_again().search
    assert "0002.json: not valid JSON" in said


@pytest.mark.slow
def test_watching_a_search_shows_the_runs_of_its_later_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_search(tmp_path, budget={"runs": 3}, trials_at_once=1)
    (tmp_path / "hold").touch()
    with subprocess.Popen(command(tmp_path, 2, "submit", "--wait"), cwd=ROOT) as search:
        wait_for(lambda: any(tmp_path.glob("runs/*/attempts/0001/start.json")), poll_s=0.1)
        app = screen(tmp_path)
        assert len(app.look_again().rows) == 1
        released = threading.Timer(2.0, (tmp_path / "hold").unlink)
        released.start()
        assert main(["sweep", "status", f"{tmp_path}/small.yaml", "--root", str(tmp_path), "--watch"]) == 0
        released.join()
        assert search.wait(60) == 0
    assert "small: 3 of 3 done" in capsys.readouterr().out
    assert [each["state"] for each in app.look_again().rows] == ["done"] * 3


def test_what_is_not_shown_is_not_cancelled() -> None:
    rows = [row("a", 0, "running"), row("a", 1, "done", val_top1=0.5), row("a", 2, "running"), row("b", 0)]
    told: list[list[str]] = []

    def tell(verb: str, terms: Sequence[str]) -> list[str]:
        told.append([verb, *terms])
        return ["true"]

    app = WatchApp("small", Path(), lambda: Look(rows, pause_s=1000), tell)

    async def drive() -> None:
        async with app.run_test(size=SIZE) as pilot:
            await assert_in_time(pilot, lambda: app.table.row_count == 6)
            await pilot.press("slash", *"running", "enter", "home", "c")
            assert "cancel the 2 runs of a?" in str(app.screen.query_one(Static).render())
            await pilot.press("y")
            await assert_in_time(pilot, lambda: told)

    asyncio.run(drive())
    assert told == [["cancel", "dataset=digits", "attention=content", "seed=0,2"]]


@pytest.mark.slow
def test_find_read_cancel_and_retry(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, steps=5)
    (tmp_path / "hold").touch()
    launch(tmp_path, 4)
    app = screen(tmp_path)
    told = app.command("cancel", ["seed=0"])
    assert told == [sys.executable, "-m", "vitpa.cli", "sweep", "cancel", f"{tmp_path}/small.yaml", "--root", str(tmp_path),
                    "seed=0"]  # fmt: skip
    app.command = lambda verb, terms: command(tmp_path, 4, verb, *terms)

    async def drive() -> None:
        async with app.run_test(size=SIZE) as pilot:
            await assert_in_time(pilot, lambda: sum(" running 4.0/5 50.00" in line for line in lines(app)) == 4)
            assert lines(app)[0].startswith("digits-content 0/2 done")
            assert "small: 0 of 4 done, 4 running; done in about" in text(app, "title")
            await pilot.press("slash", *"ional s1")
            assert [line.split()[0] for line in lines(app)] == ["digits-positional", "digits-positional-s1"]
            await pilot.press("enter", "down", "l")
            await assert_in_time(pilot, lambda: "starts at 0" in list(app.screen.query_one(Log).lines))
            assert "digits-positional-s1, attempt 1: " in text(app, "name")
            await pilot.press("c", "y", "escape", "enter")
            await assert_in_time(pilot, lambda: "val/top1: 50.00 % at epoch 1" in text(app, "val-top1-text"))
            assert app.screen.query_one(Sparkline).data == [50.0] * 4
            await pilot.press("escape", "c", "n", "c", "y")
            await assert_in_time(pilot, lambda: "digits-positional-s1 cancelled 4.0/5 50.00" in lines(app))
            await assert_in_time(pilot, lambda: "1 asked to stop" in text(app, "said"))
            await pilot.press("escape")
            assert len(lines(app)) == 6
            assert app.chosen[0]["run"] == "digits-positional-s1", "the cursor stays on its run"
            await pilot.press("up", "up", "r", "y")  # the whole cell
            await assert_in_time(pilot, lambda: "submitted 1 of 4 runs" in text(app, "said"))
            (tmp_path / "hold").unlink()
            await assert_in_time(pilot, lambda: "4 of 4 done" in text(app, "title"))
            assert app.query_one("#filter", Input).value == ""
            await pilot.press("q")

    asyncio.run(drive())
    settle(tmp_path, sweep)
    assert exits(tmp_path, sweep) == [["done"], ["done"], ["done"], ["cancelled", "done"]]


def test_a_thousand_runs_are_drawn_within_a_second() -> None:
    states = ("running", "pending", "done", "failed")
    rows = [
        row(f"cifar10-content-lr{number // 5}", number % 5, states[number % 4], epoch=1.5, val_top1=0.5, eta_s=3.0)
        for number in range(1000)
    ]
    app = WatchApp("large", Path(), lambda: Look(rows, pause_s=1000), lambda verb, terms: [])
    hostile = row("evil[bold]\x1b[2J", 0, "failed", reason="\x1b]0;title\x07")

    async def drive() -> None:
        async with app.run_test(size=SIZE) as pilot:
            await assert_in_time(pilot, lambda: app.table.row_count == 1200)
            taken = []
            for seen in ([*rows, hostile], [{**each, "epoch": 2.5} for each in rows], rows):
                began_s = time.process_time()
                app.show(Look(seen))
                await pilot.pause()
                taken.append(time.process_time() - began_s)
                if seen[-1] is hostile:
                    assert lines(app)[-1] == "evil[bold]\\x1b[2J-s0 failed"
            print(f"1,000 runs drawn in {taken} s")
            assert max(taken) < 1
            await pilot.resize_terminal(200, 50)
            await assert_in_time(pilot, lambda: len(app.table.columns) == 9)

    asyncio.run(drive())


@pytest.mark.slow
def test_without_a_terminal_it_is_status_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sweep(tmp_path, seeds=1, steps=1)
    launch(tmp_path, 2)
    assert main(["sweep", "watch", f"{tmp_path}/small.yaml", "--root", str(tmp_path)]) == 0
    assert "small: 2 of 2 done" in capsys.readouterr().out
