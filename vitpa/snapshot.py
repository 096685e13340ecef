"""Snapshots: the weights alone after the epochs of `runtime.keep_epochs`, for `vitpa analyze`; no training goes on from one.

The bytes of the file are vitpa/checkpoint_file.py's, its name says the step.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitpa.checkpoint_file import CheckpointError, files_by_step, read_archive, unreadable, write_archive
from vitpa.rundir import RunDir

LOGGER = logging.getLogger(__name__)
SLACK_BYTES = 2**24  # of a file, beside its tensors


def write(run: RunDir, step: int, model: dict[str, Tensor]) -> Path:
    """Write the weights after `step` steps, a model's state_dict() on the CPU."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return write_archive(run.snapshots, buffer.getvalue(), run.signature, step)


def not_kept(run: RunDir, epochs: Iterable[int], epoch_steps: int, step: int) -> str:
    """A line about those of `epochs` that a run at `step` has behind it and no snapshot of; empty if there are none."""
    there = files_by_step(run.snapshots)
    past = [str(epoch) for epoch in epochs if epoch * epoch_steps <= step and epoch * epoch_steps not in there]
    which = f"runtime.keep_epochs: the run is past epoch {', '.join(past)}"
    return f"{run.path}: {which}, and the weights were not kept then" if past else ""


def set_aside(run: RunDir, *, beyond: int) -> None:
    """Rename the snapshots after more than `beyond` steps: an earlier training wrote them, which the run has not gone on from.

    The training writes those of its own again. On the way from step 0 they may be of other data.

    Raises:
        RunError, OSError: it cannot be done.
    """
    earlier = [path for step, path in files_by_step(run.snapshots).items() if step > beyond]
    for path in earlier:
        path.replace(path.with_name(f"passed_over_{path.name}"))
    if earlier:
        what = f"{len(earlier)} snapshot{'s' * (len(earlier) > 1)} of an earlier training beyond step {beyond}"
        LOGGER.warning(f"{run.snapshots}: {what} passed over, and called passed_over_... now")


def read(path: Path, signature: str, like: dict[str, Tensor]) -> dict[str, Any]:
    """The weights in a snapshot of the run `signature`, whose model has the tensors `like`.

    Raises:
        CheckpointError: the file is damaged, of another run or step, or does not fit.
        RunError: it cannot be read, which says nothing about what is in it.
    """
    most = SLACK_BYTES + 2 * sum(tensor.element_size() * tensor.numel() for tensor in like.values())
    archive, has_checksum = read_archive(path, signature, most)
    if not has_checksum:
        raise CheckpointError("its checksum is missing: it was cut or changed")
    model = unpacked(path, archive, "it holds no weights")
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in like.items()}
    if not isinstance(model, dict) or {name: (each.dtype, each.shape) for name, each in model.items()} != shapes:
        raise CheckpointError("its tensors are not those of the run's model")
    return model


def unpacked(path: Path, archive: bytes, otherwise: str) -> Any:
    """What torch wrote into the archive of the file at `path`, its tensors on the CPU.

    Raises:
        CheckpointError: torch cannot have written it; the message begins with `otherwise`.
        RunError: there is no memory for it.
    """
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from error
    except Exception as error:  # of many types on damaged files; the text has lines and advises to run their code
        if "DefaultCPUAllocator" in str(error):  # torch's own for a tensor that there is no memory for
            raise unreadable(path, MemoryError()) from error
        raise CheckpointError(f"{otherwise} ({type(error).__name__})") from error
