"""Checkpoints: a file appears whole or not at all, the two newest are kept, a damaged one is passed over."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitpa.rundir import RunDir, write_atomic

KEEP = 2


def save(run: RunDir, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, dicts and lists of them) as the checkpoint after `step` steps."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = run.checkpoints / f"step_{step:09d}.pt"
    write_atomic(path, buffer.getvalue())
    found = _newest_first(run)
    kept = [each for each in found if each.name <= path.name][:KEEP]  # a damaged one may lie beyond the step gone back to
    for other in set(found) - set(kept):
        other.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, its tensors on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_newest(run: RunDir) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with its path; None if there is none. A damaged one is warned about."""
    newest = load_newest_common([run])
    return None if newest is None else newest[0]


def load_newest_common(runs: Sequence[RunDir]) -> list[tuple[Path, dict[str, Any]]] | None:
    """The checkpoints of the newest step at which all of `runs` have one that can be read, with their paths.

    None if there is no such step. A damaged one is warned about.
    """
    names = [{path.name for path in _newest_first(run)} for run in runs]
    for name in sorted(set.intersection(*names), reverse=True):
        loaded = [(run.checkpoints / name, _load_or_warn(run.checkpoints / name)) for run in runs]
        found = [(path, state) for path, state in loaded if state is not None]
        if len(found) == len(runs):
            return found
    return None


def _load_or_warn(path: Path) -> dict[str, Any] | None:
    try:
        return load(path)
    except Exception as error:  # torch.load raises many types on damaged files
        name = type(error).__name__  # torch's text has many lines and advises to run code from the file
        warnings.warn(f"{path}: cannot be read ({name}); going back to the one before", RuntimeWarning, stacklevel=4)
        return None


def _newest_first(run: RunDir) -> list[Path]:
    return sorted(run.checkpoints.glob("step_*.pt"), reverse=True)


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers in name order: equal if and only if bit-identical."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
