"""Where the runs of a training go on: which of their checkpoints fit together, and taking over the state in them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitpa import checkpoint, snapshot
from vitpa.attempt import record_left
from vitpa.checkpoint import Checkpoint, OtherDataError
from vitpa.checkpoint_file import CheckpointError, step_of
from vitpa.environment import environment
from vitpa.records import RunError, with_checksum, write_json
from vitpa.together import settings_apart
from vitpa.training import Training

LOGGER = logging.getLogger(__name__)


def resume_points(t: Training) -> tuple[dict[int, Path | None], dict[Path, Checkpoint]]:
    """Choose the runs that are trained now: their numbers, each with the checkpoint it resumes from (None: from the start).

    They must be at the same step. The others leave: they are resumed apart, when they are started again.

    Returns:
        the same in all processes; and, in the main process, which chooses, what it has read of these checkpoints.

    Raises:
        RunError: in all processes, if a checkpoint cannot be read now, or is of other data.
    """
    points: dict[int, tuple[Path, Checkpoint] | None] = {}
    refused = ""
    if t.group.is_main:
        try:
            points = _points(t)
        except RunError as error:
            refused = str(error)
        except OtherDataError as error:
            refused = (
                f"{error.path}: was trained on other data than {t.config.runtime.data_dir}/{t.config.dataset} holds now; "
                f"restore that data, or remove {error.path.parent.parent} to start again"
            )
    paths, refused = t.group.broadcast(({number: point and point[0] for number, point in points.items()}, refused))
    if refused:
        raise RunError(refused)
    return paths, dict(point for point in points.values() if point is not None)


def _points(t: Training) -> dict[int, tuple[Path, Checkpoint] | None]:
    points = checkpoint.in_step([replica.run for replica in t.replicas], layout(t))
    at = next(iter(points.values()))
    step = "the start" if at is None else f"step {step_of(at[0].name)}"
    for number, replica in enumerate(t.replicas):
        if number not in points:
            reason = f"the others go on from {step}, where it has no checkpoint that can be read; train it apart from them"
            LOGGER.info(f"{replica.name} is left out: {reason}")
            record_left(replica.run, "apart", reason)
    return points


def layout(t: Training) -> checkpoint.Layout:
    """The tensors that a checkpoint of any of the runs has, since what differs between them has no tensors."""
    model, steps = t.replicas[0].model.state_dict(), t.steps
    return checkpoint.Layout.of(model, steps.optimizer_state(0, 0), t.total_steps, steps.ema_state(0), t.data.beton_sha256)


def resume(t: Training, paths: Sequence[Path], states: Mapping[Path, Checkpoint]) -> None:
    """Continue from the checkpoints, if there are any; `states` are those that this process has read already.

    Raises:
        RunError: a checkpoint was damaged after the main process had read it.
    """
    for number, path in enumerate(paths):
        replica = t.replicas[number]
        state = states[path] if path in states else _load(path, replica.config.signature, layout(t))
        replica.model.load_state_dict(state.model)
        t.steps.load_optimizer(number, state.optimizer)
        t.steps.load_ema(number, state.ema)
        replica.progress, replica.rows = state.progress, state.metrics
        if t.group.is_main:  # the sums are over all processes
            t.steps.accumulator.sums[number] = state.window.to(t.group.device)
    t.step = t.replicas[0].progress.step
    if t.group.is_main:
        for replica in t.replicas:
            replica.begin_seconds(t.clock)
            snapshot.set_aside(replica.run, beyond=t.step)
    record_environment(t)


def _load(path: Path, signature: str, its: checkpoint.Layout) -> Checkpoint:
    """A checkpoint that the main process has chosen, for another one."""
    try:
        return checkpoint.load(path, signature, its)[0]
    except (CheckpointError, OtherDataError) as error:  # since the main process has looked at it
        raise RunError(f"{path}: was changed a moment ago ({error}); start again") from error


def record_environment(t: Training) -> None:
    """Record what this attempt runs with: code, libraries, device, data, sizes."""
    facts = environment(t.group.device)
    sizes = {"steps_total": t.total_steps, "steps_per_epoch": t.epoch_steps, "processes": t.group.world_size}
    configs = [replica.config for replica in t.replicas]
    together = {
        "trained_with_seeds": [config.seed for config in configs],
        "trained_with_settings": settings_apart(configs),  # beside the seeds
        "resumed_at_step": t.step,
    }
    data = {"beton_sha256": t.data.beton_sha256, "num_samples": t.data.num_samples, "evaluated_on": t.config.evaluated_on}
    document = with_checksum({**facts, **sizes, **together, **data})
    for replica in t.replicas:
        if facts["code_version"] not in replica.progress.code_versions:
            replica.progress.code_versions.append(facts["code_version"])
        if t.group.is_main:
            write_json(replica.run.env_json, document)
            for attempt in replica.run.attempts()[-1:]:
                write_json(attempt.env_json, document)
