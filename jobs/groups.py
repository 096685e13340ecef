"""Which runs train together as replicas, in one process that takes one step for all of them.

A group is one task of a submission. Its runs differ in nothing that shapes the step (vitpa/together.py), have a checkpoint of
a common step (or none at all), and fit the memory of a GPU together. A run that nothing can be stacked with is a group of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, TypeVar

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.data.residency import replicas_unsupported_reason, streaming_setting
from vitpa.datasets import facts_of, num_held_out
from vitpa.records import RunError, read_json
from vitpa.rundir import RunDir
from vitpa.step.fit import memory_gib
from vitpa.together import MAX_REPLICAS, differing, may_differ, step_shape

ASSUMED_GPU_MEMORY_GIB = 16.0  # where nobody says; any GPU of a data centre has that
MAX_BY_ITSELF = 16  # replicas that `auto` puts into one step: the GPU is busy long before, and a job's end hits all of them
MostRuns = Callable[[RunConfig, int], int]
T = TypeVar("T")


def group_runs(configs: Sequence[RunConfig], most: MostRuns) -> list[list[int]]:
    """The groups of runs, as indices into `configs`, in the order of their first runs; in a group they keep their order.

    Args:
        configs: With the runtime section that they will run with.
        most: How many of so many runs of one shape may be in one group; a configuration stands for them.
    """
    groups = []
    for indices in by_shape(configs):
        size = most(configs[indices[0]], len(indices))
        same_steps = in_step([configs[index].run_dir for index in indices]) if size > 1 else [list(range(len(indices)))]
        for positions in same_steps:
            groups += evenly([indices[position] for position in positions], size)
    return sorted(groups)


def by_shape(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Runs that could share a step, as indices into `configs`."""
    alike: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        alike.setdefault(step_shape(config), []).append(index)
    return list(alike.values())


def in_step(runs: Sequence[RunDir]) -> list[list[int]]:
    """Runs that can go on together, as indices: those with a checkpoint of a common step, and those without any."""
    found: list[tuple[set[int], list[int]]] = []
    for index, run in enumerate(runs):
        steps = run.checkpoint_steps()
        for position, (common, indices) in enumerate(found):
            if common & steps or not (common or steps):
                found[position] = (common & steps, [*indices, index])
                break
        else:
            found.append((steps, [index]))
    return [indices for _, indices in found]


def notes_on_steps(configs: Sequence[RunConfig], groups: Sequence[Sequence[int]], most: MostRuns) -> list[str]:
    """How runs that differ in more than the seed share steps, and what keeps them from sharing more; for people.

    Of each network and data set by itself, since those are never mixed. `groups` and `most` as for `group_runs`.
    """
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    networks: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        networks.setdefault(f"{config.dataset} {config.network_name}", []).append(index)
    told: dict[str, list[str]] = {}
    for name, indices in networks.items():
        runs = [configs[index] for index in indices]
        keys = differing(runs)
        size, steps = most(runs[0], len(runs)), len({group_of[index] for index in indices})
        if size == 1 or keys in ([], ["seed"]):
            continue
        line = f"{len(runs)} runs that differ in {', '.join(keys)} train in {steps} step{'s' if steps > 1 else ''}"
        shaping, needed = [key for key in keys if not may_differ(key)], math.ceil(len(runs) / size)
        if shaping and steps > needed:
            line += f"; {needed} would do, but for {', '.join(shaping)}, which shape{'s' if len(shaping) == 1 else ''} a step"
        told.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in told.items()]


def evenly(items: Sequence[T], most: int) -> list[list[T]]:
    """`items` in as few parts of at most `most` as will do, of sizes that differ by one at the most."""
    parts = math.ceil(len(items) / most)
    size, larger = divmod(len(items), parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + size + (part < larger))
    return [list(items[begin:end]) for begin, end in itertools.pairwise(ends)]


def most_replicas(
    config: RunConfig, runs: int, wanted: int | Literal["auto"], *, processes: int, gpu_memory_gib: float | None
) -> int:
    """How many of so many runs of one shape may train together.

    Args:
        config: Of one of them, with the runtime section that they will run with.
        runs: At most so many.
        wanted: As the profile says it.
        processes: Training processes of a run; several of them cannot train replicas.
        gpu_memory_gib: Of the GPU that they will have; None if they will have none.

    Raises:
        ConfigError: so many processes cannot train such a run.
    """
    if reason := config.processes_unsupported_reason(processes):
        raise ConfigError(f"{reason}; give each of its runs one GPU in the profile")
    if processes > 1 or unsupported_reason(config) is not None:
        return 1
    if wanted != "auto":
        return min(wanted, MAX_REPLICAS)
    images = num_images(config, "train")
    if gpu_memory_gib is None or config.runtime.device == "cpu" or images is None:
        return 1
    share_gib = gpu_memory_gib / config.runtime.runs_per_gpu
    counts = range(1, min(runs, MAX_BY_ITSELF) + 1)
    return max((count for count in counts if memory_gib(config, count, images) <= share_gib), default=1)


def unsupported_reason(config: RunConfig) -> str | None:
    """Why a run of this configuration has to train alone; None if others can train with it."""
    reason, size = replicas_unsupported_reason(config), facts_of(config.dataset).image_size_px
    if reason is None and streaming_setting(config, [None if size is None else (size, size)]) is not None:
        return f"{config.dataset}: its images may not stay on the device as they are; say so with runtime.loader=resident"
    return reason


def num_images(config: RunConfig, split: Literal["train", "val"]) -> int | None:
    """Images of a split of the run's data set, from the manifest or else from the table."""
    if config.train.holdout:
        return _part_of_train(config, split)
    facts = facts_of(config.dataset)
    known = facts.num_train if split == "train" else facts.num_val
    try:
        found = (read_json(config.runtime.data_path / config.dataset / f"{split}.json") or {}).get("num_samples")
    except RunError:
        return known
    return found if isinstance(found, int) else known


def _part_of_train(config: RunConfig, split: Literal["train", "val"]) -> int | None:
    """The same where a part of train replaces val; without a manifest as if train were of one class."""
    known = facts_of(config.dataset).num_train
    counts = None if known is None else [known]
    with suppress(RunError):
        counts = (read_json(config.runtime.data_path / config.dataset / "train.json") or {}).get("class_counts", counts)
    if not isinstance(counts, list):
        return None
    held_out = sum(num_held_out(count, config.train.holdout) for count in counts)
    return held_out if split == "val" else sum(counts) - held_out
