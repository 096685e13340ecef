"""What a run says: a record that survives a kill, one curve in TensorBoard, few lines where nobody looks."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vitpa import logs
from vitpa.installation import CODE
from vitpa.logs import Logs, ProgressLine
from vitpa.metrics_file import last_evaluation, read_metrics
from vitpa.rundir import RunDir
from vitpa.terminal import LINES, logged_lines


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has a directory and no records."""
    run = RunDir(tmp_path, "0123456789abcdef")
    run.path.mkdir(parents=True)
    return run


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the progress line."""
    clock = Clock()
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=clock))
    return clock


def open_logs(
    run: RunDir, restored_step: int = 0, rows: str | None = None, *, not_before_s: float = 0.0, tensorboard: bool = False
) -> Logs:
    step = restored_step
    return Logs(run, restored_step=step, restored_rows=rows, not_before_s=not_before_s, tensorboard=tensorboard)


def board(run: RunDir) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard)).Reload()


def test_rows_are_read_as_written(run: RunDir) -> None:
    assert read_metrics(run.metrics_jsonl) == []
    with open_logs(run) as log:
        assert read_metrics(run.metrics_jsonl) == []
        log.row(1, 1 / 3, {"train/loss": 2.5})
        assert len(read_metrics(run.metrics_jsonl)) == 1  # at once, not when the run ends
        log.row(2, 2 / 3, {"val/top1": 0.5, "val/loss": 1.0})
    assert read_metrics(run.metrics_jsonl) == [
        {"step": 1, "epoch": 0.3333, "train/loss": 2.5},
        {"step": 2, "epoch": 0.6667, "val/top1": 0.5, "val/loss": 1.0},
    ]


@pytest.mark.parametrize("length", range(30))
def test_a_half_written_last_line_is_ignored_wherever_it_was_cut(run: RunDir, length: int) -> None:
    line = json.dumps({"step": 2, "train/loss": 2.25, "x": 1}) + "\n"
    assert length < len(line)
    run.metrics_jsonl.write_text('{"step": 1}\n' + line[:length])
    assert read_metrics(run.metrics_jsonl) == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_warned_about_and_the_others_kept(run: RunDir, warned: Callable[[str], str]) -> None:
    run.metrics_jsonl.write_text('{"step": 1}\n{"st\x00\x00ep": 2}\n[3]\n{"epoch": 1}\n{"step": 5}\n')
    assert read_metrics(run.metrics_jsonl) == [{"step": 1}, {"step": 5}]
    told = warned(r"metrics.jsonl: line [234] is damaged and left out")
    assert told.count("\n") == 3


def test_after_a_resume_the_rows_beyond_the_restored_step_are_gone(run: RunDir) -> None:
    with open_logs(run) as log:
        for step in range(1, 7):
            log.row(step, step / 10, {"train/loss": float(step)})
        log.row(6, 0.6, {"val/top1": 0.5})
    with run.metrics_jsonl.open("a") as file:
        file.write('{"step": 7, "tra')  # killed here
    with open_logs(run, restored_step=4) as log:
        assert [row["step"] for row in read_metrics(run.metrics_jsonl)] == [1, 2, 3, 4]
        log.row(5, 0.5, {"train/loss": -5.0})
    found = [(row["step"], row["train/loss"]) for row in read_metrics(run.metrics_jsonl)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, -5.0)]
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_one_curve_over_a_resume(run: RunDir) -> None:
    with open_logs(run, tensorboard=True) as log:
        for step in range(1, 7):
            log.row(step, step / 10, {"train/loss": float(step)})
        log.flush()
    with open_logs(run, restored_step=4, tensorboard=True) as log:
        log.row(5, 0.5, {"train/loss": -5.0})
    events = [(event.step, event.value) for event in board(run).Scalars("train/loss")]
    assert events == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, -5.0)]


def names_of_board(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.tensorboard.iterdir())


@pytest.mark.parametrize("ahead_s", [0, 1, 3 * 3600])
def test_an_event_file_sorts_after_those_that_are_there(run: RunDir, ahead_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run.tensorboard.mkdir()
    there = f"events.out.tfevents.{int(time.time()) + ahead_s}.zzz.1.0"
    (run.tensorboard / there).write_bytes(b"")
    (run.tensorboard / "events.out.tfevents.x").write_bytes(b"")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    open_logs(run, tensorboard=True).__exit__(None, None, None)
    assert names_of_board(run).index(there) == 0 and names_of_board(run)[1].startswith("events.out.tfevents.1")


def test_with_the_clock_put_back_no_point_is_lost_and_no_time_goes_back(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(log: Logs, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.row(step, step / 10, {"train/loss": float(step)})

    with open_logs(run, tensorboard=True) as log:
        steps(log, 1, 20)
        rows, wall_time_s = log.rows, log.wall_time_s
        steps(log, 21, 25)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3 * 3600)
    with open_logs(run, 20, rows, not_before_s=wall_time_s, tensorboard=True) as log:
        steps(log, 21, 25)
        monkeypatch.setattr(time, "time", lambda: real() - 4 * 3600)  # once more, while it trains
        steps(log, 26, 31)
    events = board(run).Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 32))
    times = [event.wall_time for event in events]
    assert times == sorted(times)
    assert times[0] > real() - 60


def test_hparams_land_in_the_runs_own_folder(run: RunDir) -> None:
    parameters: dict[str, Any] = {"seed": 3, "optim.lr": 1e-3, "augment.hflip": True, "optim.grad_clip_norm": None}
    with open_logs(run, tensorboard=True) as log:
        log.hparams({**parameters, "optim": {"betas": [0.9, 0.999]}}, {"val/top1": 0.0})
    assert all(path.is_file() for path in run.tensorboard.iterdir())  # add_hparams makes a folder of its own
    assert len(list(run.tensorboard.iterdir())) == 1
    tags = board(run).summary_metadata
    start = HParamsPluginData.FromString(tags["_hparams_/session_start_info"].plugin_data.content).session_start_info
    assert start.hparams["seed"].number_value == 3
    assert start.hparams["optim.lr"].number_value == 1e-3
    assert start.hparams["augment.hflip"].number_value == 1  # torch writes a bool as a number
    assert start.hparams["optim.grad_clip_norm"].string_value == "None"
    assert start.hparams["optim.betas"].string_value == "[0.9, 0.999]"
    experiment = HParamsPluginData.FromString(tags["_hparams_/experiment"].plugin_data.content).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["val/top1"]
    assert {info.name for info in experiment.hparam_infos} == {*parameters, "optim.betas"}


def test_images_appear_at_their_step(run: RunDir) -> None:
    with open_logs(run, tensorboard=True) as log:
        log.image("augmented", torch.zeros(3, 8, 6, dtype=torch.uint8), 7)
    (event,) = board(run).Images("augmented")
    assert (event.step, event.width, event.height) == (7, 6, 8)


def test_without_tensorboard_nothing_is_written_for_it(run: RunDir) -> None:
    with open_logs(run) as log:
        log.row(1, 0.1, {"train/loss": 1.0})
        log.image("augmented", torch.zeros(3, 8, 8), 0)
        log.hparams({"seed": 0}, {"val/top1": 0.0})
        log.flush()
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


def test_plain_lines_come_every_ten_seconds_at_most(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    said_at = []
    with logged_lines(), ProgressLine("digits-content-s0", 1000, 0) as line:
        line.metrics({"train/loss": 2.3456, "val/top1": 0.5, "perf/images_per_s": 12345.6})
        for step in range(1, 601):
            clock.now_s += 0.1
            line.move(step)
            if capsys.readouterr().err:
                said_at.append(clock.now_s)
    assert len(said_at) in (5, 6)  # 60 seconds
    assert min(later - earlier for earlier, later in pairwise(said_at)) >= logs.PLAIN_LINE_EVERY_S == 10
    assert capsys.readouterr().err == ""


def test_a_plain_line_says_how_far_how_good_how_fast_and_how_long_yet(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ProgressLine("digits-content-s0", 1000, 400)  # resumed at step 400
    line.move(400)
    clock.now_s += 20
    line.metrics({"train/loss": 2.3456})
    line.metrics({"val/top1": 0.5, "perf/images_per_s": 12345.6})
    with logged_lines():
        line.move(500)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "digits-content-s0: step 500/1000 loss 2.346  val top-1 50.00 %  12,346 images/s 100 s left\n"
    held_out = ProgressLine("digits-content-s0", 1000, 400, "held-out top-1")
    clock.now_s += 20
    held_out.metrics({"val/top1": 0.5})
    with logged_lines():
        held_out.move(500)
    assert capsys.readouterr().err == "digits-content-s0: step 500/1000 held-out top-1 50.00 % 100 s left\n"


def test_the_time_left_counts_steps_by_their_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work(step: int) -> float:  # the last 100 of 1,000 steps take ten times as long as the others
        return step / 10 + 0.9 * max(0, step - 900)

    line = ProgressLine("photos-content-s0", 1000, 400, work=work)
    clock.now_s += 20
    with logged_lines():
        line.move(600)
    assert capsys.readouterr().err == "photos-content-s0: step 600/1000  130 s left\n"


def test_what_is_logged_stays_and_does_not_wait(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with logged_lines(), ProgressLine("digits-content-s0", 1000, 0):
        logs.LOGGER.info("starts [here]")
        logs.LOGGER.info("goes on")
    assert capsys.readouterr().err == "starts [here]\ngoes on\n"


class Terminal(io.StringIO):
    """Standard error where a person looks."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    said = f"resumed in /data/[old]/:key:/{200 * 'x'}"  # no markup, no emoji, no line break
    with logged_lines(), ProgressLine("digits-content-s0", 1000, 0) as line:
        line.metrics({"train/loss": 2.3456})
        line.move(250)
        logs.LOGGER.info(said)
        logs.LOGGER.warning(said)
    shown = terminal.getvalue()
    assert "25%" in shown
    assert "loss 2.346" in shown
    assert f"{said}\n" in shown and f"warning: {said}\n" in shown
    assert LINES.print_above is None


