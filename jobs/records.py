"""The records of submissions and attempts that are read again, as types; what else they hold is for people.

A record that has been cut or edited is one line that names it, whatever is wrong with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpa.records import ProcessId, RunError, read_json

RESTORE = "it was edited by hand: restore it, or start the run again with `vitpa sweep retry`"

RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """What is read of a JSON file; other keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Claim(Record):
    """Of `attempts/NNNN/claim.json`: who has the run."""

    process: ProcessId  # that claimed it: the launcher of a submission, or `vitpa train`
    executor: str | None = None  # slurm, local; None: `vitpa train`
    submission: str | None = None  # a path below the root
    sweep: str | None = None


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


class Start(Record):
    """Of `attempts/NNNN/start.json`: who trains the run, or who has seen to it that nobody does."""

    process: ProcessId
    withdrawn: str | None = None  # the state of an attempt that nobody will start
    job: Execution | None = None
    step: int | None = None  # of the newest checkpoint then


class Exit(Record):
    """Of `attempts/NNNN/exit.json`: how it ended."""

    state: Literal["done", "failed", "interrupted", "cancelled"]
    reason: str | None = None
    requeued: bool = False
    left: bool = False  # the others of its group went on without it

    @property
    def may_go_on(self) -> bool:
        """Whether SLURM may go on with the run; then the queue says whether it will.

        Not where it was one of a group and left it: the group's job goes on without it.
        """
        return not self.left and (self.requeued or self.state == "interrupted")


class Left(Record):
    """Of `attempts/NNNN/left.json`: the trainer goes on without the run."""

    state: str  # failed, stopped, apart
    reason: str
    utc: str | None = None


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


class Intent(Record):
    """Of `intent.json`: the runs wanted, and those that train together, as indices into them."""

    token: str
    runs: list[WantedRun]
    tasks: list[list[int]] = []

    def signatures(self, task: int) -> list[str]:
        """The runs of a task; none of one that there is not."""
        tasks = self.tasks or [[index] for index in range(len(self.runs))]
        indices = tasks[task] if task < len(tasks) else []
        return [self.runs[index].signature for index in indices if 0 <= index < len(self.runs)]


class RunsOfSweep(Record):
    """Of a sweep's `runs.json`: which runs it has."""

    runs: list[WantedRun]


def read_record(model: type[RecordT], path: Path) -> RecordT | None:
    """A record; None if there is no such file.

    Raises:
        RunError: it has been cut or edited.
    """
    document = read_json(path)
    return None if document is None else record_of(model, document, path)


def record_of(model: type[RecordT], document: dict[str, Any], path: Path) -> RecordT:
    """A document that was read from `path` as a record.

    Raises:
        RunError: it has been edited.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        *names, last = dict.fromkeys(f"`{each['loc'][0]}`" for each in error.errors())
        bad = f"{', '.join(names)} and {last}" if names else last
        raise RunError(f"{path}: no usable {bad} in it; {RESTORE}") from error
