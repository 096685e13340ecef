"""The whole story of a training run, top to bottom: set-up, resume, loop, step, evaluation, checkpoint, result.

    python -m vitpa.train CONFIG [a.b=c ...]
    torchrun --nproc-per-node=4 -m vitpa.train CONFIG [a.b=c ...]

A run killed at any moment and started again continues from its newest checkpoint; on the CPU it ends with weights
bit-identical to those of an undisturbed run, because everything random is a function of (seed, epoch, step, sample).

Axes: B batch, K classes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid

from vitpa import checkpoint, distributed
from vitpa.analysis.similarity import positional_similarity, similarity_grid
from vitpa.attempt import claimed_attempt
from vitpa.config import ConfigError, RunConfig, keys_help, load_config, record_config
from vitpa.data.batches import eval_batches, steps_per_epoch, train_batches
from vitpa.data.beton import Beton, BetonError, beton_path
from vitpa.data.counter_rng import Purpose, key
from vitpa.data.resident import ResidentImages
from vitpa.data.stream import StreamedImages
from vitpa.datasets import SPLITS, facts_of
from vitpa.distributed import Group
from vitpa.environment import environment
from vitpa.logs import Logs
from vitpa.models import build_model
from vitpa.optim import adamw, learning_rate
from vitpa.rundir import Result, RunDir, RunError, utc_now, write_json

EVAL_BATCH_SIZE = 512
NEVER = 2**62  # as a step: it has not happened

MicroBatches = Iterator[tuple[Tensor, Tensor]]


class TrainError(Exception):
    """Training cannot start or go on: one line with what, where and how to mend it."""


@dataclass
class Progress:
    """How far the run is, over all attempts: with weights, optimiser and window all that a checkpoint holds."""

    step: int = 0
    train_time_s: float = 0.0
    gpu_time_s: float = 0.0
    code_versions: list[str] = field(default_factory=list)
    val: dict[str, float] = field(default_factory=dict)  # the newest evaluation


class Window:
    """Training metrics since the last row, kept on the device so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss * images, correct, images
        self.bad_step = torch.full((), NEVER, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch: mean loss (), logits (B, K), labels (B,)."""
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums[0] += loss.double() * len(labels)
        self.sums[1] += correct
        self.sums[2] += len(labels)

    def check(self, step: int, loss: Tensor) -> None:
        """Remember `step` if it is the first whose loss or gradient is not finite."""
        finite = loss.isfinite() & self.grad_norm.isfinite()
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step))


@dataclass
class Training:
    """Everything one process needs to train one run."""

    config: RunConfig
    run: RunDir
    group: Group
    images: dict[str, ResidentImages | StreamedImages]  # by split
    num_samples: dict[str, int]
    beton_sha256: dict[str, str]
    model: Any  # timm's VisionTransformer: the weights
    forward: Any  # the same, compiled if asked for
    network: Any  # the same, with the gradients averaged over the processes
    optimizer: torch.optim.AdamW
    epoch_steps: int
    window: Window
    progress: Progress
    logs: Logs | None = None  # in the main process
    resumed_s: float = 0.0  # time.monotonic() at which train_time_s was as in the checkpoint
    saved_s: float = 0.0  # time.monotonic() of the newest checkpoint

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.train.epochs * self.epoch_steps


def train(config: RunConfig, run: RunDir, group: Group) -> bool:
    """Train `config` to its end, from its newest checkpoint if there is one, and write result.json.

    Returns:
        whether the run is finished; False if the file `stop` asked it to stop, its state being in a checkpoint.

    Raises:
        TrainError: the loss became non-finite, or the configuration does not fit the data or the processes.
        BetonError: the data cannot be used.
        RunError: the run directory cannot be used.
    """
    t = set_up(config, run, group)
    if isinstance(t.network, DistributedDataParallel):
        lay_out_buckets(t)
    resume(t)
    with open_logs(t) as t.logs:
        t.saved_s = time.monotonic()
        t.resumed_s = t.saved_s - t.progress.train_time_s
        for epoch in range(t.progress.step // t.epoch_steps, config.train.epochs):
            if not train_epoch(t, epoch):
                return False
        finish(t)
    return True


def set_up(config: RunConfig, run: RunDir, group: Group) -> Training:
    """Open the data and build the model and the optimiser, as they are before the first step."""
    torch.set_num_threads(config.runtime.cpu_threads or group.cpus)
    batch_size, shares = config.train.global_batch_size, group.world_size * config.runtime.accum_steps
    if batch_size % shares:
        raise TrainError(
            f"train.global_batch_size={batch_size} is not a multiple of {group.world_size} processes x "
            f"runtime.accum_steps={config.runtime.accum_steps}"
        )
    betons = {
        split: Beton.open(beton_path(Path(config.runtime.data_dir), config.dataset, split), config.dataset, split)
        for split in SPLITS
    }
    epoch_steps = steps_per_epoch(len(betons["train"]), batch_size)
    if not epoch_steps:
        raise TrainError(f"train.global_batch_size={batch_size} is more than the {len(betons['train'])} training images")

    classes = betons["train"].manifest.class_names
    if betons["val"].manifest.class_names != classes:
        raise TrainError(f"{betons['val'].path}: has other classes than {betons['train'].path}; prepare both from one source")
    num_classes = len(classes)
    model = build_model(**dict(config.model), num_classes=num_classes, seed=key(config.seed, Purpose.INIT)).to(group.device)
    forward: Any = torch.compile(model, dynamic=False) if config.runtime.compile else model
    optim = config.optim
    return Training(
        config=config,
        run=run,
        group=group,
        images={split: open_images(config, beton, group) for split, beton in betons.items()},
        num_samples={split: len(beton) for split, beton in betons.items()},
        beton_sha256={split: beton.manifest.beton_sha256 for split, beton in betons.items()},
        model=model,
        forward=forward,
        network=DistributedDataParallel(forward) if group.world_size > 1 else forward,
        optimizer=adamw(
            model,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            eps=optim.eps,
            fused=group.device.type == "cuda",
        ),
        epoch_steps=epoch_steps,
        window=Window(group.device),
        progress=Progress(),
    )


def lay_out_buckets(t: Training) -> None:
    """Let DDP settle the order in which it adds up gradients, before the first step of this attempt.

    It lays out its buckets anew after the first backward pass of a process, and with more than two processes the place in a
    bucket decides the order of a sum: without this the first step after a resume would round otherwise than in one go.
    """
    config, size = t.config, t.config.model.img_size
    local_batch_size = config.train.global_batch_size // (t.group.world_size * config.runtime.accum_steps)
    t.model.train()
    with autocast(t):
        logits = t.network(torch.zeros(local_batch_size, 3, size, size, device=t.group.device))  # B, K
    logits.float().sum().backward()
    t.optimizer.zero_grad(set_to_none=True)


def open_images(config: RunConfig, beton: Beton, group: Group) -> ResidentImages | StreamedImages:
    """The images of a .beton: resident on the device where they are all as the model takes them, else streamed.

    Which of the two makes no difference to the numbers.
    """
    facts, size, seed, loader = facts_of(config.dataset), config.model.img_size, config.seed, config.runtime.loader
    whole = config.augment.crop != "random_resized" and config.augment.eval_crop_pct == 1
    if loader == "resident" and not whole:
        raise TrainError("runtime.loader=resident takes whole images: no augment.crop=random_resized, augment.eval_crop_pct=1")
    if loader == "resident" or (loader == "auto" and whole and beton.image_size_px == (size, size)):
        return ResidentImages(beton, facts, config.augment, img_size=size, seed=seed, device=group.device)
    workers = config.runtime.workers or group.cpus
    return StreamedImages(beton, facts, config.augment, img_size=size, seed=seed, device=group.device, workers=workers)


def resume(t: Training) -> None:
    """Continue from the newest checkpoint, if there is one, and record what this attempt runs with."""
    newest = t.group.from_main(newest_checkpoint(t.run) if t.group.is_main else None)
    if newest is not None:
        state = checkpoint.load(newest)
        if state.get("signature") != t.config.signature:
            raise RunError(f"{newest}: is a checkpoint of another run ({state.get('signature')}); remove it")
        if state["beton_sha256"] != t.beton_sha256:
            raise RunError(
                f"{newest}: was trained on other data than {t.config.runtime.data_dir}/{t.config.dataset} holds now; "
                f"restore that data, or remove {t.run.path} to start again"
            )
        t.model.load_state_dict(state["model"])
        t.optimizer.load_state_dict(state["optimizer"])
        t.progress = Progress(**state["progress"])
        if t.group.is_main:  # the window's sums are those of all processes
            t.window.sums.copy_(state["window"])
    facts = environment(t.group.device)
    if facts["code_version"] not in t.progress.code_versions:
        t.progress.code_versions.append(facts["code_version"])
    if t.group.is_main:
        sizes = {"steps_total": t.total_steps, "steps_per_epoch": t.epoch_steps, "processes": t.group.world_size}
        document = {**facts, **sizes, "beton_sha256": t.beton_sha256}
        write_json(t.run.env_json, document)
        for attempt in t.run.attempts()[-1:]:
            write_json(attempt.env_json, document)


def newest_checkpoint(run: RunDir) -> Path | None:
    """The newest checkpoint that can be read."""
    newest = checkpoint.load_newest(run)
    return None if newest is None else newest[0]


def open_logs(t: Training) -> Any:
    """The logs of this attempt in the main process, nothing in the others; both for a `with` statement."""
    if not t.group.is_main:
        return nullcontext()
    config, step = t.config, t.progress.step
    name = f"{config.dataset}-{config.model.attention}-s{config.seed}"
    logs = Logs(t.run, name=name, steps_total=t.total_steps, restored_step=step, tensorboard=config.runtime.tensorboard)
    place = f"on {t.group.device} ({type(t.images['train']).__name__}) in {t.run.path}"
    logs.say(f"{name}: {'resumed' if step else 'starts'} at step {step} of {t.total_steps} {place}")
    if not step:
        experiment = config.experiment()
        sections = {f"{s}.{k}": v for s, values in experiment.items() if isinstance(values, dict) for k, v in values.items()}
        logs.hparams({**{k: v for k, v in experiment.items() if not isinstance(v, dict)}, **sections}, {"val/top1": 0.0})
        samples = torch.arange(min(64, t.num_samples["train"]))
        logs.image("augmented", make_grid(t.images["train"].augmented(samples, epoch=0)), step)
        show_positions(t, logs)
    return logs


def show_positions(t: Training, logs: Logs) -> None:
    """Draw the positional-similarity map in TensorBoard."""
    logs.image("positional_similarity", similarity_grid(positional_similarity(t.model.pos_embed.detach())), t.progress.step)


def train_epoch(t: Training, epoch: int) -> bool:
    """Train from the present step to the end of `epoch`, with the evaluation if one is due; False if told to stop."""
    config, group, last_step = t.config, t.group, (epoch + 1) * t.epoch_steps
    indices = train_batches(
        seed=config.seed,
        epoch=epoch,
        num_samples=t.num_samples["train"],
        global_batch_size=config.train.global_batch_size,
        accum_steps=config.runtime.accum_steps,
        rank=group.rank,
        world_size=group.world_size,
        start_step=t.progress.step - epoch * t.epoch_steps,
    )
    batches = t.images["train"].train_batches((micro for step in indices for micro in step), epoch)
    row_step, row_s = t.progress.step, time.monotonic()
    t.model.train()
    for step in range(t.progress.step + 1, last_step + 1):
        train_step(t, batches)
        if step % config.runtime.log_every_steps == 0 or step == last_step:
            write_row(t, steps=step - row_step, started_s=row_s)
            row_step, row_s = step, time.monotonic()
        if t.logs is not None:
            t.logs.progress(step)
        if step < last_step and not save_or_stop(t):
            return False
    last_epoch = epoch + 1 == config.train.epochs
    if last_epoch or (epoch + 1) % config.runtime.eval_every_epochs == 0:
        t.progress.val = evaluate(t)
        if t.logs is not None:
            t.logs.row(t.progress.step, epoch + 1, t.progress.val)
            if last_epoch or (epoch + 1) % max(1, config.train.epochs // 10) == 0:
                show_positions(t, t.logs)
    return last_epoch or save_or_stop(t)


def train_step(t: Training, batches: MicroBatches) -> None:
    """One optimiser step over the next `accum_steps` micro-batches."""
    config, accum_steps = t.config, t.config.runtime.accum_steps
    set_learning_rate(t)
    for micro in range(accum_steps):
        images, labels = next(batches)
        if config.model.drop_path_rate:
            torch.manual_seed(key(config.seed, Purpose.DROP_PATH, t.progress.step, micro, t.group.rank))
        more = isinstance(t.network, DistributedDataParallel) and micro + 1 < accum_steps
        with t.network.no_sync() if more else nullcontext():  # the processes exchange gradients once per step
            with autocast(t):
                logits = t.network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.optim.label_smoothing)
            (loss / accum_steps).backward()
        t.window.add(loss.detach(), logits.detach(), labels)
    bound = config.optim.grad_clip_norm
    t.window.grad_norm = nn.utils.clip_grad_norm_(t.model.parameters(), float("inf") if bound is None else bound).detach()
    t.window.check(t.progress.step + 1, loss.detach())
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    t.progress.step += 1


def set_learning_rate(t: Training) -> None:
    """Set the learning rate of the step about to be done."""
    optim = t.config.optim
    warmup_steps = round(optim.warmup_epochs * t.epoch_steps)
    lr = learning_rate(
        t.progress.step, peak=optim.lr, minimum=optim.min_lr, warmup_steps=warmup_steps, total_steps=t.total_steps
    )
    for group in t.optimizer.param_groups:
        group["lr"] = lr


def autocast(t: Training) -> torch.autocast:
    """The precision of the forward pass."""
    return torch.autocast(t.group.device.type, dtype=torch.bfloat16, enabled=t.config.train.precision == "bfloat16")


def write_row(t: Training, *, steps: int, started_s: float) -> None:
    """Close the window of training metrics: a row for its steps, of which the last `steps` began at `started_s`."""
    stop_if_not_finite(t)
    loss_sum, correct, images = t.group.sum(t.window.sums).tolist()
    t.window.sums = torch.zeros_like(t.window.sums)
    if t.logs is not None:
        row = {
            "train/loss": loss_sum / images,
            "train/top1": correct / images,
            "train/lr": t.optimizer.param_groups[0]["lr"],
            "train/grad_norm": float(t.window.grad_norm),
            "perf/images_per_s": steps * t.config.train.global_batch_size / (time.monotonic() - started_s),
            "time_s": train_time_s(t),
        }
        t.logs.row(t.progress.step, t.progress.step / t.epoch_steps, row)


def train_time_s(t: Training) -> float:
    """Wall-clock time of training over all attempts: steps, evaluations and checkpoints that led to this state."""
    return time.monotonic() - t.resumed_s


def stop_if_not_finite(t: Training) -> None:
    """Raise TrainError if the loss or the gradient of any process has been NaN or infinite."""
    bad_step = int(t.group.minimum(t.window.bad_step))
    if bad_step != NEVER:
        raise TrainError(
            f"{t.run.path}: the loss or its gradient became non-finite at step {bad_step} "
            f"(epoch {bad_step / t.epoch_steps:.2f}); lower optim.lr={t.config.optim.lr}, lengthen optim.warmup_epochs, "
            "or set train.precision=float32"
        )


@torch.no_grad()
def evaluate(t: Training) -> dict[str, float]:
    """Top-1, top-5 (fractions) and cross-entropy without smoothing over the whole val split, every image counted once."""
    group, num_samples = t.group, t.num_samples["val"]
    batch_size = min(EVAL_BATCH_SIZE, -(-num_samples // group.world_size))
    indices = eval_batches(num_samples=num_samples, batch_size=batch_size, rank=group.rank, world_size=group.world_size)
    sums = torch.zeros(4, dtype=torch.float64, device=group.device)  # loss, top-1, top-5, images
    t.model.eval()
    for images, labels in t.images["val"].eval_batches(indices):
        with autocast(t):
            logits = t.forward(images)
        real = labels >= 0  # the others fill up the last batch
        loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # B, 5
        sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double(), real.sum().double()])
    loss_sum, top1, top5, count = group.sum(sums).tolist()
    assert count == num_samples, f"evaluated {count} of {num_samples} images"
    return {"val/loss": loss_sum / count, "val/top1": top1 / count, "val/top5": top5 / count}


def save_or_stop(t: Training) -> bool:
    """Between two steps: write a checkpoint if one is due, and another before stopping; False if told to stop."""
    runtime, step = t.config.runtime, t.progress.step
    due = runtime.checkpoint_every_steps is not None and step % runtime.checkpoint_every_steps == 0
    stop = False
    if step % runtime.poll_every_steps == 0 or step % t.epoch_steps == 0:
        late = time.monotonic() - t.saved_s >= runtime.checkpoint_every_s
        stop, late = t.group.from_main((t.run.stop.exists(), late))
        due = due or late or stop
    if due:
        save(t)
    if stop and t.logs is not None:
        t.logs.say(f"stopped at step {step} of {t.total_steps}, as {t.run.stop} asks; the same command continues from there")
    return not stop


def save(t: Training) -> None:
    """Write a checkpoint of the present step."""
    stop_if_not_finite(t)  # a checkpoint of broken weights would make the run unrepairable
    window = t.group.sum(t.window.sums.clone())
    new_s = train_time_s(t) - t.progress.train_time_s
    t.progress.train_time_s += new_s
    if t.group.device.type == "cuda":  # of this attempt's GPUs; another may have others
        t.progress.gpu_time_s += new_s * t.group.world_size / t.config.runtime.runs_per_gpu
    if t.group.is_main:
        assert t.logs is not None
        t.logs.flush()
        state = {"signature": t.config.signature, "beton_sha256": t.beton_sha256}
        state |= {"progress": vars(t.progress), "window": window}
        state |= {"model": t.model.state_dict(), "optimizer": t.optimizer.state_dict()}
        checkpoint.save(t.run, t.progress.step, state)
    t.saved_s = time.monotonic()


def finish(t: Training) -> None:
    """Write the last checkpoint and, last of all, result.json."""
    save(t)
    if not t.group.is_main:
        return
    config, time_s = t.config, t.progress.train_time_s
    result = Result(
        signature=config.signature,
        dataset=config.dataset,
        attention=config.model.attention,
        seed=config.seed,
        epochs=config.train.epochs,
        steps=t.progress.step,
        val_top1=t.progress.val["val/top1"],
        val_top5=t.progress.val["val/top5"],
        val_loss=t.progress.val["val/loss"],
        train_time_s=time_s,
        gpu_hours=t.progress.gpu_time_s / 3600,
        images_per_s=t.progress.step * config.train.global_batch_size / time_s,
        attempts=max(1, len(t.run.attempts())),
        weights_sha256=checkpoint.weights_sha256(t.model.state_dict()),
        code_version=", ".join(t.progress.code_versions),
        beton_sha256=t.beton_sha256,
        finished_utc=utc_now(),
    )
    assert t.logs is not None
    t.logs.flush()
    write_json(t.run.result_json, result.model_dump())
    t.logs.say(f"finished: val top-1 {100 * result.val_top1:.2f} % after {result.epochs} epochs; {t.run.result_json}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if the run is finished or was stopped on request, 1 with one line for an error of the user's."""
    parser = argparse.ArgumentParser(
        prog="vitpa train",
        description="Train one run, from its newest checkpoint if there is one.",
        epilog=f"example: vitpa train cifar10 model.attention=positional seed=3 train.epochs=30\n\nkeys:\n{keys_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML file, or the name of a shipped recipe such as cifar10")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the configuration")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        group = distributed.join(config.runtime.device)
        try:
            with ExitStack() as stack:
                run, finished, refused = config.run_dir, False, None
                if group.is_main:  # it alone looks: on NFS a node may see the files of another one seconds later
                    try:
                        record_config(config)
                        finished = run.result() is not None
                        if not finished:
                            stack.enter_context(claimed_attempt(run, takeover=config.runtime.takeover))
                    except (ConfigError, RunError, OSError) as error:
                        refused = error
                finished, stays_out = group.from_main((finished, refused is not None))
                if stays_out:  # all processes end, not only the main one
                    if refused is not None:
                        raise refused
                    return 1
                if not finished:
                    train(config, run, group)
                elif group.is_main:
                    print(f"{run.result_json}: the run is finished already", file=sys.stderr)
        finally:
            distributed.leave()
    except (ConfigError, RunError, BetonError, TrainError, OSError) as error:  # OSError: a full disk, a missing right
        print(f"vitpa train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitpa train: interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
