"""Who may train a run, and what an attempt leaves behind however it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitpa.attempt import claimed_attempt
from vitpa.config_file import load_config, record_config, shipped_configs
from vitpa.documents import to_yaml
from vitpa.records import ProcessId, RunError, read_json, write_json
from vitpa.rundir import CLAIMED, AttemptDir, RunDir
from vitpa.train_command import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that nobody has started."""
    monkeypatch.delenv(CLAIMED, raising=False)
    return RunDir(tmp_path, "0123456789abcdef")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A live process that is not this one."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def train(run: RunDir, *, takeover: bool = False, finishes: bool = True) -> None:
    """Train the run to its end, or until its stop file."""
    with claimed_attempt(run, takeover=takeover):
        if finishes:
            write_json(run.result_json, {})


def exit_of(run: RunDir, number: int) -> dict[str, Any]:
    attempt = run.attempts()[number - 1]
    ended = read_json(attempt.exit_json)
    assert ended is not None
    return ended


def started(run: RunDir, process: ProcessId) -> AttemptDir:
    """An attempt that `process` has started and not ended."""
    attempt = run.claim_attempt(len(run.attempts()) + 1, {"process": process.model_dump()})
    assert attempt is not None
    write_json(attempt.start_json, {"process": process.model_dump()})
    return attempt


def test_an_attempt_that_is_done(run: RunDir) -> None:
    with claimed_attempt(run, takeover=False):
        attempt = run.attempts()[-1]
        assert not attempt.exit_json.exists()
        for record in (read_json(attempt.claim_json), read_json(attempt.start_json)):
            assert record is not None
            assert ProcessId.model_validate(record["process"]) == ProcessId.mine()
        write_json(run.result_json, {})
    ended = exit_of(run, 1)
    assert (ended["state"], ended["reason"]) == ("done", "")
    assert 0 <= ended["duration_s"] < 600
    assert set(ended) == {"state", "reason", "finished_utc", "duration_s"}


def test_an_attempt_that_was_stopped(run: RunDir) -> None:
    train(run, finishes=False)
    assert exit_of(run, 1)["state"] == "interrupted"
    assert exit_of(run, 1)["reason"] == f"stopped by the file {run.stop}"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (RunError("no images"), "failed", "RunError: no images"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (KeyboardInterrupt(), "interrupted", "interrupted from the keyboard"),
    ],
)
def test_an_attempt_that_ends_with_an_error(run: RunDir, error: BaseException, state: str, reason: str) -> None:
    with pytest.raises(type(error)) as raised, claimed_attempt(run, takeover=False):
        raise error
    assert raised.value is error
    assert (exit_of(run, 1)["state"], exit_of(run, 1)["reason"]) == (state, reason)


def test_attempts_after_each_other_are_numbered(run: RunDir) -> None:
    train(run, finishes=False)
    train(run)
    assert [attempt.path.name for attempt in run.attempts()] == ["0001", "0002"]
    assert [exit_of(run, number)["state"] for number in (1, 2)] == ["interrupted", "done"]


def test_a_run_that_a_live_process_trains_is_refused(run: RunDir, sleeper: subprocess.Popen[bytes]) -> None:
    attempt = started(run, ProcessId.of(sleeper.pid))
    message = rf"0001: this run is being trained by process {sleeper.pid} on .+; wait for it, or stop that process$"
    with pytest.raises(RunError, match=message):
        train(run)
    assert [each.path for each in run.attempts()] == [attempt.path]
    assert not run.result_json.exists()


def test_a_process_that_died_without_a_word_does_not_hold_the_run(run: RunDir, sleeper: subprocess.Popen[bytes]) -> None:
    attempt = started(run, ProcessId.of(sleeper.pid))
    sleeper.kill()
    sleeper.wait()
    train(run)
    assert exit_of(run, 2)["state"] == "done"
    assert not attempt.exit_json.exists()  # nobody speaks for the dead


def test_an_attempt_that_ended_does_not_hold_the_run_though_its_process_lives(
    run: RunDir, sleeper: subprocess.Popen[bytes]
) -> None:
    write_json(started(run, ProcessId.of(sleeper.pid)).exit_json, {"state": "failed"})
    train(run)
    assert exit_of(run, 2)["state"] == "done"


