"""Where the time of runs went: trained for real, stopped, killed; what is shown of it; records of earlier versions."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.report.goodput import Goodput
from jobs.sweep import Run, SweepDir
from tests.support.report_sweeps import finished_sweep
from tests.support.trainings import arguments, config_of, start, wait_until
from vitpa.cli import main as vitpa
from vitpa.metrics_file import read_metrics
from vitpa.records import ProcessId, read_json, read_record, write_json
from vitpa.rundir import RunDir
from vitpa.seconds import PARTS, Seconds
from vitpa.train_command import main


def recorded(run: RunDir) -> list[Seconds]:
    found = [read_record(Seconds, attempt.seconds_json) for attempt in run.attempts()]
    assert None not in found
    return [each for each in found if each is not None]


def test_the_parts_of_a_stopped_and_resumed_run_are_its_time(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "runtime.tensorboard=true")
    run = config_of(words).run_dir
    assert main([*words, "runtime.stop_after_epoch=2"]) == 0
    assert main(words) == 0
    durations = [(read_json(attempt.exit_json) or {})["duration_s"] for attempt in run.attempts()]
    for seconds, duration_s in zip(recorded(run), durations, strict=True):
        assert seconds.wall_s <= duration_s
        assert seconds.wall_s == pytest.approx(duration_s, abs=0.5)  # the end of the process is after it
        assert (seconds.lost_steps, seconds.lost_s) == (0, 0)
        assert {part for part in PARTS if getattr(seconds, f"{part}_s") <= 0} == {"imports"}, "no process was started for it"
    first, second = recorded(run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    shown = [event.value for event in board.Scalars("goodput/ettr")]
    assert all(0 < each < 1 for each in shown)
    assert shown[0] == pytest.approx(first.ettr, abs=0.2), "at its last checkpoint"
    assert board.Scalars("goodput/steps_s")[-1].value == pytest.approx(second.steps_s, abs=0.1)
    assert first.train_time_s == second.resumed_train_time_s
    result, its = run.result(), Goodput.of_run(run)
    assert result is not None and its is not None
    assert its.wall_s == pytest.approx(sum(durations))
    parts = [getattr(its, f"{part}_s") for part in PARTS]
    assert sum(parts) + its.other_s == pytest.approx(its.wall_s)
    assert its.ettr == (its.steps_s + its.evaluations_s) / its.wall_s
    kept_s = its.steps_s + its.evaluations_s
    assert kept_s < result.train_time_s + 0.1
    assert kept_s + its.checkpoints_s > result.train_time_s - 0.1
    assert its.queue_s is None
    assert its.untimed == 0


@pytest.mark.slow
def test_the_steps_that_a_killed_run_does_again_are_counted(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "runtime.log_every_steps=1", "runtime.checkpoint_every_steps=30", "train.epochs=20")
    run = config_of(words).run_dir
    process = start(words)
    began_s = time.monotonic()
    wait_until(lambda: (run.attempts_dir / "0001/seconds.json").exists() and run.newest_step() >= 30, process)
    wait_until(lambda: any(row["step"] % 30 > 5 for row in read_metrics(run.metrics_jsonl)[-1:]), process)
    process.kill()
    process.communicate()
    life_s = time.monotonic() - began_s
    last, checkpoint = [row for row in read_metrics(run.metrics_jsonl) if "time_s" in row][-1], run.newest_step()
    assert last["step"] > checkpoint > 0
    assert main(words) == 0
    first, second = recorded(run)
    assert second.lost_steps == last["step"] - checkpoint
    assert second.lost_s == pytest.approx(last["time_s"] - second.resumed_train_time_s)
    its = Goodput.of_run(run)
    assert its is not None
    assert (its.lost_steps, its.lost_s) == (second.lost_steps, second.lost_s)
    assert its.lost_s > 0
    first_s = its.wall_s - (read_json(run.attempts()[1].exit_json) or {})["duration_s"]
    assert first.wall_s < first_s < life_s, "up to the last row that it has written"
    assert sum(getattr(its, f"{part}_s") for part in PARTS) + its.lost_s + its.other_s == pytest.approx(its.wall_s)
    assert its.ettr is not None
    assert its.ettr < 1


def fill(
    root: Path,
    run: Run,
    number: int,
    seconds: Seconds | None,
    duration_s: float | None = None,
    *,
    queue_s: float | None = None,
) -> None:
    """An attempt of a launcher on this host that waited for 30 s, or as long as SLURM says."""
    directory = run.directory(root)
    claim = {"process": {**ProcessId.mine().model_dump(), "pid": 1}, "utc": "2026-01-01T00:00:00Z"}
    attempt = directory.claim_attempt(number, claim)
    assert attempt is not None
    start = {"process": ProcessId.mine().model_dump(), "started_utc": "2026-01-01T00:00:30Z"}
    write_json(attempt.start_json, start if queue_s is None else {**start, "job": {"id": "7_0", "queue_s": queue_s}})
    if seconds is not None:
        seconds.write(attempt.seconds_json)
    if duration_s is not None:
        write_json(attempt.exit_json, {"state": "failed", "reason": "", "duration_s": duration_s})


PARTS_S = {"imports_s": 4, "data_s": 3, "set_up_s": 3, "restore_s": 1, "compilation_s": 20, "steps_s": 60}
PARTS_S |= {"evaluations_s": 6, "checkpoints_s": 3}
FIRST = Seconds(**PARTS_S, train_time_s=68, resumed_train_time_s=0, lost_steps=0, lost_s=0)
AGAIN = Seconds(**PARTS_S, train_time_s=126, resumed_train_time_s=58, lost_steps=7, lost_s=15)


def test_every_view_has_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint of the first attempt was not the one gone on from: 10 of its 60 s of steps were lost, with 5 s more."""
    sweep = finished_sweep(tmp_path)
    SweepDir(tmp_path, sweep.name).record(sweep)
    run = sweep.runs[0]
    fill(tmp_path, run, 1, FIRST, 110.0)
    fill(tmp_path, run, 2, None, None)  # killed with its supervisor while it was imported
    fill(tmp_path, run, 3, AGAIN, queue_s=7.5)
    words = [sweep.name, "--root", str(tmp_path)]
    assert vitpa(["sweep", "status", *words, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    ours, *others = [row["goodput"] for row in status["runs"]]
    expected: dict[str, float] = {
        "wall_s": 210,
        "steps_s": 110,
        "evaluations_s": 12,
        "lost_steps": 7,
        "lost_s": 15,
        "untimed": 1,
    }
    expected |= {"ettr": 122 / 210, "other_s": 5, "queue_s": 67.5, "set_up_s": 6, "restore_s": 2}
    expected |= {"imports_s": 8, "data_s": 6}
    assert expected.items() <= ours.items()
    assert others == [None] * 5, "of earlier versions"
    assert status["goodput"] == ours
    assert vitpa(["sweep", "collect", *words]) == 0
    assert "58.1 % of the time of all attempts" in capsys.readouterr().out
    assert vitpa(["sweep", "frame", *words]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(rows[0][name]) for name in ("ettr", "lost_s", "queue_s")] == [122 / 210, 15, 67.5]
    assert {row["ettr"] for row in rows[1:]} == {""}
    assert vitpa(["sweep", "tensorboard", *words, "--no-serve"]) == 0
    board = EventAccumulator(str(SweepDir(tmp_path, sweep.name).tensorboard / run.cell / "mean")).Reload()
    assert [event.value for event in board.Scalars("goodput/ettr")] == pytest.approx([122 / 210])
    assert vitpa(["sweep", "report", *words]) == 0
    text = (SweepDir(tmp_path, sweep.name).report / "report.md").read_text()
    assert "58.1 %" in text
    assert "Where the time of all attempts went" in text


def test_nothing_is_said_of_a_run_that_an_earlier_version_has_trained_in_part(tmp_path: Path) -> None:
    run = finished_sweep(tmp_path).runs[0]
    directory = run.directory(tmp_path)
    fill(tmp_path, run, 1, None, 100.0)
    assert Goodput.of_run(directory) is None, "nothing is recorded"
    fill(tmp_path, run, 2, FIRST, 110.0)
    assert Goodput.of_run(directory) is not None, "the first was killed before it trained"
    write_json(directory.attempt(1).env_json, {})
    assert Goodput.of_run(directory) is None, "it has trained"
