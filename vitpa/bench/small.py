"""`vitpa bench small`: training steps of the paper's small ViT on images of 32 pixels, the usual way and ours.

Whole steps (forward, backward, clipping, AdamW) with the order of the images, their augmentation and the metrics, on random
images that lie on the device. `eager` and `compile` are timm's module; `graph` is the step of vitpa/step/step.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from vitpa.arguments import whole_numbers
from vitpa.bench.measure import (
    file_name,
    gflop_per_image,
    make_steps,
    measured,
    product_limit_tflops,
    rates,
    step_runner,
    wait,
)
from vitpa.bench.timm_steps import TimmSteps
from vitpa.config import RunConfig
from vitpa.config_file import Override, load_config, preset, shipped_configs
from vitpa.data.loader import ResidentFeed
from vitpa.data.resident import ResidentImages
from vitpa.distributed import Group, init_process_group
from vitpa.environment import environment
from vitpa.records import write_json
from vitpa.step.step import ReplicaSteps

Attention = Literal["content", "positional"]
Step = Literal["eager", "compile", "graph"]

NUM_IMAGES, NUM_CLASSES = {"train": 50_000, "val": 10_000}, 10


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


def config_of(case: Case, overrides: Sequence[str]) -> RunConfig:
    """The cifar10 recipe as `case` runs it."""
    before = [f"model.attention={case.attention}", f"runtime.step={case.step}"]
    after = [] if case.augmentation else ["augment.policy=none", "augment.crop=none", "augment.hflip=false"]
    changes: list[str | Override] = [*map(preset, before), *overrides, *map(preset, after)]
    return load_config(shipped_configs()["cifar10"], changes)


Images = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by split: images and labels


def build(case: Case, config: RunConfig, group: Group, images: Images) -> ReplicaSteps | TimmSteps:
    """The steps of `case`, not yet compiled."""
    seeds = list(range(case.replicas))
    resident = {split: ResidentImages(*tensors, device=group.device) for split, tensors in images.items()}
    feed = ResidentFeed(resident, group, seeds=seeds, batch_size=config.train.global_batch_size, accum_steps=1)
    return make_steps(config, group, feed, seeds=seeds, num_classes=NUM_CLASSES, timm=case.step != "graph")


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
    run = step_runner(steps, epoch_steps)
    run(3)
    wait(device)
    start_s = time.monotonic() - began_s
    found = rates(run, case.replicas * config.train.global_batch_size, group)
    steps.close()
    median = statistics.median(found)
    return Rate(
        images_per_s=median,
        spread=(max(found) - min(found)) / median,
        peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        start_s=start_s,
        notes=tuple(notes),
    )


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
    parser.add_argument(
        "--replicas", type=whole_numbers(1, 1024), default=[1, 5, 10], metavar="R,R,...", help="seeds in a step: 1,5,10"
    )
    parser.add_argument("--no-ablation", action="store_true", help="leave out the lines without augmentation")
    parser.add_argument("--only-graph", action="store_true", help="leave out timm's module")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write the figures there, too")
    parser.set_defaults(measure=run)


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
    group, images = init_process_group("auto"), random_images()
    limit = product_limit_tflops(group)
    print(f"products of bfloat16 matrices: {limit:,.2f} TFLOP/s", file=sys.stderr, flush=True)
    facts = {**environment(group.device), "product_limit_tflops": limit, **measured(next(iter(configs.values())))}
    facts.pop("host")
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
        if options.json:  # again after every line: an end before the last one loses none
            write_json(options.json, {**facts, "complete": len(lines) == len(configs), "results": lines})
    print(table(lines))
    return 0