def test_a_pipe_in_the_place_of_the_record_is_an_error_and_no_wait(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0" * 16)
    run.path.mkdir(parents=True)
    os.mkfifo(run.metrics_jsonl)
    with pytest.raises(OSError, match="not a regular file"):
        logs._warn_if_others(run, 1, "")


@pytest.mark.parametrize("filters", ["ignore", "error"])
def test_what_the_user_must_know_does_not_depend_on_filters_of_warnings(run: RunDir, filters: str) -> None:
    """By PYTHONWARNINGS such lines could be switched off, or turned into a traceback."""
    run.metrics_jsonl.write_text('{"step": 1}\n[3]\n{"step": 5}\n')
    program = (
        "import sys, pathlib, vitpa.metrics_file, vitpa.terminal\n"
        "with vitpa.terminal.printable_output():\n"
        "    print(len(vitpa.metrics_file.read_metrics(pathlib.Path(sys.argv[1]))))"
    )
    got = subprocess.run(
        [sys.executable, "-c", program, str(run.metrics_jsonl)],
        env={**os.environ, "PYTHONWARNINGS": filters},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (got.returncode, got.stdout) == (0, "2\n")
    assert got.stderr == f"warning: {run.metrics_jsonl}: line 2 is damaged and left out\n"


def test_nothing_tells_the_user_by_python_warnings() -> None:
    """They can be filtered, and are shown once only; `LOGGER.warning` is for the user."""
    sources = [path for room in ("vitpa", "jobs", "data_prep", "slurm") for path in (CODE / room).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if re.search(r"warnings\.warn|import warn$", path.read_text())] == []


def test_a_metrics_file_that_is_too_large_to_be_one_is_an_error_of_one_line(run: RunDir) -> None:
    run.metrics_jsonl.touch()
    os.truncate(run.metrics_jsonl, 1 << 40)
    with pytest.raises(OSError, match="larger than 1,073,741,824 bytes") as raised:
        read_metrics(run.metrics_jsonl)
    assert raised.value.filename == str(run.metrics_jsonl)
    assert last_evaluation(run.metrics_jsonl) is None
