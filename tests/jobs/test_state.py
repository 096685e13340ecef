"""The state of a run from its records, one test for each state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.report.status import progress_of, row_of
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.state import RunState, StateReader, early_ends, withdraw
from jobs.sweep import Run
from tests.support.claims import ALIVE, DEAD, ELSEWHERE, Queue, slurm_claim
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.records import ProcessId, read_json, write_json
from vitpa.rundir import AttemptDir


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_sweep(tmp_path, seeds=1).runs[0]


def look(root: Path, run: Run) -> RunState:
    return StateReader(root).state(run)


def claim(root: Path, run: Run, number: int, claimer: ProcessId, submission: str = "sweeps/small/submissions/s") -> AttemptDir:
    attempt = run.directory(root).claim_attempt(number, {"process": claimer.model_dump(), "submission": submission})
    assert attempt is not None
    return attempt


def receipt(root: Path, *processes: ProcessId) -> None:
    path = root / "sweeps/small/submissions/s/receipt.json"
    path.parent.mkdir(parents=True)
    write_json(path, {"jobs": [{"id": "1", "process": process.model_dump()} for process in processes]})


def start(attempt: AttemptDir, process: ProcessId) -> None:
    write_json(attempt.start_json, {"process": process.model_dump()})


def test_missing(tmp_path: Path, run: Run) -> None:
    assert look(tmp_path, run).state == "missing"
    assert look(tmp_path, run).attempts == 0


def test_done(tmp_path: Path, run: Run) -> None:
    write_result(tmp_path, run, val_top1=0.75)
    state = look(tmp_path, run)
    assert state.state == "done"
    assert state.result is not None
    assert state.result.val_top1 == 0.75


@pytest.mark.parametrize("claimer", [ALIVE, ELSEWHERE])
def test_pending_while_the_launcher_lives(tmp_path: Path, run: Run, claimer: ProcessId) -> None:
    claim(tmp_path, run, 1, claimer)
    state = look(tmp_path, run)
    assert (state.state, state.unseen) == ("pending", claimer is ELSEWHERE)


def test_pending_while_a_job_of_its_submission_lives(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, DEAD)
    receipt(tmp_path, DEAD, ALIVE)
    assert look(tmp_path, run).state == "pending"


def test_uncertain_without_receipt(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, DEAD)
    assert look(tmp_path, run).state == "uncertain"


def test_uncertain_with_all_jobs_dead(tmp_path: Path, run: Run) -> None:
    claim(tmp_path, run, 1, ALIVE)  # a launcher that waits does not start anything any more
    receipt(tmp_path, DEAD, DEAD)
    assert look(tmp_path, run).state == "uncertain"


def test_workers_that_died_before_they_started_a_run(tmp_path: Path) -> None:
    """They count like SLURM jobs that ended early, as long as none of them has come further."""
    first, second = make_sweep(tmp_path, seeds=1).runs
    folder = tmp_path / "sweeps/small/submissions/s"
    attempts = [claim(tmp_path, run, 1, ALIVE) for run in (first, second)]
    receipt(tmp_path, DEAD, DEAD)
    wanted = [{"signature": run.signature, "attempt": 1} for run in (first, second)]
    write_json(folder / "intent.json", {"token": "t", "runs": wanted})
    state = look(tmp_path, first)
    assert (state.state, state.reason) == ("uncertain", f"its worker ended before it started the run; see {folder}/submitit")
    assert (state.ended_early, early_ends(state, tmp_path)) == (True, 1)
    (folder / "submitit").mkdir()
    (folder / "submitit/7_0_log.err").write_text(
        "Traceback (most recent call last):\nModuleNotFoundError: No module named 'x'\n"
    )
    state = look(tmp_path, first)
    cause = "its worker ended before it started the run: ModuleNotFoundError: No module named 'x'; see "
    assert (state.state, state.reason, state.ended_early) == ("failed", f"{cause}{folder}/submitit", True)
    start(attempts[1], DEAD)
    state = look(tmp_path, first)
    assert (state.state, state.ended_early) == ("uncertain", False), "they died in the middle of their work"
    assert withdraw(attempts[0], "failed", cause)
    (folder / "intent.json").write_text("{")
    claim(tmp_path, first, 2, ALIVE)
    state = look(tmp_path, first)
    assert (state.state, state.ended_early) == ("uncertain", False), "nobody knows"


@pytest.mark.parametrize("worker", [ALIVE, ELSEWHERE])
def test_running(tmp_path: Path, run: Run, worker: ProcessId) -> None:
    start(claim(tmp_path, run, 1, DEAD), worker)
    state = look(tmp_path, run)
    assert (state.state, state.unseen) == ("running", worker is ELSEWHERE)
    assert ("on elsewhere, which cannot be seen" in state.reason) == (worker is ELSEWHERE)


def test_lost(tmp_path: Path, run: Run) -> None:
    start(claim(tmp_path, run, 1, ALIVE), DEAD)
    state = look(tmp_path, run)
    assert (state.state, state.attempts) == ("lost", 1)
    assert f"process {DEAD.pid}" in state.reason


@pytest.mark.parametrize("ending", ["failed", "interrupted", "cancelled"])
def test_last_attempt_decides(tmp_path: Path, run: Run, ending: str) -> None:
    first = claim(tmp_path, run, 1, DEAD)
    start(first, DEAD)
    write_json(first.exit_json, {"state": "failed", "reason": "earlier"})
    second = claim(tmp_path, run, 2, DEAD)
    start(second, DEAD)
    write_json(second.exit_json, {"state": ending, "reason": "why"})
    state = look(tmp_path, run)
    assert (state.state, state.reason, state.attempts) == (ending, "why", 2)


def test_result_removed_by_the_user(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    start(attempt, DEAD)
    write_json(attempt.exit_json, {"state": "done", "reason": ""})
    state = look(tmp_path, run)
    assert (state.state, state.reason) == ("missing", "its result.json was removed")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"val_top1": float("nan")}, "result.json: NaN is no number of JSON"),
        ({"val_top1": 91.2}, "val_top1"),
        ({"signature": "0123456789abcdef"}, "belongs to run 0123456789abcdef"),
        ({"seed": "0"}, "seed"),
    ],
)
def test_broken_result(tmp_path: Path, run: Run, values: dict[str, object], reason: str) -> None:
    write_result(tmp_path, run, **values)
    state = look(tmp_path, run)
    assert state.state == "broken"
    assert reason in state.reason
    assert state.result is None


def test_truncated_result_is_broken_unless_being_made_again(tmp_path: Path, run: Run) -> None:
    write_result(tmp_path, run)
    path = run.directory(tmp_path).result_json
    path.write_text(path.read_text()[:100])
    assert look(tmp_path, run).state == "broken"
    claim(tmp_path, run, 1, ALIVE)
    assert look(tmp_path, run).state == "pending"


def test_broken_record(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    attempt.start_json.write_text("{")
    state = look(tmp_path, run)
    assert state.state == "broken"
    assert str(attempt.start_json) in state.reason


def test_withdrawing_and_starting_exclude_each_other(tmp_path: Path, run: Run) -> None:
    attempt = claim(tmp_path, run, 1, DEAD)
    assert withdraw(attempt, "cancelled", "cancelled before it started")
    assert not withdraw(attempt, "interrupted", "again")
    assert look(tmp_path, run).state == "cancelled"
    attempt.exit_json.unlink()  # as if killed between the two records
    assert look(tmp_path, run).state == "cancelled"
    started = claim(tmp_path, run, 2, DEAD)
    start(started, ALIVE)
    assert not withdraw(started, "cancelled", "too late")
    assert look(tmp_path, run).state == "running"


def test_progress_ignores_half_written_lines(tmp_path: Path, run: Run) -> None:
    start(claim(tmp_path, run, 1, ALIVE), ALIVE)
    directory = run.directory(tmp_path)
    write_json(directory.env_json, {"steps_total": 10})
    rows = '{"step": 4, "epoch": 2.0, "val/top1": 0.5}\n{"step": 5, "epoch": 2.5, "perf/images_per_s": 64.0}\n{"step": 6, "ep'
    directory.metrics_jsonl.write_text(rows)
    progress = progress_of(look(tmp_path, run), tmp_path)
    assert (progress.step, progress.steps_total, progress.epoch, progress.val_top1) == (5, 10, 2.5, 0.5)
    assert row_of(look(tmp_path, run), tmp_path)["eta_s"] == 10.0  # 5 steps of 128 images at 64 images/s


def test_a_pid_used_again_is_not_the_same_process() -> None:
    assert ALIVE.pid == os.getpid()
    assert ALIVE.alive() is True
    assert DEAD.alive() is False


# --- a run whose attempt belongs to a SLURM job


def slurm_start(attempt: AttemptDir) -> None:
    write_json(attempt.start_json, {"process": ELSEWHERE.model_dump(), "job": {"id": "7_0", "restart": 0}, "step": 0})


def ask(root: Path, run: Run, queue: Queue) -> tuple[str, str]:
    state = StateReader(root, queue).state(run)
    return state.state, state.reason


@pytest.mark.parametrize(
    ("job", "started", "expected"),
    [
        (SlurmJob("7_0", "PENDING", "Priority"), False, ("pending", "pending in SLURM: Priority")),
        (SlurmJob("7_0", "RUNNING"), False, ("pending", "running in SLURM")),
        (SlurmJob("7_0", "RUNNING"), True, ("running", "")),
        (SlurmJob("7_0", "PENDING", "BeginTime"), True, ("pending", "pending in SLURM: BeginTime")),
        (SlurmJob("7_0", "REQUEUE_HOLD"), True, ("pending", "requeue_hold in SLURM")),
        (SlurmJob("7_0", "A_STATE_OF_2030"), True, ("running", "")),
        (SlurmJob("7_0", "TIMEOUT"), True, ("interrupted", "SLURM ended job 7_0: TIMEOUT")),
        (SlurmJob("7_0", "NODE_FAIL"), True, ("lost", "its job 7_0 was killed (NODE_FAIL)")),
        (SlurmJob("7_0", "OUT_OF_MEMORY"), True, ("failed", "host out of memory: SLURM ended job 7_0 (OUT_OF_MEMORY)")),
        (SlurmJob("7_0", "CANCELLED"), True, ("cancelled", "scancel")),
        (SlurmJob("7_0", "CANCELLED"), False, ("cancelled", "scancel")),
        (SlurmJob("7_0", "FAILED"), False, ("failed", "its job ended (FAILED) before it started the run: ")),
        (SlurmJob("7_0", "NODE_FAIL"), False, ("uncertain", "its job 7_0 ended (NODE_FAIL) before it started the run; see ")),
    ],
)
def test_state_in_the_queue(tmp_path: Path, run: Run, job: SlurmJob, started: bool, expected: tuple[str, str]) -> None:
    attempt = slurm_claim(tmp_path, run)
    if started:
        slurm_start(attempt)
    state, reason = ask(tmp_path, run, Queue(job))
    assert state == expected[0]
    assert reason.startswith(expected[1])


@pytest.mark.parametrize(
    ("account", "started", "expected"),
    [
        ("TIMEOUT", True, ("interrupted", "SLURM ended job 7_0: TIMEOUT")),
        ("CANCELLED", False, ("cancelled", "scancel")),
        ("RUNNING", True, ("running", "squeue does not show its job 7_0, but sacct says RUNNING: it counts as alive")),
        ("PENDING", False, ("pending", "squeue does not show its job 7_0, but sacct says PENDING: it counts as alive")),
        ("", True, ("lost", "its job 7_0 was killed")),
        ("", False, ("uncertain", "its job 7_0 ended (unknown to SLURM) before it started the run; see ")),
    ],
)
def test_the_queue_has_forgotten_it(tmp_path: Path, run: Run, account: str, started: bool, expected: tuple[str, str]) -> None:
    attempt = slurm_claim(tmp_path, run)
    if started:
        slurm_start(attempt)
    state, reason = ask(tmp_path, run, Queue(account=account))
    assert state == expected[0]
    assert reason.startswith(expected[1])


class LateQueue(Queue):
    """One that the job is in from the second time on that it is asked."""

    asked = 0

    def snapshot(self) -> Snapshot:
        self.asked += 1
        return super().snapshot() if self.asked > 1 else Snapshot({}, "")


def test_a_start_that_is_seen_before_its_receipt(tmp_path: Path, run: Run) -> None:
    """Its job was submitted after SLURM was asked; another login node's receipt is not shown yet."""
    slurm_start(slurm_claim(tmp_path, run, ELSEWHERE, receipt=False))
    queue = LateQueue(SlurmJob("7_0", "RUNNING"))
    reader = StateReader(tmp_path, queue)
    assert [reader.state(run).state for _ in range(3)] == ["running"] * 3
    assert queue.asked == 2
    gone = LateQueue()
    reader = StateReader(tmp_path, gone)
    assert [reader.state(run).state for _ in range(3)] == ["lost"] * 3
    assert gone.asked == 2, "once more is enough"


