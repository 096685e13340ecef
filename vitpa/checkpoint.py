"""Checkpoints: a file appears whole or not at all, the two newest are kept, and only one that fits in all is believed.

They are written by a thread, so that the training goes on meanwhile. The bytes of the file are vitpa/checkpoint_file.py's.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vitpa import snapshot
from vitpa.checkpoint_file import CheckpointError, files_by_step, read_archive, step_of, write_archive
from vitpa.metrics_file import EMA_EVALUATED, EVALUATED
from vitpa.records import RunError
from vitpa.room import POLL_S, WAIT_S, is_full
from vitpa.rundir import RunDir

LOGGER = logging.getLogger(__name__)
KEEP = 2
READERS = 8  # of the checkpoints of runs that are trained together
SAY_EVERY_S = 60.0  # that a checkpoint waits for room
SLACK_BYTES = 2**30  # of a file, beside its tensors: the rows of metrics.jsonl


class OtherDataError(Exception):
    """A checkpoint of the run that was trained on other data; its path."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: was trained on other data")
        self.path = path


class Progress(BaseModel):
    """How far a run is, over all attempts."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: int = Field(0, ge=0)
    train_time_s: float = Field(0.0, ge=0)
    gpu_time_s: float = Field(0.0, ge=0)
    energy_j: float | None = Field(None, ge=0)  # of its GPUs; None: not known, as of steps without a counter
    code_versions: list[str] = []
    val: dict[str, float] = {}  # the newest evaluation
    wall_time_s: float = Field(0.0, ge=0)  # the last time in TensorBoard's files, in seconds since the epoch


class Checkpoint(BaseModel):
    """Everything that a run needs to go on. `metrics` are the rows of metrics.jsonl; None in files of earlier versions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)

    signature: str
    beton_sha256: dict[str, str]
    progress: Progress
    window: Tensor  # (3,) float64: sums of the open window of training metrics
    optimizer: dict[str, Any]  # torch.optim.AdamW's state_dict()
    model: dict[str, Tensor]
    metrics: str | None = None
    ema: dict[str, Tensor] | None = None  # the average of the parameters, with train.ema_decay

    def state(self) -> dict[str, Any]:
        """As plain data for torch.save."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if self.ema is None:
            del fields["ema"]
        return {**fields, "progress": self.progress.model_dump(exclude_none=True)}


@dataclass(frozen=True)
class Layout:
    """The tensors that a run's checkpoints hold, by name with type and shape, and how the optimiser groups its own.

    All of it follows from the configuration and the data, whose checksums are those of `Checkpoint`; None: of any data.
    """

    tensors: Mapping[str, tuple[torch.dtype, torch.Size]]
    groups: Sequence[Sequence[int]]
    total_steps: int
    beton_sha256: Mapping[str, str] | None = None

    @staticmethod
    def of(
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        total_steps: int,
        ema: Mapping[str, Tensor] | None = None,
        beton_sha256: Mapping[str, str] | None = None,
    ) -> Layout:
        """That of a model's and an optimiser's state_dict(), and of an average of the parameters if there is one."""
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in _tensors(model, optimizer, ema)}
        return Layout(tensors, [group["params"] for group in optimizer["param_groups"]], total_steps, beton_sha256)

    @property
    def evaluated(self) -> set[str]:
        """The metrics of an evaluation."""
        return {*EVALUATED, *(EMA_EVALUATED if any(name.startswith("ema ") for name in self.tensors) else ())}

    @property
    def max_bytes(self) -> int:
        """A bound of the size of a file."""
        return SLACK_BYTES + 2 * sum(dtype.itemsize * shape.numel() for dtype, shape in self.tensors.values())


def _tensors(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Any], ema: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"model {name}", tensor) for name, tensor in model.items())
    yield from ((f"ema {name}", tensor) for name, tensor in (ema or {}).items())
    for number, moments in optimizer["state"].items():
        yield from ((f"optimizer {number} {name}", tensor) for name, tensor in moments.items())


class Writer:
    """Writes checkpoints in a thread of its own, in the order of the calls; all checkpoints of a step at a time.

    While the disk is full it waits for room, and what was given to it after that waits, too.

    Attributes:
        waits_for_room: It is waiting now.
    """

    def __init__(self) -> None:
        self.waits_for_room = False
        self._waits_no_more = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: list[Future[object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait_no_more()
        self._pool.shutdown()  # what is under way is written to its end

    def save(self, run: RunDir, checkpoint: Checkpoint) -> None:
        """As the function `save`, but return at once. The tensors may change afterwards: they are copied."""
        step, state = checkpoint.progress.step, _on_host(checkpoint.state())
        self._submit(run, lambda: _write(run, step, state))

    def keep(self, run: RunDir, step: int, model: dict[str, Tensor]) -> None:
        """Write a snapshot of the weights after `step` steps, likewise."""
        weights = _on_host(model)
        self._submit(run, lambda: snapshot.write(run, step, weights))

    def afterwards(self, act: Callable[[], object]) -> None:
        """Call it when all that was given before is written, or has failed."""
        self._under_way.append(self._pool.submit(act))

    def wait(self) -> None:
        """Wait until all of them are written.

        Raises:
            OSError: one could not be written.
        """
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def wait_no_more(self) -> None:
        """Wait for no room any more: what cannot be written fails at once."""
        self._waits_no_more.set()

    def _submit(self, run: RunDir, write: Callable[[], object]) -> None:
        self._under_way.append(self._pool.submit(self._once_there_is_room, run, write))

    def _once_there_is_room(self, run: RunDir, write: Callable[[], object]) -> None:
        began_s, said_s = time.monotonic(), -math.inf
        try:
            while True:
                try:
                    write()
                    break
                except OSError as error:
                    now_s = time.monotonic()
                    if not is_full(error) or self._waits_no_more.is_set() or now_s > began_s + WAIT_S:
                        raise
                    if now_s > said_s + SAY_EVERY_S:
                        left = f"for {(began_s + WAIT_S - now_s) / 60:.0f} minutes more"
                        LOGGER.warning(f"{run.path}: no space left for a checkpoint; it waits for some, {left}")
                        said_s = now_s
                self.waits_for_room = True
                self._waits_no_more.wait(POLL_S)
            if self.waits_for_room:
                LOGGER.info(f"{run.path}: there is space again, and the checkpoint is written")
        finally:
            self.waits_for_room = False


def _on_host(state: Any) -> Any:
    """A copy of `state` with its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _on_host(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_on_host(value) for value in state]
    return state


