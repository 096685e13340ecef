"""What the benchmarks share: steps that are ready to be timed, rates as the median of windows, and what the GPU could do."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitpa.arguments import path_argument
from vitpa.bench.timm_steps import TimmSteps
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation
from vitpa.data.loader import Feed
from vitpa.datasets import facts_of
from vitpa.distributed import Group
from vitpa.models import build_model
from vitpa.optim import adamw
from vitpa.step.step import ReplicaSteps

WINDOWS, MIN_WINDOW_S = 5, 0.5  # the median of so many windows, each of at least so long, is quoted
LEARNING_RATE = 1e-4
MOST_STEPS = 1_000_000  # of one benchmark
LOG_EVERY_STEPS = 50


def file_name(text: str) -> Path:
    """The file that `--json` names."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file")
    return path_argument(text)


def make_steps(
    config: RunConfig,
    group: Group,
    feed: Feed,
    *,
    seeds: Sequence[int],
    num_classes: int,
    timm: bool,
) -> ReplicaSteps | TimmSteps:
    """The steps of a training by `config`, not yet compiled: ours, or with `timm` those of the usual way."""
    device, facts = group.device, facts_of(config.dataset)
    augmentation = Augmentation(config.augment, facts, img_size=config.model.img_size, device=device)
    models = [build_model(**dict(config.model), num_classes=num_classes, seed=seed).to(device) for seed in seeds]
    fused = device.type == "cuda"
    optimizers = [
        adamw(model, lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, fused=fused) for model in models
    ]
    if timm:
        return TimmSteps(config, model=models[0], optimizer=optimizers[0], feed=feed, augmentation=augmentation)
    return ReplicaSteps(
        config,
        group,
        seeds=seeds,
        models=models,
        optimizers=optimizers,
        feed=feed,
        augmentation=augmentation,
        learning_rates=torch.full((MOST_STEPS,), LEARNING_RATE, dtype=torch.float64),
    )


def step_runner(steps: ReplicaSteps | TimmSteps, epoch_steps: int) -> Callable[[int], None]:
    """A function that does so many steps as train.py does them, with a closed window every 50, and goes on where it stopped.

    An epoch begins every `epoch_steps` steps, with batches that no one has begun to decode; not with each call.
    """
    numbers = itertools.count()

    def run(count: int) -> None:
        for step in itertools.islice(numbers, count):
            if step % epoch_steps == 0:
                steps.begin_epoch(step // epoch_steps, 0)
            steps.load()
            steps.step()
            if step % LOG_EVERY_STEPS == LOG_EVERY_STEPS - 1:
                steps.accumulator.take()

    return run


def rates(
    run: Callable[[int], None], images: int, group: Group, *, least: int = 3, window_s: float | None = None
) -> list[float]:
    """Images per second in each of WINDOWS windows of `least` steps or more, a step being `images` images of all processes."""
    window_s = MIN_WINDOW_S if window_s is None else window_s
    began_s = time.monotonic()
    run(3)
    wait(group.device)
    count = group.broadcast(max(least, round(3 * window_s / (time.monotonic() - began_s))))
    found = []
    for _ in range(WINDOWS):
        together(group)
        began_s = time.monotonic()
        run(count)
        together(group)
        found.append(count * images / (time.monotonic() - began_s))
    return found


def together(group: Group) -> None:
    """Until the devices of all processes have done everything."""
    group.all_reduce_sum(torch.zeros(1, device=group.device))
    wait(group.device)


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(config: RunConfig) -> dict[str, Any]:
    """What the figures hold for, as `vitpa sweep plan --speeds` reads it (jobs/plan/speeds.py)."""
    return {"network": config.network(), "augment": config.augment.model_dump(mode="json")}


def product_limit_tflops(group: Group) -> float:
    """Operations per second of a large product of bfloat16 matrices on this device, in 10^12: what products alone could do."""
    device = group.device
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b)

    return max(rates(run, 1, group)) * 2 * size**3 / 1e12


def gflop_per_image(config: RunConfig) -> float:
    """Arithmetic of a training step per image, 10^9 operations: products of matrices only, backward twice the forward pass."""
    model = config.model
    D, tokens = model.embed_dim, (model.img_size // model.patch_size) ** 2 + 1
    per_token = (4 + 2 * model.mlp_ratio) * D * D + 2 * tokens * D  # multiply-adds of a block
    if model.attention == "positional":
        per_token -= 2 * D * D + tokens * D  # queries, keys and scores are computed once per step, not per image
    patches = (tokens - 1) * 3 * model.patch_size**2 * D
    return 3 * 2 * (tokens * model.depth * per_token + patches) / 1e9
