"""What `vitpa sweep logs` prints: failures by cause, each traceback once, and a run followed through its attempts."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

from rich.console import Console

from jobs.report.logs import follow, show, show_failures
from jobs.state import StateReader
from jobs.sweep import Run, Sweep
from tests.support.jobs_sweeps import make_sweep
from tests.support.waiting import wait_for
from vitpa.records import ProcessId, write_json
from vitpa.rundir import AttemptDir

ME = ProcessId.mine().model_dump()
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line {line}, in f\n    g()\n{error}\n'


def start(root: Path, run: Run, number: int = 1) -> AttemptDir:
    attempt = run.directory(root).claim_attempt(number, {"process": ME})
    assert attempt is not None
    write_json(attempt.start_json, {"process": ME})
    return attempt


def end(attempt: AttemptDir, state: str, reason: str) -> None:
    write_json(attempt.exit_json, {"state": state, "reason": reason})


def fail(root: Path, run: Run, reason: str, log: str) -> AttemptDir:
    attempt = start(root, run)
    attempt.log.write_text(log)
    end(attempt, "failed", reason)
    return attempt


def console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=160), file


def failures(root: Path, sweep: Sweep) -> str:
    screen, file = console()
    show_failures(StateReader(root).states(sweep.runs), 3, screen)
    return file.getvalue()


def test_each_traceback_once_by_cause(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=3)
    memory = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB."
    for index in (0, 2):  # alike but for numbers
        error = memory.format(index + 20)
        fail(tmp_path, sweep.runs[index], error, "step 1\n" + TRACEBACK.format(line=5, error=error))
    for index, name in ((1, "a"), (3, "b")):
        fail(tmp_path, sweep.runs[index], f"KeyError: {name!r}", TRACEBACK.format(line=7, error=f"KeyError: {name!r}"))
    text = failures(tmp_path, sweep)
    assert text.count("cuda out of memory: 2 failed. To fix it: ") == 1
    assert "runtime.accum_steps=2" in text
    assert f"digits-content-s0, digits-content-s1: {memory.format(20)}\n" in text
    assert text.count("Tried to allocate") == 2, "in the reason and in the one traceback"
    assert text.count("other: 2 failed") == 1
    assert text.count("Traceback") == 3
    assert "step 1" not in text


def test_killed_without_a_word_shows_the_end_of_one_log(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    for index, run in enumerate(sweep.runs):
        fail(tmp_path, run, "killed by SIGKILL (out of memory?)", "".join(f"run {index} step {n}\n" for n in range(9)))
    text = failures(tmp_path, sweep)
    assert "killed by a signal: 4 failed" in text
    assert text.count("== ") == 1
    assert text.endswith("run 0 step 6\nrun 0 step 7\nrun 0 step 8\n")


def test_the_logs_of_the_other_nodes_count(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    lost = "[rank0]: RuntimeError: Connection closed by peer"
    attempt = fail(
        tmp_path,
        sweep.runs[0],
        "RuntimeError: Connection closed by peer",
        f"[rank0]: Traceback (most recent call last):\n{lost}\n",
    )
    (attempt.path / "log.node1.txt").write_text("[rank8]: Traceback (most recent call last):\n[rank8]: MemoryError\n")
    text = failures(tmp_path, sweep)
    assert "host out of memory: 1 failed" in text
    assert text.endswith("Traceback (most recent call last):\nMemoryError\n")


def test_a_failure_without_a_log(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    end(start(tmp_path, sweep.runs[0]), "failed", "config.yaml: cannot be read")
    assert "config.yaml: cannot be read" in failures(tmp_path, sweep)


def test_nothing_has_failed(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    assert failures(tmp_path, sweep) == "no run has failed\n"
    screen, file = console()
    attempt = start(tmp_path, sweep.runs[0])
    attempt.log.write_text("one\ntwo\nthree\n")
    show(StateReader(tmp_path).states(sweep.runs), 2, screen)
    assert file.getvalue() == f"== digits-content-s0 running, attempt 1: {attempt.log}\ntwo\nthree\n"


def test_follow_goes_on_with_the_next_attempt(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1).runs[0]
    first = start(tmp_path, run)
    first.log.write_text("first begins\n")
    screen, file = console()
    follower = threading.Thread(target=follow, args=([run], tmp_path, screen))
    follower.start()
    wait_for(lambda: "first begins" in file.getvalue())
    second = run.directory(tmp_path).claim_attempt(2, {"process": ME})  # between two looks, as when SLURM restarts a job
    assert second is not None
    with first.log.open("a") as log:
        log.write("first ends without a newline")
    end(first, "interrupted", "time limit")
    time.sleep(0.6)
    assert follower.is_alive()
    second.log.write_text("second begins\n")
    write_json(second.start_json, {"process": ME})
    wait_for(lambda: "second begins" in file.getvalue())
    end(second, "failed", "no")
    wait_for(lambda: not follower.is_alive())
    assert file.getvalue().splitlines() == [
        f"== digits-content-s0 attempt 1: {first.log}",
        "first begins",
        "first ends without a newline",
        f"== digits-content-s0 attempt 2: {second.log}",
        "second begins",
    ]


def test_follow_leaves_out_what_was_over(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    fail(tmp_path, sweep.runs[0], "no", "old\n")
    screen, file = console()
    follow(sweep.runs, tmp_path, screen)
    assert file.getvalue() == ""
