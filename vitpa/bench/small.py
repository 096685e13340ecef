"""`vitpa bench small`: training steps of the paper's small ViT on images of 32 pixels, the usual way and ours.

Whole steps (forward, backward, clipping, AdamW) with the order of the images, their augmentation and the metrics, on random
images that lie on the device. `eager` and `compile` are timm's module; `graph` is the step of vitpa/replicas.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from vitpa.bench.timm_steps import TimmSteps
from vitpa.config import RunConfig, load_config, shipped_configs
from vitpa.data.augment import Augmentation
from vitpa.data.feed import ResidentFeed
from vitpa.data.resident import ResidentImages
from vitpa.datasets import facts_of
from vitpa.distributed import Group, join
from vitpa.environment import environment
from vitpa.models import build_model
from vitpa.optim import adamw
from vitpa.replicas import ReplicaSteps
from vitpa.rundir import write_json

Attention = Literal["content", "positional"]
Step = Literal["eager", "compile", "graph"]

NUM_IMAGES, NUM_CLASSES = {"train": 50_000, "val": 10_000}, 10
LEARNING_RATE = 1e-4
WINDOWS, MIN_WINDOW_S = 5, 0.5  # the median of so many windows, each of at least so long, is quoted


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    attention: Attention
    step: Step
    replicas: int
    augmentation: bool

    def __str__(self) -> str:
        return f"{self.attention} {self.step} R={self.replicas}" + ("" if self.augmentation else " without augmentation")


@dataclass(frozen=True)
class Rate:
    """What a case gave."""

    images_per_s: float  # of all replicas together
    spread: float  # (largest - smallest window) / median
    peak_memory_gib: float | None  # None: not on a GPU
    start_s: float  # until the first step: building, compiling, capturing
    notes: tuple[str, ...]


def cases(attentions: Sequence[Attention], replicas: Sequence[int], *, ablation: bool) -> list[Case]:
    """The lines of the table, in their order; with `ablation` also those without augmentation."""
    ways: list[tuple[Step, int]] = [("eager", 1), ("compile", 1), *(("graph", count) for count in replicas)]
    return [
        Case(attention, step, count, augmentation)
        for attention in attentions
        for augmentation in ((True, False) if ablation else (True,))
        for step, count in ways
    ]


def gflop_per_image(config: RunConfig) -> float:
    """Arithmetic of a training step per image, 10^9 operations: products of matrices only, backward twice the forward pass."""
    model = config.model
    D, tokens = model.embed_dim, (model.img_size // model.patch_size) ** 2 + 1
    per_token = (4 + 2 * model.mlp_ratio) * D * D + 2 * tokens * D  # multiply-adds of a block
    if model.attention == "positional":
        per_token -= 2 * D * D + tokens * D  # queries, keys and scores are computed once per step, not per image
    patches = (tokens - 1) * 3 * model.patch_size**2 * D
    return 3 * 2 * (tokens * model.depth * per_token + patches) / 1e9


def config_of(case: Case, overrides: Sequence[str]) -> RunConfig:
    """The cifar10 recipe as `case` runs it."""
    changes = [f"model.attention={case.attention}", f"runtime.step={case.step}", *overrides]
    if not case.augmentation:
        changes += ["augment.policy=none", "augment.crop=none", "augment.hflip=false"]
    return load_config(shipped_configs()["cifar10"], changes)


Images = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by split: images and labels


def build(case: Case, config: RunConfig, group: Group, images: Images) -> ReplicaSteps | TimmSteps:
    """The steps of `case`, not yet compiled."""
    device, on_gpu = group.device, group.device.type == "cuda"
    seeds = list(range(case.replicas))
    feed = ResidentFeed(
        {split: ResidentImages(*tensors, device=device) for split, tensors in images.items()},
        group,
        seeds=seeds,
        batch_size=config.train.global_batch_size,
        accum_steps=1,
    )
    augmentation = Augmentation(config.augment, facts_of(config.dataset), img_size=config.model.img_size, device=device)
    models = [build_model(**dict(config.model), num_classes=NUM_CLASSES, seed=seed).to(device) for seed in seeds]
    make = partial(adamw, lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, fused=on_gpu)
    optimizers = [make(model) for model in models]
    if case.step == "graph":
        return ReplicaSteps(
            config,
            group,
            seeds=seeds,
            models=models,
            optimizers=optimizers,
            feed=feed,
            augmentation=augmentation,
            learning_rates=torch.full((1_000_000,), LEARNING_RATE, dtype=torch.float64),
        )
    return TimmSteps(config, model=models[0], optimizer=optimizers[0], feed=feed, augmentation=augmentation)


def measure(case: Case, config: RunConfig, group: Group, images: Images) -> Rate:
    """Build what `case` says, run it and time it."""
    device, on_gpu = group.device, group.device.type == "cuda"
    torch._dynamo.reset()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began_s = time.monotonic()
    steps = build(case, config, group, images)
    epoch_steps = len(images["train"][1]) // config.train.global_batch_size
    notes = steps.prepare(0)
    run = partial(_run_steps, steps, epoch_steps)
    run(3)
    _wait(device)
    start_s = time.monotonic() - began_s
    rates = _rates(run, case.replicas * config.train.global_batch_size, device)
    median = statistics.median(rates)
    return Rate(
        images_per_s=median,
        spread=(max(rates) - min(rates)) / median,
        peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        start_s=start_s,
        notes=tuple(notes),
    )


def _run_steps(steps: ReplicaSteps | TimmSteps, epoch_steps: int, count: int) -> None:
    """`count` steps of an epoch as train.py does them, with a closed window every 50."""
    for step in range(count):
        if step % epoch_steps == 0:
            steps.begin_epoch(0, 0)
        steps.step()
        if step % 50 == 49:
            steps.window.take()


def _rates(run: Callable[[int], None], images: int, device: torch.device) -> list[float]:
    """Images per second in each of WINDOWS windows of steps, each step of so many `images`."""
    began_s = time.monotonic()
    run(3)
    _wait(device)
    count = max(3, round(3 * MIN_WINDOW_S / (time.monotonic() - began_s)))
    rates = []
    for _ in range(WINDOWS):
        began_s = time.monotonic()
        run(count)
        _wait(device)
        rates.append(count * images / (time.monotonic() - began_s))
    return rates


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_limit_tflops(device: torch.device) -> float:
    """Operations per second of a large product of bfloat16 matrices on this device, in 10^12: what products alone could do."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b)

    return max(_rates(run, 1, device)) * 2 * size**3 / 1e12


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The results for people."""
    head = f"{'case':52s} {'images/s':>10s} {'spread':>7s} {'x eager':>8s} {'of limit':>9s} {'GiB':>6s} {'start s':>8s}"
    rows = [head]
    for line in lines:
        memory = "-" if line["peak_memory_gib"] is None else f"{line['peak_memory_gib']:.2f}"
        ratio = "-" if line["times_eager"] is None else f"{line['times_eager']:.2f}"
        rows.append(
            f"{line['case']:52s} {line['images_per_s']:10,.0f} {100 * line['spread']:6.1f}% {ratio:>8s} "
            f"{100 * line['of_limit']:8.1f}% {memory:>6s} {line['start_s']:8.1f}"
        )
    return "\n".join(rows)


def add_parser(benchmarks: Any) -> None:
    """The options of `vitpa bench small`."""
    parser = benchmarks.add_parser(
        "small",
        help="training steps of the small ViT: timm's module, compiled, and several seeds in one CUDA graph",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vitpa bench small --attention positional --replicas 1,5 --json small.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the cifar10 recipe")
    parser.add_argument("--attention", choices=("content", "positional"), action="append", help="only this one")
    parser.add_argument("--replicas", type=_counts, default=[1, 5, 10], metavar="R,R,...", help="seeds in a step: 1,5,10")
    parser.add_argument("--no-ablation", action="store_true", help="leave out the lines without augmentation")
    parser.add_argument("--only-graph", action="store_true", help="leave out timm's module")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.set_defaults(measure=run)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers from 1 on with commas between, such as 1,5,10")
    return counts


def random_images() -> Images:
    """A data set of the size of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    return {
        split: (
            torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2),
            torch.randint(0, NUM_CLASSES, (count,), generator=generator),
        )
        for split, count in NUM_IMAGES.items()
    }


