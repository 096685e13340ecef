"""Attempts that a process or a SLURM job has claimed, and a SLURM that says what a test wants, for the tests of states."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from jobs.sweep import Run
from vitpa.records import ProcessId, write_json
from vitpa.rundir import AttemptDir

ALIVE = ProcessId.mine()
DEAD = ALIVE.model_copy(update={"start_ticks": ALIVE.start_ticks + 1})  # same pid, another process
ELSEWHERE = ALIVE.model_copy(update={"host": "elsewhere"})


class Queue(Scheduler):
    """A SLURM that says what a test wants."""

    def __init__(self, job: SlurmJob | None = None, *, account: str = "", error: str = "", cluster: str = "") -> None:
        super().__init__({})
        self.found, self.account, self.error, self.here = job, account, error, cluster

    def snapshot(self) -> Snapshot:
        return Snapshot({("t", 0): self.found} if self.found else {}, self.error)

    def cluster(self) -> str:
        if not self.here:
            raise SchedulerError("scontrol: no route")
        return self.here

    def accounted(self, ids: Iterable[str]) -> dict[tuple[str, int], SlurmJob]:
        return {("t", 0): SlurmJob("7_0", self.account)} if self.account else {}


def slurm_claim(root: Path, run: Run, launcher: ProcessId = DEAD, *, number: int = 1, receipt: bool = True) -> AttemptDir:
    folder = "sweeps/small/submissions/s"
    document = {"executor": "slurm", "token": "t", "index": 0, "submission": folder, "process": launcher.model_dump()}
    attempt = run.directory(root).claim_attempt(number, document)
    assert attempt is not None
    (root / folder).mkdir(parents=True, exist_ok=True)
    if receipt:
        write_json(root / folder / "receipt.json", {"jobs": [{"id": "7", "array": True, "tasks": 1}]})
    return attempt
