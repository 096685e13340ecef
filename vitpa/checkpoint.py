"""Checkpoints: a file appears whole or not at all, the two newest are kept, a damaged one is passed over."""

from __future__ import annotations

import functools
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
    path = in_step([run])[0]
    return None if path is None else (path, load(path))


def in_step(runs: Sequence[RunDir]) -> dict[int, Path | None]:
    """Those of `runs`, by number, that can go on together, each with its checkpoint of one step (None: from the start).

    As many as possible, at the newest step for which that holds. A checkpoint that cannot be read is warned about.
    """
    readable = functools.cache(_is_readable)
    found = [{path.name: path for path in _newest_first(run)} for run in runs]
    best: dict[int, Path | None] = {}
    for name in sorted(set().union(*found), reverse=True):
        together: dict[int, Path | None] = {
            number: paths[name] for number, paths in enumerate(found) if name in paths and readable(paths[name])
        }
        if len(together) == len(runs):
            return together
        if len(together) > len(best):
            best = together
    fresh: dict[int, Path | None] = {
        number: None for number, paths in enumerate(found) if not any(readable(path) for path in paths.values())
    }
    return fresh if len(fresh) > len(best) else best


def _is_readable(path: Path) -> bool:
    try:
        load(path)
    except Exception as error:  # torch.load raises many types on damaged files
        name = type(error).__name__  # torch's text has many lines and advises to run code from the file
        warnings.warn(f"{path}: cannot be read ({name}); it is passed over", RuntimeWarning, stacklevel=2)
        return False
    return True


def _newest_first(run: RunDir) -> list[Path]:
    return sorted(run.checkpoints.glob("step_*.pt"), reverse=True)


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers in name order: equal if and only if bit-identical."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
