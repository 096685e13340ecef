"""The file of an experiment, NAME.json: settings, what was measured, and the state from which the same command goes on.

Numbers in JSON are float64 to the last bit, so that an experiment that goes on is the one that was never interrupted.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitpa.code_version import code_version
from vitpa.errors import UserError
from vitpa.records import RunError, read_checked, to_json, with_checksum, write_atomic
from vitpa.theory.descent import State
from vitpa.theory.experiments import Descent
from vitpa.theory.model import Form, Gradients, loss_and_gradients

FORMAT = 1
LONG = ("rows", "state")  # what `--json` does not print
SAVE_S = 20.0  # between two writes of the file


class TheoryError(UserError):
    """An experiment that cannot go on."""


def carried_out(
    experiment: Descent, path: Path, summary: Callable[[State], dict[str, Any]], progress: Callable[[State], object]
) -> State:
    """Take all steps that are missing in `path`; however that ends, what was done is in the file.

    Raises:
        RunError: the file belongs to other settings, or cannot be read.
        TheoryError: the loss is no longer finite.
        OSError: the file cannot be written.
    """
    found, versions = read_state(experiment, path)
    state = found or experiment.start()
    versions = list(dict.fromkeys([*versions, code_version()]))
    if experiment.finished(state):
        return state
    check_memory(experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seeds run beside one another instead
    try:
        with ThreadPoolExecutor(threads) as pool:
            data, gradients, saved_at = experiment.data(), in_threads(pool), time.monotonic()
            while not experiment.finished(state):
                state = checked(experiment.advance(state, data, gradients))
                progress(state)
                if time.monotonic() > saved_at + SAVE_S:
                    write_state(experiment, path, state, summary, versions)
                    saved_at = time.monotonic()
    finally:
        torch.set_num_threads(threads)
        write_state(experiment, path, state, summary, versions)
    return state


def in_threads(pool: ThreadPoolExecutor) -> Gradients:
    """`loss_and_gradients`, a seed at a time in each thread; the numbers do not depend on how many there are."""

    def gradients(form: Form, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seeds = zip(*(each.split(1) for each in tensors), strict=True)
        parts = pool.map(lambda seed: loss_and_gradients(form, *seed), seeds)
        loss, of_A, of_v = (torch.cat(each) for each in zip(*parts, strict=True))
        return loss, of_A, of_v

    return gradients


def checked(state: State) -> State:
    """The state, if its numbers are finite.

    Raises:
        TheoryError: they are not.
    """
    measured = [value for row in state.rows[-1:] for value in row.values() if isinstance(value, float)]
    if all(bool(torch.isfinite(each).all()) for each in state.tensors.values()) and all(map(math.isfinite, measured)):
        return state
    raise TheoryError(f"gradient descent diverged at step {state.step}; choose another --out and a smaller --max-lr")


def check_memory(experiment: Descent) -> None:
    """Refuse what does not fit.

    Raises:
        TheoryError: the samples are larger than the memory.
    """
    problem = experiment.problem()
    needed_gib = 8 * experiment.seeds * experiment.samples * problem.patches * problem.dim / 2**30
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed_gib > 0.9 * memory_gib:
        raise TheoryError(
            f"the samples take {needed_gib:,.1f} GiB, this machine has {memory_gib:,.1f}; choose fewer --samples or --seeds"
        )


def settings_of(experiment: Descent) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(experiment).items()}


def write_state(
    experiment: Descent, path: Path, state: State, summary: Callable[[State], dict[str, Any]], versions: list[str]
) -> None:
    """Write the file."""
    document = {
        "format": FORMAT,
        "experiment": path.stem,
        "settings": settings_of(experiment),
        "finished": experiment.finished(state),
        "code_versions": versions,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "summary": summary(state),
        "rows": list(state.rows),
        "state": {
            "step": state.step,
            "time": state.time,
            "next_row": state.next_row,
            **{name: each.tolist() for name, each in state.tensors.items()},
        },
    }
    write_atomic(path, to_json(with_checksum(document)))


def read_state(experiment: Descent, path: Path) -> tuple[State | None, list[str]]:
    """The state in the file, None if there is none, and the versions of the code that it comes from.

    Raises:
        RunError: it belongs to other settings, or cannot be read.
    """
    document, has_checksum = read_checked(path)
    if document is None:
        return None, []
    if not has_checksum or document.get("format") != FORMAT or document.get("experiment") != path.stem:
        raise RunError(
            f"{path}: not written by this version of `vitpa theory {path.stem}`; choose another --out, or remove it"
        )
    ours, theirs = settings_of(experiment), document["settings"]
    other = [f"{key} {theirs.get(key)} instead of {value}" for key, value in ours.items() if theirs.get(key) != value]
    if other:
        raise RunError(f"{path} has other settings ({', '.join(other)}); choose another --out, or remove it to begin anew")
    found = document["state"]
    tensors = {name: torch.tensor(found[name], dtype=torch.float64) for name in ("A", "v")}
    state = State(found["step"], found["time"], found["next_row"], tensors, tuple(document["rows"]))
    return state, document["code_versions"]