def test_its_own_records_come_before_slurm_s(tmp_path: Path, run: Run) -> None:
    attempt = slurm_claim(tmp_path, run)
    slurm_start(attempt)
    write_json(attempt.exit_json, {"state": "interrupted", "reason": "time limit", "requeued": True})
    waits = Queue(SlurmJob("7_0", "PENDING", "BeginTime"))
    assert ask(tmp_path, run, waits) == ("pending", "pending in SLURM: BeginTime")
    assert ask(tmp_path, run, Queue()) == ("interrupted", "time limit"), "it was to go on, and did not"
    write_json(attempt.exit_json, {"state": "failed", "reason": "a bug"})
    assert ask(tmp_path, run, Queue(SlurmJob("7_0", "COMPLETING"))) == ("failed", "a bug")


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [(ALIVE, "pending"), (ELSEWHERE, "pending"), (DEAD, "uncertain")],
    ids=["here", "elsewhere", "dead"],
)
def test_being_submitted(tmp_path: Path, run: Run, launcher: ProcessId, expected: str) -> None:
    slurm_claim(tmp_path, run, launcher, receipt=False)
    state = StateReader(tmp_path, Queue()).state(run)
    assert (state.state, state.unseen) == (expected, launcher is ELSEWHERE)


@pytest.mark.parametrize(
    ("started", "here", "expected"),
    [
        (False, "lab", ("uncertain", "its job 7_0 ended (unknown to SLURM) before")),
        (True, "lab", ("lost", "its job 7_0 was killed")),
        (False, "other", ("pending", "its job is in the SLURM cluster lab, which cannot be seen from here")),
        (True, "other", ("running", "its job is in the SLURM cluster lab, which cannot be seen from here")),
        (True, "", ("running", "as far as is known: scontrol: no route")),
    ],
)
def test_a_job_of_another_cluster(tmp_path: Path, run: Run, started: bool, here: str, expected: tuple[str, str]) -> None:
    attempt = slurm_claim(tmp_path, run)
    write_json(attempt.claim_json, {**(read_json(attempt.claim_json) or {}), "cluster": "lab"})
    if started:
        slurm_start(attempt)
    state = StateReader(tmp_path, Queue(cluster=here)).state(run)
    assert (state.state, state.reason[: len(expected[1])]) == expected
    assert (state.unseen, state.cluster) == (here != "lab", "lab" if here == "other" else "")
    seen = StateReader(tmp_path, Queue(SlurmJob("7_0", "RUNNING"), cluster=here)).state(run)
    assert seen.cluster == "", "what SLURM calls ours is seen, whatever its cluster is called now"


