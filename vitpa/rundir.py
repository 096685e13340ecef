"""The run directory: its paths, the records kept in it, and how two processes agree on who runs what.

This is the contract between the trainer, which writes a run, and `jobs`, which starts and reads it. Everything works on
NFS: records appear whole or not at all (temporary file, fsync, rename or link), claims are exclusive creations, and no
clock of one host is compared with another's.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitpa.checkpoint_file import files_by_step, is_plausible
from vitpa.metrics_file import EMA_EVALUATED, EVALUATED, last_evaluation
from vitpa.records import CHECKSUM, Json, RunError, make_folders, read_checked, sync_folder, write_atomic, write_json

TAKEN = (errno.EEXIST, errno.ENOTEMPTY)  # a folder that holds something cannot be replaced by another one
CLAIMED = "VITPA_ATTEMPT"  # environment variable: the attempt that a launcher has claimed and whose records it keeps


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Result(BaseModel):
    """`result.json`: it exists if and only if the run is finished and valid. Metrics are fractions, losses finite."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    signature: str
    dataset: str
    attention: str
    seed: int
    epochs: int = Field(ge=0)
    steps: int = Field(ge=0)
    val_top1: float = Field(ge=0, le=1)
    val_top5: float = Field(ge=0, le=1)
    val_loss: float = Field(ge=0)
    train_time_s: float = Field(ge=0)
    gpu_hours: float = Field(ge=0)
    images_per_s: float = Field(ge=0)
    attempts: int = Field(ge=1)
    weights_sha256: Sha256
    code_version: str = Field(min_length=1)
    beton_sha256: dict[str, Sha256] = Field(min_length=1)
    finished_utc: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")
    ema_val_top1: float | None = Field(None, ge=0, le=1)  # of the average of train.ema_decay, which then counts
    ema_val_top5: float | None = Field(None, ge=0, le=1)
    ema_val_loss: float | None = Field(None, ge=0)
    holdout: float | None = Field(None, ge=0, le=0.5)  # share of train that val_* are of; 0: val; older ones have none
    energy_j: float | None = Field(None, ge=0)  # its share of what its GPUs took; None: not all of it was counted
    config_sha256: Sha256 | None = None  # of the bytes of config.yaml; older ones have none

    @property
    def top1(self) -> float:
        """The accuracy that counts, a fraction: that of the weights' average if the run keeps one, else val_top1."""
        return self.val_top1 if self.ema_val_top1 is None else self.ema_val_top1

    @property
    def top5(self) -> float:
        """The top-5 accuracy that counts."""
        return self.val_top5 if self.ema_val_top5 is None else self.ema_val_top5

    @property
    def loss(self) -> float:
        """The loss that counts."""
        return self.val_loss if self.ema_val_loss is None else self.ema_val_loss


class Pause(BaseModel):
    """`paused.json`: what the run had taken when it paused last, with a checkpoint. Its accuracy is in metrics.jsonl."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    signature: str
    epoch: int = Field(ge=1)  # whole epochs done
    step: int = Field(ge=1)
    train_time_s: float = Field(ge=0)
    gpu_hours: float = Field(ge=0)
    utc: str


class Below:
    """A path below that of its owner, made when asked for: a sweep of thousands of runs looks at two or three of each."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: AttemptDir | RunDir, kind: object) -> Path:
        """The path."""
        return owner.path / self._name


class AttemptDir:
    """`attempts/0001`: one execution of a run. It belongs to the process that claimed it."""

    claim_json = Below("claim.json")  # who may run it; there from the first moment
    config_yaml = Below("config.yaml")  # the run's, with the `runtime` that a sweep trains it with
    start_json = Below("start.json")  # written by the process that runs it
    env_json = Below("env.json")  # versions and hardware it ran with
    seconds_json = Below("seconds.json")  # by the trainer: where its time went
    exit_json = Below("exit.json")  # how it ended; missing if it was killed
    left_json = Below("left.json")  # by the trainer: the run was dropped, those trained with it go on
    stop_json = Below("stop.json")  # the file `stop`, taken by whom it was meant for
    log = Below("log.txt")  # everything the training processes print

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = int(path.name)


