"""The whole story of a training run, top to bottom: set-up, resume, loop, evaluation, checkpoint, result.

    python -m vitpa.train CONFIG [a.b=c ...] [--seeds 0,1,2] [--with CONFIG ...]
    torchrun --nproc-per-node=4 -m vitpa.train CONFIG [a.b=c ...]

A run killed at any moment and started again continues from its newest checkpoint; on the CPU it ends with weights
bit-identical to the weights of an undisturbed run, because everything random is a function of (seed, epoch, step, sample).

Several runs may be trained together that differ in their seeds, or in what else vitpa/together.py names. Each is then a
replica: a run with files of its own, which can be resumed alone.

The loop is `train_epoch`; the arithmetic of a step is in vitpa/step/step.py, the command line in vitpa/train_command.py.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

if __name__ == "__main__":  # nothing of what is imported is garbage, and looking for it takes a sixth of the time
    gc.disable()

import torch
from torchvision.utils import make_grid

from vitpa import checkpoint, snapshot
from vitpa.analysis.similarity import positional_similarity, similarity_grid
from vitpa.attempt import RunsFailedError, record_left
from vitpa.checkpoint import Checkpoint
from vitpa.clock import Clock
from vitpa.config import RunConfig
from vitpa.data.loader import ResidentFeed
from vitpa.data.open import open_data, random_reads_note
from vitpa.data.rng import Purpose, key
from vitpa.data.sampler import steps_per_epoch
from vitpa.distributed import Group
from vitpa.energy import Counter, EnergyMeter, gpu_counter
from vitpa.errors import UserError
from vitpa.logs import Logs, ProgressLine
from vitpa.metrics import Metrics
from vitpa.models import build_model
from vitpa.optim import learning_rates, make_optimizer
from vitpa.replica import Replica
from vitpa.resume import resume, resume_points
from vitpa.seconds import PARTS
from vitpa.step.accumulator import NEVER
from vitpa.step.compile_cache import compile_cache, graph_counts, hash_compilers
from vitpa.step.compiler_cache import check_compiler_cache
from vitpa.step.step import ReplicaSteps
from vitpa.together import check_together, group_name, replica_names
from vitpa.training import Training, say

LOGGER = logging.getLogger(__name__)
POLL_S = 1.0  # between looks at the clock and the file `stop` of a process that needs not agree with others
ALL_STOPS_S = 0.3  # within which the files `stop` of runs that are stopped together appear


class TrainError(UserError):
    """Training cannot go on: one line with what, where and what to do about it."""


def train(configs: Sequence[RunConfig], group: Group, counter: Counter | None = None, clock: Clock | None = None) -> bool:
    """Train runs to completion, several in one step, resuming from checkpoints; each writes its result.json, last of all.

    `counter` is of the energy that this process takes; None: its GPU's, if it has one. `clock` has run since the attempt
    began; None: it begins now.

    Returns:
        whether the runs are finished; False if they pause or a stop was requested, the state being in checkpoints.

    Raises:
        TrainError: the losses of all runs became non-finite.
        RunsFailedError: some of the runs have failed, the others have ended.
        ConfigError: the configuration does not fit the data, the processes or the device.
        BetonError: the data cannot be used.
        RunError: a run directory cannot be used.
    """
    clock = clock or Clock()
    with ExitStack() as stack:
        cache = stack.enter_context(compile_cache(configs, group))
        if configs[0].runtime.compiles(group.device.type):
            hash_compilers()  # while the data are opened and the models are built
        t = set_up(configs, group, clock)
        clock.enter("restore")
        paths, states = resume_points(t)
        if len(paths) < len(configs):
            t.steps.close()
            del t  # and the memory that it takes
            t = set_up([configs[number] for number in paths], group, clock)
        t.compile_cache = cache
        resume(t, [path for path in paths.values() if path is not None], states)
        del states  # and the memory that they take
        clock.enter("set_up")
        open_logs(t, stack)
        stack.callback(t.steps.close)
        t.checkpoints = stack.enter_context(checkpoint.Writer()) if group.is_main else None
        t.meter = EnergyMeter(group, counter or gpu_counter(group.device))
        prepare_steps(t)
        if t.epoch >= t.config.last_epoch:
            evaluate_again(t)
        if all(train_epoch(t, epoch) for epoch in range(t.epoch, t.config.last_epoch)):
            finish(t)
    check_left(t)
    return t.step == t.total_steps


def set_up(configs: Sequence[RunConfig], group: Group, clock: Clock | None = None) -> Training:
    """Open the data and build the models and optimisers, as they are before the first step."""
    clock = clock or Clock()
    check_together(configs)
    config = configs[0]
    torch.set_num_threads(config.runtime.cpu_threads or group.cpus)
    with clock.within("data"):
        data = open_data(configs, group)
    epoch_steps = steps_per_epoch(data.num_samples["train"], config.train.global_batch_size)
    models = [
        build_model(**dict(each.model), num_classes=data.num_classes, seed=key(each.seed, Purpose.INIT)).to(group.device)
        for each in configs
    ]
    steps = ReplicaSteps(
        configs,
        group,
        models=models,
        optimizers=[make_optimizer(each, model) for each, model in zip(configs, models, strict=True)],
        feed=data.feed,
        learning_rates=learning_rates(configs, epoch_steps),
    )
    replicas = [
        Replica(each, each.run_dir, model, name)
        for each, model, name in zip(configs, models, replica_names(configs), strict=True)
    ]
    metrics = Metrics(
        replicas,
        steps,
        group,
        global_batch_size=config.train.global_batch_size,
        num_val=data.num_samples["val"],
        epoch_steps=epoch_steps,
    )
    return Training(config, group, data, replicas, steps, metrics, epoch_steps, clock=clock)


def open_logs(t: Training, stack: ExitStack) -> None:
    """Open the logs of this attempt in the main process; `stack` closes them."""
    if not t.group.is_main:
        return
    config, step = t.config, t.step
    name = group_name([replica.config for replica in t.replicas])
    t.line = stack.enter_context(ProgressLine(name, t.total_steps, step, config.top1_name, work=t.work))
    where = ", ".join(f"{replica.run.path}{f' ({replica.name})' if len(t.replicas) > 1 else ''}" for replica in t.replicas)
    images = "resident images" if isinstance(t.data.feed, ResidentFeed) else "streamed images"
    if config.train.image_sizes:
        images += f" of {config.train_img_size(t.epoch)} px"
    num_val, evaluated_on = t.data.num_samples["val"], config.evaluated_on
    if config.train.holdout:  # of each class in whole images, one at least
        share = num_val / (num_val + t.data.num_samples["train"])
        evaluated_on = f"{num_val:,} held-out images, {100 * share:.3g} % of train"
    place = f"on {t.group.device} ({images}, evaluated on {evaluated_on}) in {where}"
    say(t, f"{name}: {'resumed' if step else 'starts'} at step {step} of {t.total_steps} {place}")
    if note := random_reads_note(config, t.data.feed):
        say(t, note)
    shown = config.runtime.tensorboard and not step
    previews = t.data.previews([replica.config for replica in t.replicas]) if shown else None
    for number, replica in enumerate(t.replicas):
        if note := snapshot.not_kept(replica.run, config.runtime.keep_epochs if step else (), t.epoch_steps, step):
            say(t, note)
        logs = Logs(
            replica.run,
            restored_step=step,
            restored_rows=replica.rows,
            not_before_s=replica.progress.wall_time_s,
            tensorboard=config.runtime.tensorboard,
        )
        replica.logs = stack.enter_context(logs)
        if previews is not None:
            logs.hparams(replica.config.model_dump(mode="json", exclude={"runtime"}), {t.config.top1_metric: 0.0})
            logs.image("augmented", make_grid(previews[number]), step)
    if not step:
        show_positions(t)


def show_positions(t: Training) -> None:
    """Draw the positional-similarity maps of ViTs in TensorBoard."""
    for _, replica in t.active:
        if replica.logs is not None and t.config.runtime.tensorboard and t.config.model.kind == "vit":
            similarity = positional_similarity(replica.model.pos_embed.detach(), t.config.model.num_prefix_tokens)
            replica.logs.image("positional_similarity", similarity_grid(similarity), t.step)


def prepare_steps(t: Training) -> None:
    """Compile the step and capture its CUDA graph, as `runtime.step` says, and start the clocks."""
    t.clock.enter("compilation")
    if t.step < t.total_steps:
        t.steps.use_img_size(t.config.train_img_size(t.epoch))
        if t.steps.compiles:
            check_compiler_cache()
            known = t.compile_cache is not None and t.compile_cache.kept
            say(
                t,
                "compiling the step, most of which was compiled before"
                if known
                else "compiling the step, which takes a minute",
            )
        for note in t.steps.prepare(t.step):
            say(t, note)
        if t.steps.is_compiled and t.compile_cache is not None:
            t.compile_cache.save()
        elif t.compile_cache is not None and t.compile_cache.kept:
            say(t, f"if what was compiled before is the cause, delete {t.compile_cache.archive}")
    t.metrics.begin(t.step, t.line)
    t.saved_s = time.monotonic()
    if t.meter is not None:
        t.meter.begin()
    for replica in t.replicas:
        replica.counted_s = t.saved_s
    t.clock.enter("steps")


def change_image_size(t: Training, epoch: int) -> None:
    """Go on with training images of another size, if `epoch` has one; the time that compiling takes does not count."""
    before, img_size = t.steps.img_size, t.config.train_img_size(epoch)
    if img_size == before:
        return
    say(t, f"image size {before} -> {img_size} px from epoch {epoch}")
    drop_nonfinite(t, t.metrics.flush())
    count(t)
    prepare_steps(t)


def train_epoch(t: Training, epoch: int) -> bool:
    """Train from the present step to the end of `epoch`, and evaluate if that is due; False if a stop was requested."""
    runtime, last_step = t.config.runtime, (epoch + 1) * t.epoch_steps
    change_image_size(t, epoch)
    t.steps.begin_epoch(epoch, t.step - epoch * t.epoch_steps)
    while t.step < last_step:
        t.steps.load()  # the batch, onto the device
        t.steps.step()  # forward, backward, all-reduce of the gradients, clipping, AdamW
        t.step += 1
        if t.clock.first_step_s is None:
            note_first_step(t)
        drop_nonfinite(t, t.metrics.poll())  # of earlier steps: the device is behind the host
        if t.step % runtime.log_every_steps == 0 or t.step == last_step:
            drop_nonfinite(t, t.metrics.flush())
            t.metrics.close(t.step)
        if t.line is not None:
            t.line.move(t.step)
        if t.step < last_step and not save_or_stop(t):
            return False
    if epoch + 1 in runtime.keep_epochs:
        keep(t)
    last_epoch = epoch + 1 == t.config.last_epoch
    if last_epoch or (epoch + 1) % runtime.eval_every_epochs == 0:
        with t.clock.evaluating(t.group.device):
            t.metrics.evaluated(t.step, t.group.all_reduce_sum(t.steps.evaluate()))
        if last_epoch or (epoch + 1) % max(1, t.config.train.epochs // 10) == 0:
            show_positions(t)
    return last_epoch or save_or_stop(t)


def evaluate_again(t: Training) -> None:
    """Evaluate runs that are to pause at the end of the epoch where they are, unless that was done."""
    done = t.group.broadcast(all(replica.evaluated_at == t.step for _, replica in t.active))
    if t.step < t.total_steps and t.step % t.epoch_steps == 0 and not done:
        with t.clock.evaluating(t.group.device):
            t.metrics.evaluated(t.step, t.group.all_reduce_sum(t.steps.evaluate()))


def note_first_step(t: Training) -> None:
    """Say and record how long the start has taken, now that the first step has been begun."""
    t.clock.first_step(t.group.device)
    if t.group.is_main:
        for replica in t.replicas:
            replica.graphs = graph_counts()
            replica.record_seconds(t.clock)
    parts = ", ".join(f"{part.replace('_', '-')} {s:.1f}" for part in PARTS if (s := t.clock.seconds()[f"{part}_s"]) >= 0.05)
    say(t, f"the first step was done after {t.clock.first_step_s:.1f} s ({parts})")


def drop_nonfinite(t: Training, first_nonfinite_steps: Mapping[int, int]) -> None:
    """Drop the replicas whose loss or gradient has been NaN or infinite, by number with the first such step.

    Raises:
        TrainError: no replica is left.
    """
    if not first_nonfinite_steps:
        return
    precision = "" if t.config.train.precision == "float32" else ", or set train.precision=float32"
    reasons = {
        number: f"{t.replicas[number].run.path}: the loss or its gradient became non-finite at step {step} "
        f"(epoch {step / t.epoch_steps:.2f}); lower optim.lr={t.replicas[number].config.optim.lr}, lengthen "
        f"optim.warmup_epochs{precision}"
        for number, step in first_nonfinite_steps.items()
    }
    if len(reasons) == len(t.active):
        if t.group.is_main and len(t.replicas) > 1:
            for number, reason in reasons.items():
                record_left(t.replicas[number].run, "failed", reason)
        first, *others = reasons.values()
        raise TrainError(first + (f"; so did {len(others)} more of the runs trained together" if others else ""))
    for number, reason in reasons.items():
        drop(t, number, "failed", reason)


def drop(t: Training, number: int, state: str, reason: str) -> None:
    """Train a replica no longer, and say so in its attempt; the others go on."""
    replica = t.replicas[number]
    replica.left, replica.failed = reason, state == "failed"
    t.steps.freeze(number)
    say(t, f"{replica.name} is not trained any more, the others go on: {reason}")
    if t.group.is_main:
        record_left(replica.run, state, reason)


def save_or_stop(t: Training) -> bool:
    """Between two steps: write checkpoints if they are due or a stop was requested; False if it was, for all that are left."""
    runtime, step = t.config.runtime, t.step
    due = runtime.checkpoint_every_steps is not None and step % runtime.checkpoint_every_steps == 0
    polls = step % runtime.poll_every_steps == 0 or step % t.epoch_steps == 0
    if polls or (t.group.world_size == 1 and time.monotonic() - t.polled_s >= POLL_S):
        polls, t.polled_s = True, time.monotonic()
    stopped: list[int] = []
    if due or polls:
        late = polls and time.monotonic() - t.saved_s >= runtime.checkpoint_every_s
        disk_full = t.checkpoints is not None and t.checkpoints.waits_for_room
        stopped, late, disk_full = t.group.broadcast((stop_requested(t) if polls and t.group.is_main else [], late, disk_full))
        if disk_full and len(stopped) < len(t.active):
            return True  # looks again later
        if disk_full and t.checkpoints is not None:
            t.checkpoints.wait_no_more()
        due = due or late or bool(stopped)
    if due:
        save(t)
    if stopped and t.checkpoints is not None:
        with t.clock.within("checkpoints"):
            t.checkpoints.wait()
        for number in stopped:
            t.replicas[number].record_seconds(t.clock)
    stopped = [number for number, _ in t.active if number in stopped]
    everyone = bool(stopped) and len(stopped) == len(t.active)
    for number in stopped:
        reason = f"stopped at step {step} of {t.total_steps}, as requested by {t.replicas[number].run.stop}"
        if everyone:
            say(t, f"{reason}; the same command continues from there")
        else:
            drop(t, number, "stopped", reason)
    return not everyone


def stop_requested(t: Training) -> list[int]:
    """The numbers of the replicas that have a file `stop`. If all are stopped, their files appear within moments."""
    stopped = [number for number, replica in t.active if replica.run.stop.exists()]
    if 0 < len(stopped) < len(t.active):
        time.sleep(ALL_STOPS_S)
        stopped = [number for number, replica in t.active if replica.run.stop.exists()]
    return stopped


def save(t: Training) -> None:
    """Begin to write checkpoints of the present step; the thread of `t.checkpoints` goes on with it."""
    drop_nonfinite(t, t.metrics.flush())
    if t.checkpoints is not None:
        with t.clock.within("checkpoints"):
            t.checkpoints.wait()
    accumulator = t.steps.accumulator
    # a run cannot go on from a checkpoint of broken weights, so it gets none
    first = t.group.all_reduce_min(accumulator.first_nonfinite_step.clone()).tolist()
    drop_nonfinite(t, {number: first[number] for number, _ in t.active if first[number] < NEVER})
    sums = t.group.all_reduce_sum(accumulator.sums.clone())
    count(t)
    t.clock.enter("checkpoints")
    for number, replica in t.active:
        replica.progress.step = t.step
        if replica.logs is not None:
            replica.logs.goodput(t.step, replica.seconds(t.clock))
            replica.logs.flush()
            replica.progress.wall_time_s = replica.logs.wall_time_s
            state = Checkpoint(
                signature=replica.config.signature,
                beton_sha256=t.data.beton_sha256,
                progress=replica.progress,
                window=sums[number].clone(),
                optimizer=t.steps.optimizer_state(number, t.step),
                model=dict(replica.model.state_dict()),
                metrics=replica.logs.rows,
                ema=t.steps.ema_state(number),
            )
            assert t.checkpoints is not None
            t.checkpoints.save(replica.run, state)
            t.checkpoints.afterwards(replica.seconds_writer(t.clock))
    t.saved_s = time.monotonic()
    t.clock.enter("steps")


def keep(t: Training) -> None:
    """Begin to write snapshots of the weights, which no training goes on from."""
    if t.checkpoints is not None:
        t.checkpoints.wait()
        for _, replica in t.active:
            t.checkpoints.keep(replica.run, t.step, dict(replica.model.state_dict()))


def count(t: Training) -> None:
    """Add time and energy since the last call to what the replicas have taken: equal shares of this attempt's GPUs."""
    gpus = t.group.world_size if t.group.device.type == "cuda" else 0
    now_s, sharing = time.monotonic(), t.config.runtime.runs_per_gpu * len(t.active)
    energy_j = None if t.meter is None else t.meter.taken_j()
    for _, replica in t.active:
        replica.count(now_s, gpus / sharing, None if energy_j is None else energy_j / sharing)


def finish(t: Training) -> None:
    """Write the last checkpoints and, last of all, each result.json, or what a pause leaves."""
    save(t)
    if t.checkpoints is None:
        return
    with t.clock.within("checkpoints"):
        t.checkpoints.wait()
    for _, replica in t.active:
        replica.record_seconds(t.clock)
        record = replica.record_result(t.data.beton_sha256) if t.step == t.total_steps else replica.record_pause(t.epoch_steps)
        say(t, f"{replica.name} {record}")


def check_left(t: Training) -> None:
    """Say which runs are not trained to their end.

    Raises:
        RunsFailedError: some have failed.
    """
    for replica in t.replicas:
        if replica.left and not replica.failed and t.group.is_main:
            LOGGER.info(f"{replica.name} is not finished: {replica.left}")
    failed = [replica.left for replica in t.replicas if replica.failed]
    if failed:
        raise RunsFailedError(f"{len(failed)} of {len(t.replicas)} runs have failed: " + "; ".join(failed))


if __name__ == "__main__":  # so that it is started by its name: torchrun -m vitpa.train
    from vitpa.train_command import main

    gc.freeze()
    gc.enable()
    sys.exit(main())
