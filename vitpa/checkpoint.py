"""Checkpoints: a file appears whole or not at all, the two newest are kept, a damaged one is passed over.

They are written by a thread, so that the training goes on meanwhile.
"""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from vitpa.rundir import RunDir, write_atomic

KEEP = 2


class Writer:
    """Writes checkpoints in a thread of its own, in the order of the calls; those of one step at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: list[Future[Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()  # what is under way is written to its end

    def save(self, run: RunDir, step: int, state: dict[str, Any]) -> None:
        """As the function `save`, but return at once. `state` may change afterwards: it is copied."""
        self._under_way.append(self._pool.submit(save, run, step, _on_host(state)))

    def wait(self) -> None:
        """Wait until all of them are written.

        Raises:
            OSError: one could not be written.
        """
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()


def _on_host(state: Any) -> Any:
    """A copy of `state` with its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _on_host(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_on_host(value) for value in state]
    return state


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