def test_slurm_does_not_answer(tmp_path: Path, run: Run) -> None:
    attempt = slurm_claim(tmp_path, run)
    assert ask(tmp_path, run, Queue(error="squeue: no route")) == ("pending", "as far as is known: squeue: no route")
    slurm_start(attempt)
    assert ask(tmp_path, run, Queue(error="squeue: no route"))[0] == "running"
    write_result(tmp_path, run)
    assert ask(tmp_path, run, Queue(error="squeue: no route"))[0] == "done"


@pytest.mark.parametrize("name", ["token", "index", "submission"])
def test_damaged_claim(tmp_path: Path, run: Run, name: str) -> None:
    attempt = slurm_claim(tmp_path, run)
    write_json(attempt.claim_json, {**(read_json(attempt.claim_json) or {}), name: None})
    state, reason = ask(tmp_path, run, Queue())
    assert state == "broken"
    assert reason.startswith(f"{attempt.claim_json}: no usable `{name}` in it; it was edited by hand")


def test_a_damaged_receipt_concerns_its_own_runs(tmp_path: Path, run: Run) -> None:
    attempt = slurm_claim(tmp_path, run)
    other = tmp_path / "sweeps/small/submissions/other/receipt.json"
    other.parent.mkdir()
    other.write_text("{")
    assert ask(tmp_path, run, Queue(account="CANCELLED")) == ("cancelled", "scancel")
    receipt = tmp_path / "sweeps/small/submissions/s/receipt.json"
    receipt.write_text('{"jobs": [')
    assert ask(tmp_path, run, Queue(SlurmJob("7_0", "PENDING")))[0] == "pending"
    state, reason = ask(tmp_path, run, Queue())
    assert state == "broken"
    assert reason.startswith(f"{receipt}: not valid JSON")
    slurm_start(attempt)
    assert ask(tmp_path, run, Queue())[0] == "lost"