def run(options: argparse.Namespace) -> int:
    """Measure and print the table."""
    attentions = options.attention or ["content", "positional"]
    lines_wanted = cases(attentions, options.replicas, ablation=not options.no_ablation)
    configs = {
        case: config_of(case, options.overrides) for case in lines_wanted if case.step == "graph" or not options.only_graph
    }
    group, images = join("auto"), random_images()
    limit = product_limit_tflops(group.device)
    print(f"products of bfloat16 matrices: {limit:,.2f} TFLOP/s", file=sys.stderr, flush=True)
    lines: list[dict[str, Any]] = []
    eager: dict[tuple[Attention, bool], float] = {}
    for case, config in configs.items():
        rate = measure(case, config, group, images)
        if config.runtime.step != case.step:
            print(f"{case}: your runtime.step={config.runtime.step} is what is measured", file=sys.stderr)
        for note in rate.notes:
            print(f"{case}: {note}", file=sys.stderr)
        key = case.attention, case.augmentation
        if case.step == "eager":
            eager[key] = rate.images_per_s
        lines.append(
            {
                "case": str(case),
                **asdict(case),
                **asdict(rate),
                "times_eager": rate.images_per_s / eager[key] if key in eager else None,
                "batch_size": config.train.global_batch_size,
                "runtime_step": config.runtime.step,
                "of_limit": rate.images_per_s * gflop_per_image(config) / 1000 / limit,
            }
        )
        print(table(lines[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(lines))
    if options.json:
        facts = {**environment(group.device), "product_limit_tflops": limit}
        facts.pop("host")
        write_json(options.json, {**facts, "results": lines})
    return 0
