"""How a case is measured: the feed and the steps it needs, rates as the median of windows, and what the device could do."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitpa.bench.kernels import kernels_of
from vitpa.bench.rival_loaders import RivalLoader
from vitpa.bench.schema import Case, Line
from vitpa.bench.timm_steps import TimmSteps
from vitpa.bench.vmap_steps import VmapSteps
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation
from vitpa.data.loader import Feed, ResidentFeed, StreamedFeed
from vitpa.data.resident import ResidentImages
from vitpa.data.sampler import Batch
from vitpa.datasets import facts_of
from vitpa.distributed import Group, init_process_group
from vitpa.environment import environment
from vitpa.flops import gflop_per_image
from vitpa.models import build_model
from vitpa.optim import make_optimizer
from vitpa.step.step import ReplicaSteps

WINDOWS = 5  # their median is quoted
MIN_STEPS, MIN_LOADER_BATCHES = 3, 24  # of a window
LEARNING_RATE_SHARE = 0.1  # of the recipe's peak: there is no warm-up
MAX_STEPS = 1_000_000  # of one benchmark
LOG_EVERY_STEPS = 50
LATE_READING = "reading rows later"  # the mechanism: the host does not wait for what a window of steps gave

Runner = Callable[[int], object]  # does so many steps
Steps = ReplicaSteps | TimmSteps | VmapSteps


@dataclass(frozen=True)
class Bench:
    """What measures: the processes, how fast matrix products alone are on each device, and how long a window is at least."""

    group: Group
    peak_matmul_tflops: float
    window_s: float
    num_kernels: int = 0  # of a line, to be named

    @classmethod
    def start(cls, window_s: float, num_kernels: int = 0) -> Bench:
        """Join the other processes, if there are any, and see how fast matrix products are.

        Raises:
            ConfigError: as `init_process_group`.
        """
        group = init_process_group("auto")
        peak = peak_matmul_tflops(group, window_s)
        if group.is_main:
            print(f"bfloat16 matrix products: {peak:,.2f} TFLOP/s", file=sys.stderr, flush=True)
        return cls(group, peak, window_s, num_kernels)

    def facts(self) -> dict[str, Any]:
        """Versions and hardware."""
        facts = {**environment(self.group.device), "peak_matmul_tflops": self.peak_matmul_tflops}
        facts.pop("host")
        return facts


def measure(case: Case, configs: Sequence[RunConfig], bench: Bench, feed: Feed | RivalLoader) -> Line:
    """Build what `case` says of the runs that share a step, run it on the images of `feed` and time it."""
    group, on_gpu = bench.group, bench.group.device.type == "cuda"
    torch._dynamo.reset()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)
    began_s = time.monotonic()
    run: Runner
    notes: list[str] = []
    with ExitStack() as stack:
        if isinstance(feed, RivalLoader) or (isinstance(feed, StreamedFeed) and case.model is None):
            batches = feed.batches() if isinstance(feed, RivalLoader) else loader_batches(feed)
            stack.enter_context(closing(batches))
            notes = list(feed.notes) if isinstance(feed, RivalLoader) else []
            run, least = lambda count: deque(itertools.islice(batches, count), maxlen=0), MIN_LOADER_BATCHES
        else:
            steps = stack.enter_context(closing(make_steps(case, configs, group, feed)))
            notes = steps.prepare(0)
            train = feed.images["train"]
            num_images = len(train.labels if isinstance(train, ResidentImages) else train.beton)
            waits = case.without == LATE_READING
            run, least = step_runner(steps, num_images // case.batch_size, waits=waits), MIN_STEPS
        run(3)
        wait(group.device)
        start_s = time.monotonic() - began_s
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        found = rates(run, case.replicas * case.batch_size, group, least=least, window_s=bench.window_s)
        cpu_cores = (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)
        memory_gib = resident_gib()
        kernels = kernels_of(run, group.device, bench.num_kernels) if bench.num_kernels else ()
    median = statistics.median(found)
    peak_gflops = 1000 * bench.peak_matmul_tflops * group.world_size
    return Line(
        case=case,
        images_per_s=median,
        spread=(max(found) - min(found)) / median,
        peak_memory_gib=torch.cuda.max_memory_allocated(group.device) / 2**30 if on_gpu else None,
        start_s=start_s,
        mfu=None if case.model is None else median * gflop_per_image(configs[0]) / peak_gflops,
        notes=tuple(notes),
        kernels=kernels,
        cpu_cores=cpu_cores,
        memory_gib=memory_gib,
    )


def synthetic_feed(case: Case, config: RunConfig, group: Group, num_images: Mapping[str, int]) -> ResidentFeed:
    """Random images on the device, so many of each split."""
    size, generator = config.model.img_size, torch.Generator(group.device).manual_seed(group.rank)
    random = partial(torch.randint, device=group.device, generator=generator)
    images = {}
    for split, count in num_images.items():
        pixels = random(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        images[split] = ResidentImages(pixels, random(0, num_classes_of(config), (count,)), device=group.device)
    seeds, batch_size = range(config.seed, config.seed + case.replicas), case.batch_size // group.world_size
    return ResidentFeed(images, group, seeds=seeds, batch_size=batch_size, accum_steps=1)


def resident_gib() -> float:
    """The memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def loader_batches(feed: StreamedFeed) -> Generator[Batch, None, None]:
    """Cropped uint8 batches on the device, epoch after epoch."""
    images = feed.images["train"]
    for epoch in itertools.count():
        with closing(feed.indices(epoch, 0)) as indices, closing(images.train_batches(indices, epoch)) as batches:
            yield from batches


