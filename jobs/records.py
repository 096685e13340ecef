"""The records of submissions and attempts that are read again, as types; what else they hold is for people.

A record that has been cut or edited is one line that names it, whatever is wrong with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field

from vitpa.records import Holder, ProcessId, Record, RunError, read_json, read_record, record_of, utc_now


class Claim(Holder):
    """Of `attempts/NNNN/claim.json`: who has the run. By the launcher of a submission, or `vitpa train`."""

    model_config = ConfigDict(extra="allow")  # all of it goes into the claim of the next attempt

    executor: str | None = None  # slurm, local; None: `vitpa train`
    submission: str | None = None  # a path below the root
    sweep: str | None = None
    token: str | None = None
    index: int | None = Field(None, ge=0)  # of its task in the submission

    def again(self) -> dict[str, Any]:
        """The claim of the next attempt, by this process."""
        return {**self.model_dump(exclude_unset=True), "process": ProcessId.mine().model_dump(), "utc": utc_now()}


class SlurmClaim(Claim):
    """The same of a submission to SLURM: which of its tasks has the run."""

    token: str
    index: int = Field(ge=0)
    submission: str  # a path below the root
    cluster: str | None = None  # SLURM's ClusterName; claims of earlier versions do not say it
    slurm_conf: str | None = None  # SLURM_CONF of whoever submitted it


class Execution(Record):
    """Of a SLURM job, in `start.json`."""

    id: str
    queue_s: float | None = None  # it waited before this start, by SLURM's own times


class Start(Holder):
    """Of `attempts/NNNN/start.json`: who trains the run, or who has seen to it that nobody does."""

    withdrawn: str | None = None  # the state of an attempt that nobody will start
    job: Execution | None = None
    step: int | None = None  # of the newest checkpoint then
    code_version: str | None = None
    started_utc: str | None = None


class Exit(Record):
    """Of `attempts/NNNN/exit.json`: how it ended."""

    state: Literal["done", "paused", "failed", "interrupted", "cancelled"]
    reason: str | None = None
    requeued: bool = False
    left: bool = False  # the others of its group went on without it

    @property
    def may_go_on(self) -> bool:
        """Whether SLURM may go on with the run; then the queue says whether it will.

        Not where it was one of a group and left it: the group's job goes on without it.
        """
        return not self.left and (self.requeued or self.state == "interrupted")

    @property
    def goes_on_if_started(self) -> bool:
        """Whether the run goes on if SLURM starts its job again by itself: after a preemption, also one in which it failed."""
        return not self.left and self.state in ("failed", "interrupted")


class StartedJob(Record):
    """A job that a submission has started: a SLURM job (array), or a worker on this machine."""

    id: str = Field(pattern=r"^[0-9]+$")
    array: bool = True
    process: ProcessId | None = None  # of a worker

    def task(self, index: int) -> str:
        """SLURM's id of task `index`."""
        return f"{self.id}_{index}" if self.array else self.id


class Launch(Record):
    """Of `launch.json`: the helper that starts the jobs; without one, the submission was given up."""

    process: ProcessId | None = None


class Receipt(Record):
    """Of `receipt.json`: the jobs that were started; none if the submission was given up."""

    jobs: list[StartedJob]


class WantedRun(Record):
    """A run in an intent, or in the list of a sweep."""

    signature: str = Field(pattern=r"^[0-9a-f]{16}$")
    attempt: int | None = None  # in an intent: the one that is claimed


class Place(Record):
    """Where a sweep runs, as the user says it."""

    profile: str = "local"  # a shipped one, or the path of a YAML file
    data_dir: str | None = None

    @staticmethod
    def of_last_submission(submissions: Path) -> Place:
        """Where the sweep with that folder of submissions was sent last; the default before the first time."""
        for path in sorted(submissions.glob("*"), reverse=True):
            with suppress(RunError):
                if (intent := read_record(Intent, path / "intent.json")) and intent.place:
                    return intent.place
        return Place()

    def changed(self, profile: str | None, data_dir: str | None) -> Place:
        """This place, with what is given instead; files by their absolute paths."""
        if profile is not None and Path(profile).is_file():
            profile = os.path.realpath(profile)
        return Place(profile=profile or self.profile, data_dir=os.path.realpath(data_dir) if data_dir else self.data_dir)


class Intent(Record):
    """Of `intent.json`: the runs wanted, and those that train together, as indices into them."""

    token: str
    runs: list[WantedRun]
    tasks: list[list[int]] = Field([])
    launcher: ProcessId | None = None
    executor: str | None = None
    cluster: str | None = None  # SLURM's ClusterName
    code_version: str | None = None
    place: Place | None = None

    @classmethod
    def of(cls, submission: Path) -> Self:
        """That of a submission of which something has been started."""
        intent = read_record(cls, submission / "intent.json")
        assert intent is not None, "nothing is started before the intent is written"
        return intent

    @property
    def groups(self) -> list[list[int]]:
        """Its tasks; each run alone where an earlier version does not name any."""
        return self.tasks or [[index] for index in range(len(self.runs))]

    def signatures(self, task: int) -> list[str]:
        """The runs of a task; none of one that there is not."""
        indices = self.groups[task] if task < len(self.groups) else []
        return [self.runs[index].signature for index in indices if 0 <= index < len(self.runs)]


class RunsOfSweep(Record):
    """Of a sweep's `runs.json`: which runs it has."""

    runs: list[WantedRun]


def read_claim(path: Path) -> Claim | None:
    """A claim, a SlurmClaim where it is one; as `read_record`."""
    document = read_json(path)
    if document is None:
        return None
    return record_of(SlurmClaim if document.get("executor") == "slurm" else Claim, document, path)
