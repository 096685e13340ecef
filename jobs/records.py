"""The records of a submission that are read again, as types; what else they hold is for people.

A record that has been cut or edited is one line that names it, whatever is wrong with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpa.records import ProcessId, RunError, read_json

RESTORE = "it was edited by hand: restore it, or start the run again with `vitpa sweep retry`"

RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """What is read of a JSON file; other keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class SlurmClaim(Record):
    """Of `attempts/NNNN/claim.json`: which task of which submission has the run."""

    token: str
    index: int = Field(ge=0)
    submission: str  # a path below the root
    cluster: str | None = None  # SLURM's ClusterName; claims of earlier versions do not say it
    slurm_conf: str | None = None  # SLURM_CONF of whoever submitted it


class StartedJob(Record):
    """A job that a submission has started: a SLURM job (array), or a worker on this machine."""

    id: str = Field(pattern=r"^[0-9]+$")
    array: bool = True
    process: ProcessId | None = None  # of a worker

    def task(self, index: int) -> str:
        """SLURM's id of task `index`."""
        return f"{self.id}_{index}" if self.array else self.id


class Receipt(Record):
    """Of `receipt.json`: the jobs that were started; none if the submission was given up."""

    jobs: list[StartedJob]


class WantedRun(Record):
    """A run in an intent, or in the list of a sweep."""

    signature: str = Field(pattern=r"^[0-9a-f]{16}$")


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
        *names, last = [f"`{name}`" for name, field in model.model_fields.items() if field.is_required()]
        needed = f"{', '.join(names)} and {last}" if names else last
        raise RunError(f"{path}: no usable {needed} in it; {RESTORE}") from error