def test_a_run_on_another_host_is_refused_unless_taken_over(run: RunDir) -> None:
    started(run, ProcessId.mine().model_copy(update={"host": "elsewhere.invalid"}))
    message = r"on elsewhere\.invalid, which cannot be seen from here; .* set runtime\.takeover=true$"
    with pytest.raises(RunError, match=message):
        train(run)
    train(run, takeover=True)
    assert exit_of(run, 2)["state"] == "done"


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_that_a_sweep_has_queued_is_refused(run: RunDir, sleeper: subprocess.Popen[bytes], gone: bool) -> None:
    process = ProcessId.of(sleeper.pid)
    assert run.claim_attempt(1, {"process": process.model_dump()}) is not None
    if gone:  # the launcher has left, its job still waits in the queue
        sleeper.kill()
        sleeper.wait()
    message = rf"0001: a sweep has queued this run \(process {process.pid} on .+\); cancel it there, or set runtime\.takeover"
    with pytest.raises(RunError, match=message):
        train(run)
    train(run, takeover=True)
    assert exit_of(run, 2)["state"] == "done"


def test_the_launcher_that_claimed_the_attempt_keeps_the_records(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.path.mkdir(parents=True)
    run.stop.write_text("{}")
    monkeypatch.setenv(CLAIMED, "1")
    assert CLAIMED == "VITPA_ATTEMPT"
    with claimed_attempt(run, takeover=False):
        pass
    with pytest.raises(RunError, match="no images"), claimed_attempt(run, takeover=False):
        raise RunError("no images")
    assert list(run.path.iterdir()) == [run.stop]


def test_a_claimed_configuration_that_is_edited_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if that happens after whoever claimed it has looked."""
    config = load_config(shipped_configs()["digits"], [f"runtime.root={tmp_path}", f"runtime.data_dir={tmp_path}"])
    attempt = record_config(config).claim_attempt(1, {}, to_yaml(config.model_dump(mode="json")))
    assert attempt is not None
    monkeypatch.setenv(CLAIMED, str(attempt.path))
    path = str(attempt.config_yaml)
    assert main([path]) == 1
    assert "train.beton: no such file" in capsys.readouterr().err
    attempt.config_yaml.write_text(attempt.config_yaml.read_text().replace("seed: 0", "seed: 7"))
    assert main([path]) == 1
    said = f"vitpa train: {path}: was edited by hand, it is another experiment: `vitpa sweep retry`\n"
    assert capsys.readouterr().err == said
    assert [each.name for each in (tmp_path / "runs").iterdir()] == [config.signature]


def test_a_stop_meant_for_an_earlier_attempt_goes(run: RunDir) -> None:
    train(run, finishes=False)
    run.stop.write_text('{"reason": "cancel"}')
    with claimed_attempt(run, takeover=False):
        assert not run.stop.exists()


def test_a_refused_process_leaves_the_stop_alone(run: RunDir, sleeper: subprocess.Popen[bytes]) -> None:
    started(run, ProcessId.of(sleeper.pid))
    run.stop.write_text('{"reason": "cancel"}')
    with pytest.raises(RunError, match="is being trained"):
        train(run)
    assert run.stop.exists()


def test_a_killed_process_leaves_no_exit_and_the_next_goes_on(run: RunDir) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from vitpa.attempt import claimed_attempt
from vitpa.rundir import RunDir
with claimed_attempt(RunDir(Path(sys.argv[1]), "0123456789abcdef"), takeover=False):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, run.path.parents[1]], check=False)
    assert not run.attempts()[0].exit_json.exists()
    train(run)
    assert exit_of(run, 2)["state"] == "done"


def test_a_claim_that_names_nobody_is_refused_in_one_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "0" * 16)
    assert run.claim_attempt(1, {"by": "hand"}) is not None
    with (
        pytest.raises(RunError, match=r"0001: does not say who holds this run; .*runtime.takeover=true"),
        claimed_attempt(run, takeover=False),
    ):
        pass
