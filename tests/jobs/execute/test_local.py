"""What a worker does around a training: requests to stop that are meant for it or not, reasons of failures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from jobs.execute.attempt import TORCHRUN, Member, Request, Training, last_error
from jobs.report.logs import tail
from jobs.state import StateReader
from jobs.sweep import Run
from tests.support.jobs_sweeps import STAND_IN, environment_document, evaluation_line, make_sweep, result_document
from vitpa.config_file import parse_config, record_config
from vitpa.documents import to_yaml
from vitpa.records import ProcessId, read_json, write_json
from vitpa.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_sweep(tmp_path, seeds=1).runs[0]


def member(root: Path, run: Run) -> Member:
    """An attempt of `run` that has been claimed and started by this process."""
    config = parse_config(run.config.model_dump(mode="json"), "test", [f"runtime.root={root}"])
    directory = record_config(config)
    me = {"process": ProcessId.mine().model_dump()}
    attempt = directory.claim_attempt(len(directory.attempts()) + 1, me, to_yaml(config.model_dump(mode="json")))
    assert attempt is not None
    write_json(attempt.start_json, me)
    return Member(directory, attempt)


def run_out(command: list[str], *members: Member) -> None:
    """Train to the end and record it."""
    training = Training(members, command, {"CUDA_VISIBLE_DEVICES": ""})
    for member, ended in training.supervise(lambda: None):
        training.record(member, ended)


def ask_to_stop(run: RunDir, attempt: int) -> None:
    write_json(run.stop, {"reason": "cancel", "attempt": attempt, "now": False})


def test_a_request_for_an_earlier_attempt_is_dropped(tmp_path: Path, run: Run) -> None:
    member(tmp_path, run)
    second = member(tmp_path, run)
    ask_to_stop(second.run, 1)
    run_out(STAND_IN, second)
    assert StateReader(tmp_path).state(run).state == "done"
    assert not second.run.stop.exists()


def test_a_request_to_cancel_the_attempt_before_of_the_same_submission_counts(tmp_path: Path, run: Run) -> None:
    """Whoever cancels may not have seen yet that SLURM has started the run again."""
    for submission, expected in (("sweeps/small/submissions/a", "done"), ("sweeps/small/submissions/b", "cancelled")):
        claimed = {"submission": "sweeps/small/submissions/b", "process": ProcessId.mine().model_dump()}
        first, second = member(tmp_path, run), member(tmp_path, run)
        write_json(first.attempt.claim_json, {**claimed, "submission": submission})
        write_json(second.attempt.claim_json, claimed)
        ask_to_stop(second.run, first.attempt.number)
        run_out(STAND_IN, second)
        assert StateReader(tmp_path).state(run).state == expected
        second.run.result_json.unlink(missing_ok=True)


def test_a_request_before_the_start_cancels(tmp_path: Path, run: Run) -> None:
    first = member(tmp_path, run)
    ask_to_stop(first.run, 1)
    run_out(STAND_IN, first)
    state = StateReader(tmp_path).state(run)
    assert (state.state, state.reason) == ("cancelled", "cancelled before it started")
    assert not first.attempt.log.exists()


def test_a_stop_file_made_by_hand(tmp_path: Path, run: Run) -> None:
    program = "import pathlib, sys, time; (pathlib.Path(sys.argv[1]).parents[2] / 'stop').touch(); time.sleep(0.7)"
    run_out([sys.executable, "-S", "-c", program], member(tmp_path, run))
    state = StateReader(tmp_path).state(run)
    assert (state.state, state.reason) == ("interrupted", "the file stop")


def test_one_of_a_group_is_dropped_before_the_others_see_that_all_are_to_stop(tmp_path: Path) -> None:
    """They are finished; the process says 1, for that one is not."""
    runs = make_sweep(tmp_path, seeds=2).runs[::2]
    first, second = (member(tmp_path, run) for run in runs)
    left = json.dumps({"state": "stopped", "reason": "as stop asks", "utc": ""})
    first.run.metrics_jsonl.write_text(evaluation_line(result_document(runs[0])))
    first.run.env_json.write_text(json.dumps(environment_document(result_document(runs[0]))))
    finish = f"pathlib.Path({str(first.run.result_json)!r}).write_text({json.dumps(result_document(runs[0]))!r})"
    drop = f"pathlib.Path({str(second.attempt.left_json)!r}).write_text({left!r})"
    program = f"import pathlib, sys, time; time.sleep(1); {drop}; time.sleep(1); {finish}; sys.exit(1)"
    training = Training([first, second], [sys.executable, "-S", "-c", program], {})
    ends = training.supervise(lambda: Request("signal SIGTERM"))
    assert [(one, ended.state, ended.reason) for one, ended in ends] == [
        (first, "done", ""),
        (second, "interrupted", "signal SIGTERM"),
    ]
    assert not training.left


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('data/train.beton: no such file')", "data/train.beton: no such file"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("pass", "the training ended without a result"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("import os; os.kill(os.getpid(), 12)", "the training ended without a result"),  # SIGUSR2 is ignored
    ],
)
def test_reasons_of_failures(tmp_path: Path, run: Run, program: str, reason: str) -> None:
    run_out([sys.executable, "-S", "-c", program], member(tmp_path, run))
    state = StateReader(tmp_path).state(run)
    assert (state.state, state.reason) == ("failed", reason)


def test_a_program_that_cannot_be_started_fails_the_run(tmp_path: Path, run: Run) -> None:
    run_out(["/nowhere/python"], member(tmp_path, run))
    state = StateReader(tmp_path).state(run)
    assert state.state == "failed"
    assert "/nowhere/python" in state.reason


def test_the_training_is_told_its_attempt_and_sees_no_gpu(tmp_path: Path, run: Run) -> None:
    program = "import os, sys; print(os.environ['VITPA_ATTEMPT'], repr(os.environ['CUDA_VISIBLE_DEVICES']), *sys.argv[1:])"
    one = member(tmp_path, run)
    run_out([sys.executable, "-S", "-c", program], one)
    assert one.attempt.log.read_text() == f"{one.attempt.path} '' {one.attempt.path}/config.yaml\n"
    ended = read_json(one.attempt.exit_json)
    assert ended is not None
    assert ended["exit_code"] == 0


def test_an_attempt_with_another_experiment_is_not_trained(tmp_path: Path, run: Run) -> None:
    one = member(tmp_path, run)
    one.attempt.config_yaml.write_text(one.attempt.config_yaml.read_text().replace("seed: 0", "seed: 7"))
    run_out(STAND_IN, one)
    state = StateReader(tmp_path).state(run)
    reason = f"{one.attempt.config_yaml}: was edited by hand, it is another experiment: `vitpa sweep retry`"
    assert (state.state, state.reason) == ("failed", reason)


def test_last_error_of_a_distributed_training(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "[rank1]: Traceback (most recent call last):\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
        "====\nvitpa.train FAILED\n"
    )
    assert last_error(log) == "torch.OutOfMemoryError: CUDA out of memory."


def test_a_pipe_in_place_of_a_log_is_not_waited_at(tmp_path: Path, run: Run) -> None:
    one = member(tmp_path, run)
    os.mkfifo(one.attempt.log)
    assert last_error(one.attempt.log) == f"{one.attempt.log}: cannot be read (not a regular file)"
    assert tail(one.attempt.log, 5) == [f"{one.attempt.log}: cannot be read (not a regular file)"]
    run_out(STAND_IN, one)
    state = StateReader(tmp_path).state(run)
    assert (state.state, state.reason) == ("failed", f"[Errno 22] not a regular file: '{one.attempt.log}'")


@pytest.mark.slow
def test_torchrun_leaves_nothing_behind_in_tmp(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-S", "-c", "pass"]
    one = member(tmp_path, run)
    run_out(command, one)
    assert (one.attempt.path / "torchrun").is_dir(), "torchrun has run"
    assert not list(folder.glob("torchelastic*"))
