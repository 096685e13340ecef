"""The table of a sweep: what it shows of each run, and how it fits a screen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.report.status import HOST, Progress, eta_s, pause_s, progress_of, row_of, table_of
from jobs.state import RunState, StateReader
from jobs.sweep import Run
from tests.support.jobs_sweeps import make_sweep
from vitpa.config_file import load_config, shipped_configs
from vitpa.flops import size_share
from vitpa.records import ProcessId, write_json
from vitpa.rundir import AttemptDir

ME = ProcessId.mine().model_dump()


def printed(rows: list[dict[str, Any]], width: int, height: int | None = None, *, terminal: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    console.print(table_of(rows, "title", height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def row(**values: Any) -> dict[str, Any]:
    return {
        "run": "cifar10-positional-s3",
        "state": "running",
        "step": 12345,
        "steps_total": 117300,
        "epoch": 31.5,
        "epochs": 300,
        "val_top1": 0.9123,
        "images_per_s": 12345.6,
        "eta_s": 3000.0,
        "attempts": 2,
        "node": "node7",
        "job": "1234_5",
        "reason": "",
        **values,
    }


def test_what_is_left_counts_images_by_their_arithmetic() -> None:
    config = load_config(shipped_configs()["imagenet"], ["train.image_sizes=[[0,96],[100,160],[200,224]]"])
    at_100 = Progress(step=100_000, steps_total=300_000, images_per_s=5000.0)  # measured with images of 96 px
    small, medium = (size_share(config, epoch) for epoch in (0, 100))
    full_size = 100_000 * 1024 * (medium + 1)
    assert eta_s(config, at_100, 300) == pytest.approx(full_size / (5000 * small), abs=0.1)
    assert eta_s(config, at_100, 100) == 0
    assert eta_s(config, Progress(step=1, steps_total=300_000), 300) is None


def claimed(root: Path, run: Run, start: dict[str, Any] | None = None) -> AttemptDir:
    attempt = run.directory(root).claim_attempt(1, {"process": ME})
    assert attempt is not None
    if start is not None:
        write_json(attempt.start_json, {"process": ME, **start})
    return attempt


@pytest.mark.parametrize(
    ("start", "node"),
    [
        ({"host": "here"}, "here"),
        ({"host": "here", "nodes": "node[1-2]"}, "node[1-2]"),
        ({"host": "here", "nodes": ["node1", "node2"]}, "node1,node2"),
        ({}, ""),
    ],
)
def test_node_of_a_running_attempt(tmp_path: Path, start: dict[str, Any], node: str) -> None:
    run = make_sweep(tmp_path, seeds=1).runs[0]
    claimed(tmp_path, run, start)
    assert row_of(StateReader(tmp_path).state(run), tmp_path)["node"] == node


def test_job_and_a_damaged_start(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1).runs[0]
    attempt = claimed(tmp_path, run)
    attempt.start_json.write_text("{")
    document = row_of(RunState(run, "running", attempt=attempt, job_id="1234_5"), tmp_path)
    assert (document["job"], document["node"]) == ("1234_5", "")


def test_everything_is_shown_where_there_is_room() -> None:
    lines = printed([row(), row(run="b", state="pending", reason="pending in SLURM: Priority", job="7", node="")], 160)
    assert lines[1].split() == ["run", "state", "step", "epoch", "top-1", "%", "images/s", "ETA", "try", "node", "job"]
    shown = ["cifar10-positional-s3", "running", "12345/117300", "31.5/300", "91.23", "12,346", "50", "min", "2", "node7"]
    assert lines[3].split() == [*shown, "1234_5"]
    assert lines[-1] == "b pending: pending in SLURM: Priority"


def test_80_columns_lose_the_least_important() -> None:
    lines = printed([row()], 80)
    assert lines[1].split() == ["run", "state", "step", "top-1", "%", "images/s", "ETA", "try", "node"]
    assert max(map(len, lines)) <= 80
    assert lines[3].endswith("node7")


def test_node_and_job_only_where_they_say_something() -> None:
    header = printed([row(node=HOST, job=""), row(node="", job="")], 160)[1]
    assert "node" not in header
    assert "job" not in header


def test_a_screen_shows_what_matters_most() -> None:
    rows = [row(run=f"run{number}", state="done") for number in range(50)]
    rows[7]["state"], rows[8]["state"], rows[30]["state"] = "failed", "pending", "running"
    for number in range(40, 50):
        rows[number] |= {"state": "lost", "reason": f"its job {number} was killed"}
    lines = printed(rows, 80, 12)
    assert len(lines) == 12
    assert lines[0] == "title; 4 of them:"
    assert [line.split()[0] for line in lines[3:7]] == ["run7", "run30", "run40", "run41"]
    assert lines[-4:] == [*(f"run{n} lost: its job {n} was killed" for n in (40, 41, 42)), "and 7 more reasons"]


def test_a_long_reason_is_one_line_on_a_screen_and_whole_elsewhere() -> None:
    rows = [row(state="failed", reason="word " * 60 + "end")]
    assert len(printed(rows, 80, 24)) == 6
    assert " ".join(printed(rows, 80)[5:]).endswith("word end")


def test_states_have_colours_on_a_terminal() -> None:
    assert "\x1b[31mfailed\x1b[0m" in "\n".join(printed([row(state="failed")], 160, terminal=True))


def test_runs_that_agree_share_a_line() -> None:
    rows = [row(run=f"run{number}", state="pending", reason="Resources") for number in range(3)]
    assert printed(rows, 80)[-1] == "run0 and 2 more pending: Resources"


def test_progress_is_the_last_of_each_metric(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1).runs[0]
    claimed(tmp_path, run, {})
    rows = ['{"step": 1, "val/top1": 0.1}', '{"step": 2, "epoch": 1.0, "val/top1": 0.2}', "[3]", '{"step": 3, "perf/x": 1}']
    run.directory(tmp_path).metrics_jsonl.write_text("\n".join([*rows, '{"step": 4, "ep']))
    progress = progress_of(StateReader(tmp_path).state(run), tmp_path)
    assert (progress.step, progress.epoch, progress.val_top1, progress.images_per_s) == (3, 1.0, 0.2, None)


def test_the_progress_of_a_run_that_averages_its_weights_is_of_the_average(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1, overrides={"train.ema_decay": 0.9}).runs[0]
    claimed(tmp_path, run, {})
    run.directory(tmp_path).metrics_jsonl.write_text('{"step": 1, "val/top1": 0.1, "ema_val/top1": 0.3}\n')
    assert progress_of(StateReader(tmp_path).state(run), tmp_path).val_top1 == 0.3


def test_slurm_is_not_asked_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = StateReader(tmp_path)
    assert pause_s(survey) <= 1
    monkeypatch.setattr(StateReader, "asked_slurm", True)
    assert pause_s(survey) >= 5