def save(run: RunDir, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, and remove all but it and the one before."""
    return _write(run, checkpoint.progress.step, checkpoint.state())


def _write(run: RunDir, step: int, state: dict[str, Any]) -> Path:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = write_archive(run.checkpoints, buffer.getvalue(), run.signature, step)
    for unfinished in run.checkpoints.glob(".step_*.pt.*"):  # of attempts that were killed while they wrote
        with suppress(OSError):
            unfinished.unlink()
    try:
        found = files_by_step(run.checkpoints)
    except RunError:
        return path  # what is to go can go the next time
    kept = [each for each in sorted(found, reverse=True) if each <= step][:KEEP]  # beyond the step gone back to none is kept
    for other in set(found) - set(kept):
        with suppress(IsADirectoryError, PermissionError):  # nothing of ours
            found[other].unlink()
    return path


def load(path: Path, signature: str, layout: Layout | None = None) -> tuple[Checkpoint, bool]:
    """The checkpoint of the run `signature` in a file, its tensors on the CPU, and whether a checksum says that it is whole.

    Only a file of an earlier version of vitpa has none.

    Raises:
        CheckpointError: the file is damaged, of another run or step, or does not fit the run's `layout`.
        RunError: it cannot be read, which says nothing about what is in it.
        OtherDataError: it is whole, but of other data than `layout` is for.
    """
    archive, has_checksum = read_archive(path, signature, sys.maxsize if layout is None else layout.max_bytes)
    state = snapshot.unpacked(path, archive, "it is no checkpoint")
    try:
        checkpoint = Checkpoint.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"it is no checkpoint ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error
    if (checkpoint.metrics is not None) != has_checksum:
        raise CheckpointError("its checksum is missing: it was cut or changed")
    if checkpoint.signature != signature:
        raise CheckpointError(f"it is a checkpoint of another run ({checkpoint.signature})")
    if checkpoint.progress.step != step_of(path.name):
        raise CheckpointError(f"it is a checkpoint of step {checkpoint.progress.step}, which is not what its name says")
    if layout is not None and layout.beton_sha256 not in (None, checkpoint.beton_sha256):
        raise OtherDataError(path)  # before its layout, which may be another one for that alone
    if layout is not None and (reason := next(_misfits(checkpoint, layout), "")):
        raise CheckpointError(f"it does not fit the run: {reason}")
    return checkpoint, has_checksum


def _misfits(checkpoint: Checkpoint, layout: Layout) -> Iterator[str]:
    """What of a checkpoint a run of this layout cannot have written."""
    progress, optimizer = checkpoint.progress, checkpoint.optimizer
    if progress.step > layout.total_steps:
        yield f"step {progress.step} of {layout.total_steps}"
    if set(progress.val) not in (layout.evaluated, set()) or (progress.step == layout.total_steps and not progress.val):
        yield f"an evaluation of {', '.join(progress.val) or 'nothing'}"
    try:
        found = dict(_tensors(checkpoint.model, optimizer, checkpoint.ema))
        groups = [group["params"] for group in optimizer["param_groups"]]
        types = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    except (AttributeError, KeyError, TypeError):
        yield "the optimiser's state is not AdamW's"
        return
    for name in sorted({*types, *layout.tensors}):
        if types.get(name) != layout.tensors.get(name):
            yield f"{name} is {_type(types.get(name))}, the run's {_type(layout.tensors.get(name))}"
    if groups != layout.groups:
        yield "the optimiser groups its parameters otherwise"
    window = checkpoint.window
    if (window.dtype, window.shape) != (torch.float64, torch.Size([3])):
        yield f"window is {_type((window.dtype, window.shape))}"
    for name, tensor in [*found.items(), ("window", window)]:
        if tensor.numel():
            least, greatest = map(float, tensor.aminmax())  # both NaN if one value is
            if not (math.isfinite(least) and math.isfinite(greatest)):
                yield f"{name} is not finite"
            if name.endswith(("exp_avg_sq", "window")) and least < 0:
                yield f"{name} is negative"
        if name.endswith(" step") and tensor.item() != progress.step:
            yield f"{name} is {tensor.item():g} at step {progress.step}"


def _type(found: tuple[torch.dtype, torch.Size] | None) -> str:
    return "missing" if found is None else f"{str(found[0]).removeprefix('torch.')} {list(found[1])}"


def in_step(runs: Sequence[RunDir], layout: Layout | None = None) -> dict[int, tuple[Path, Checkpoint] | None]:
    """The runs of `runs`, by number, that can go on together, each with its checkpoint of one step (None: from the start).

    As many as possible, at the newest step for which that holds. What is not believed is warned about and set aside.
    A checkpoint has been read to be believed, so it is returned with its path, its tensors on the CPU.

    Raises:
        RunError: one cannot be read, as while a disk does not answer; it is not set aside, nor is another one used.
        OtherDataError: one was trained on other data than `layout` is for, likewise.
    """
    found = [files_by_step(run.checkpoints) for run in runs]
    for path in (path for run in runs for path in sorted(run.checkpoints.glob("step_*.pt")) if step_of(path.name) is None):
        LOGGER.warning(f"{path}: a checkpoint's name is step_, its step in nine digits, and .pt; it is passed over")

    @functools.cache
    def believed(number: int, step: int) -> Checkpoint | None:
        return _believed(runs[number], found[number][step], layout)

    best: dict[int, tuple[Path, Checkpoint] | None] = {}
    for step in sorted(set().union(*found), reverse=True):
        there = [number for number, paths in enumerate(found) if step in paths]
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as pool:
            states = pool.map(believed, there, itertools.repeat(step))
            together: dict[int, tuple[Path, Checkpoint] | None] = {
                number: (found[number][step], state) for number, state in zip(there, states, strict=True) if state is not None
            }
        if len(together) == len(runs):
            return together
        if len(together) > len(best):
            best = together
    fresh: dict[int, tuple[Path, Checkpoint] | None] = {
        number: None for number, steps in enumerate(found) if all(believed(number, step) is None for step in steps)
    }
    return fresh if len(fresh) > len(best) else best


def _believed(run: RunDir, path: Path, layout: Layout | None) -> Checkpoint | None:
    """The checkpoint in a file; None, with a warning, if it is not believed: then it is set aside."""
    try:
        checkpoint, has_checksum = load(path, run.signature, layout)
    except CheckpointError as error:
        aside = path.with_name(f"passed_over_{path.name}")  # so that nobody takes its step for one that was reached
        with suppress(OSError):
            path.rename(aside)
        where = f", and is {aside.name} now" if not path.exists() else ""
        LOGGER.warning(f"{path}: {error}; it is passed over{where}")
        return None
    if not has_checksum:
        what = "is of an earlier version of vitpa and carries no checksum of its own; its archive's CRCs fit, and it is used"
        LOGGER.warning(f"{path}: {what}")
    return checkpoint


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers in name order: equal if and only if bit-identical."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