class RunDir:
    """All paths of a run. Nothing is created until something is written."""

    config_yaml = Below("config.yaml")  # the resolved configuration
    env_json = Below("env.json")  # what the run was made with: code, versions, hardware, data
    metrics_jsonl = Below("metrics.jsonl")  # the record of the training, a row per line
    tensorboard = Below("tb")  # a view of the record for TensorBoard
    checkpoints = Below("checkpoints")  # where the training goes on from
    snapshots = Below("snapshots")  # weights after the epochs of runtime.keep_epochs, for `vitpa analyze`
    result_json = Below("result.json")  # there if and only if the run is finished
    paused_json = Below("paused.json")  # what it had taken at its last pause, after runtime.stop_after_epoch
    stop = Below("stop")  # a request to stop
    attempts_dir = Below("attempts")  # one folder for each execution

    def __init__(self, root: Path, signature: str) -> None:
        self.signature = signature
        self.path = root.joinpath("runs", signature)

    def attempt(self, number: int) -> AttemptDir:
        """One of them."""
        return AttemptDir(self.attempts_dir / f"{number:04d}")

    def attempts(self) -> list[AttemptDir]:
        """The attempts so far, oldest first.

        Raises:
            RunError: their folder cannot be read, or is none.
        """
        directory = self.attempts_dir
        try:
            names = os.listdir(directory)  # noqa: PTH208 - a third of the time of Path.iterdir, for thousands of runs
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not directory.is_symlink():
                return []
            hint = "restore it, or move the run's directory away to train the run again"
            raise RunError(f"{directory}: cannot be read ({error.strerror}); {hint}") from error
        found = [AttemptDir(directory / name) for name in names if name.isascii() and name.isdigit()]
        return sorted(found, key=lambda attempt: attempt.number)

    def checkpoint_steps(self) -> set[int]:
        """Steps done at each of the checkpoints that are kept, by their names and last lines; damage inside is not seen."""
        try:
            found = files_by_step(self.checkpoints)
        except RunError:  # it is the trainer's to say
            return set()
        return {step for step, path in found.items() if is_plausible(path, self.signature)}

    def newest_step(self) -> int:
        """Steps done at the newest checkpoint; 0 without one."""
        return max(self.checkpoint_steps(), default=0)

    def claim_attempt(self, number: int, claim: Json, config: bytes | str = "") -> AttemptDir | None:
        """Make attempt `number` mine, with `claim`, and `config` if given, as its files; None if another process was faster.

        A claim is made for the number after the last attempt that the caller has looked at, so that whatever happened
        since then makes it fail: of several processes that saw the same state exactly one gets the run.
        """
        make_folders(self.attempts_dir)
        draft = self.attempts_dir / f".claim-{secrets.token_hex(8)}"
        draft.mkdir()
        write_json(draft / "claim.json", claim)
        if config:
            write_atomic(draft / "config.yaml", config)
        target = self.attempt(number)
        try:
            draft.rename(target.path)  # refused where the target holds anything, and it always holds a claim
        except OSError as error:
            shutil.rmtree(draft)
            if error.errno not in TAKEN:  # on NFS this host may not see for a while what is there
                raise
            return None
        sync_folder(self.attempts_dir)
        return target

    def result(self) -> Result | None:
        """The run's result; None if it is not finished. It is compared with the other records of the run.

        Raises:
            RunError: there is a result.json that cannot be trusted; the message says why.
        """
        hint = "delete it to train the run again"
        try:
            document, checked = read_checked(self.result_json)
        except RunError as error:
            raise RunError(f"{error}; {hint}") from error
        if document is None:
            return None
        try:
            result = Result.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise RunError(f"{self.result_json}: {field}: {first['msg']}; {hint}") from error
        if result.signature != self.signature:
            raise RunError(f"{self.result_json}: belongs to run {result.signature}, not {self.signature}; {hint}")
        contradiction = self._contradiction_of_metrics(result) or self._contradiction_of_environment(result, checked)
        if contradiction:
            advice = f"restore what was changed, or {hint} from its last checkpoint on"
            raise RunError(f"{self.result_json}: {contradiction}; {advice}")
        return result

    def paused(self) -> Pause | None:
        """Its last pause; None if there was none.

        Raises:
            RunError: its record cannot be trusted.
        """
        hint = "delete it and submit again"
        try:
            document, _ = read_checked(self.paused_json)
            pause = None if document is None else Pause.model_validate(document)
        except RunError as error:
            raise RunError(f"{error}; {hint}") from error
        except ValidationError as error:
            raise RunError(f"{self.paused_json}: no usable `{error.errors()[0]['loc'][0]}` in it; {hint}") from error
        if pause is not None and pause.signature != self.signature:
            raise RunError(f"{self.paused_json}: belongs to run {pause.signature}, not {self.signature}; {hint}")
        return pause

    def _contradiction_of_metrics(self, result: Result) -> str:
        """What of a result the last evaluation in metrics.jsonl contradicts; empty if nothing does."""
        path = self.metrics_jsonl
        name = path.name
        try:
            row = last_evaluation(path, with_crc=result.config_sha256 is not None)
        except OSError as error:
            return f"cannot be verified: {name} cannot be read ({error.strerror})"
        if row is None:
            return f"cannot be verified: the end of {name} is damaged, or holds no evaluation"
        metrics = {name: getattr(result, name.replace("/", "_")) for name in (*EVALUATED, *EMA_EVALUATED)}
        says = {"step": result.steps, **metrics}
        for key, value in says.items():
            if row.get(key) != value:
                return f"says {key} {value}, the last evaluation in {name} {row.get(key)}"
        return ""

    def _contradiction_of_environment(self, result: Result, checked: bool) -> str:
        """What of a result env.json contradicts; empty if nothing does.

        Args:
            result: Of the run.
            checked: Whether it had a checksum. The versions that write one write it in both files, and `config_sha256`, too.
        """
        path = self.env_json
        name = path.name
        try:
            made_with, env_checked = read_checked(path)
        except RunError as error:
            return str(error)
        if made_with is None:
            return f"cannot be verified: {name} is missing"
        if not checked and (env_checked or result.config_sha256 is not None):
            return f"was changed after it was written; its {CHECKSUM} is gone"
        if checked and not env_checked:
            return f"cannot be verified: {name} was changed after it was written; its {CHECKSUM} is gone"
        return _difference(result, made_with, name)


def _difference(result: Result, made_with: Json, name: str) -> str:
    """What a result says otherwise than the environment it was made with, of the file `name`; empty if nothing."""
    known: dict[str, tuple[Any, Any]] = {  # each with what is allowed
        "code_version": (result.code_version, result.code_version.split(", ")),
        "beton_sha256": (result.beton_sha256, [result.beton_sha256]),
        "steps_total": (result.steps, [result.steps]),
    }
    for key, (value, allowed) in known.items():
        if key not in made_with:
            return f"cannot be verified: {name} has no {key}"
        if made_with[key] not in allowed:
            return f"says {key} {value}, {name} {made_with[key]}"
    return ""