def replicas_of(config: RunConfig, count: int) -> list[RunConfig]:
    """So many runs that differ in their seeds alone."""
    return [config.model_copy(update={"seed": config.seed + number}) for number in range(count)]


def make_steps(case: Case, configs: Sequence[RunConfig], group: Group, feed: Feed) -> Steps:
    """The steps of a training by `configs`, not yet compiled."""
    device, num_classes, config = group.device, num_classes_of(configs[0]), configs[0]
    models = [build_model(**dict(each.model), num_classes=num_classes, seed=each.seed).to(device) for each in configs]
    optimizers = [make_optimizer(each, model) for each, model in zip(configs, models, strict=True)]
    augmentation = Augmentation.of([config], img_size=config.model.img_size, device=device)
    if case.model == "vmap":
        return VmapSteps(configs, models=models, feed=feed, augmentation=augmentation)
    if case.model == "timm":
        return TimmSteps(config, model=models[0], optimizer=optimizers[0], feed=feed, augmentation=augmentation)
    rates = torch.tensor([each.optim.lr for each in configs], dtype=torch.float64) * LEARNING_RATE_SHARE
    rates = rates if "optim.lr" in case.differing else rates[:1]
    return ReplicaSteps(
        configs, group, models=models, optimizers=optimizers, feed=feed, learning_rates=rates.expand(MAX_STEPS, -1)
    )


def num_classes_of(config: RunConfig) -> int:
    """The classes of the data set; ten for one of the user's own."""
    return facts_of(config.dataset).num_classes or 10


def step_runner(steps: Steps, epoch_steps: int, *, waits: bool = False) -> Runner:
    """A function that does so many steps as train.py does them, with a closed window every 50, and goes on where it stopped.

    An epoch begins every `epoch_steps` steps, with batches that no one has begun to decode; not with each call. What a window
    gave is read later, or if it `waits` at once.
    """
    numbers = itertools.count()

    def run(count: int) -> None:
        for step in itertools.islice(numbers, count):
            if step % epoch_steps == 0:
                steps.begin_epoch(step // epoch_steps, 0)
            steps.load()
            steps.step()
            if step % LOG_EVERY_STEPS == LOG_EVERY_STEPS - 1:
                row = steps.accumulator.take()
                if waits:
                    row.result()

    return run


def rates(run: Runner, images: int, group: Group, *, window_s: float, least: int = MIN_STEPS) -> list[float]:
    """Images per second in each of WINDOWS windows of `least` steps or more, a step being `images` images of all processes."""
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


def peak_matmul_tflops(group: Group, window_s: float) -> float:
    """Operations per second of a large product of bfloat16 matrices on this device, in 10^12: what products alone could do."""
    device = group.device
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b)

    return max(rates(run, 1, group, window_s=window_s)) * 2 * size**3 / 1e12
