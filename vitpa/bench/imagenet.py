"""`vitpa bench imagenet`: ViT-tiny on images of 224 pixels: the model alone, the loader alone, both together; several GPUs.

`timm` and `model` are whole steps (forward, backward, AdamW) on random images that lie on the device, without augmentation:
those of timm's module compiled, the yardstick on one GPU, and ours. `training, synthetic` is ours with all that the recipe
does to cropped images. `loader` gives cropped uint8 batches on the device from a .beton, `training` is both. Every number of
GPUs has processes of its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from vitpa.arguments import ConfigError, number, whole_number, whole_numbers
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
from vitpa.config import RunConfig
from vitpa.config_file import Override, load_config, preset, shipped_configs
from vitpa.data.beton import Beton
from vitpa.data.decode.gpu import gpu_unsupported_reason
from vitpa.data.loader import Feed, ResidentFeed, StreamedFeed
from vitpa.data.manifest import beton_path
from vitpa.data.resident import ResidentImages
from vitpa.data.sampler import Batch
from vitpa.data.stream import StreamedImages
from vitpa.datasets import SPLITS
from vitpa.distributed import Group, destroy_process_group, init_process_group
from vitpa.environment import environment
from vitpa.records import read_json, write_json

Attention = Literal["content", "positional"]
Decoder = Literal["cpu", "gpu"]

ATTENTIONS: tuple[Attention, ...] = ("content", "positional")
PARTS = ("timm", "model", "loader", "train")

NUM_CLASSES = 1000
SYNTHETIC_STEPS = 4  # batches of random images on the device; they come again and again
OPTIONS = {  # which say what these keys would
    "dataset": "--dataset",
    "model.attention": "--attention",
    "train.global_batch_size": "--batch-size",
}
IGNORED = ("runtime.accum_steps", "runtime.device", "runtime.stage_dir", "runtime.cpu_threads")  # keys without a meaning here
LOADER_BATCHES = 24  # of each window in which the loader is timed
BARE = (
    "augment.crop=none",
    "augment.eval_crop_pct=1.0",
    "augment.policy=none",
    "augment.erase_prob=0.0",
    "augment.mixup_alpha=0.0",
    "augment.cutmix_alpha=0.0",
)


@dataclass(frozen=True)
class Bench:
    """What measures: the processes, how fast products alone could be on their GPUs, and how long a window is at least."""

    group: Group
    limit_tflops: float
    window_s: float


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    case: str
    attention: Attention | None  # None: no network
    gpus: int
    batch_size: int  # of all GPUs
    images_per_s: float  # of all GPUs
    spread: float  # (largest - smallest window) / median
    peak_memory_gib: float | None  # of the first GPU; None: not on a GPU
    start_s: float  # until the first step: building, compiling, capturing
    of_limit: float | None  # of what products of bfloat16 matrices alone would allow on a GPU
    notes: tuple[str, ...] = ()


def config_of(attention: Attention, batch_size: int, *changes: str | Override) -> RunConfig:
    """The imagenet recipe with these changes."""
    words = [f"model.attention={attention}", f"train.global_batch_size={batch_size}"]
    return load_config(shipped_configs()["imagenet"], [*map(preset, words), *changes])


def synthetic_feed(config: RunConfig, group: Group) -> ResidentFeed:
    """Random images on the device."""
    local, size = config.train.global_batch_size // group.world_size, config.model.img_size
    generator = torch.Generator(group.device).manual_seed(group.rank)
    images = {}
    for split, count in (("train", SYNTHETIC_STEPS * config.train.global_batch_size), ("val", local)):
        random = partial(torch.randint, generator=generator, device=group.device)
        pixels = random(0, 256, (count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        images[split] = ResidentImages(pixels, random(0, NUM_CLASSES, (count,)), device=group.device)
    return ResidentFeed(images, group, seeds=[config.seed], batch_size=local, accum_steps=1)


def time_steps(case: str, config: RunConfig, bench: Bench, feed: Feed, *, timm: bool = False) -> Line:
    """Build the steps of a training, run and time them."""
    group, batch_size = bench.group, config.train.global_batch_size
    torch._dynamo.reset()
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)
    began_s = time.monotonic()
    steps = make_steps(config, group, feed, seeds=[config.seed], num_classes=NUM_CLASSES, timm=timm)
    notes = steps.prepare(0)
    train = feed.images["train"]
    num_images = len(train.labels if isinstance(train, ResidentImages) else train.beton)
    run = step_runner(steps, num_images // batch_size)
    run(3)
    wait(group.device)
    start_s = time.monotonic() - began_s
    found = rates(run, batch_size, group, window_s=bench.window_s)
    steps.close()
    of_limit = None
    if group.device.type == "cuda":
        of_limit = statistics.median(found) * gflop_per_image(config) / 1000 / (bench.limit_tflops * group.world_size)
    result = as_line(case, config, group, found, start_s)
    return replace(result, attention=config.model.attention, of_limit=of_limit, notes=tuple(notes))


def as_line(case: str, config: RunConfig, group: Group, found: Sequence[float], start_s: float) -> Line:
    """What the windows `found` gave, without a network."""
    median, on_gpu = statistics.median(found), group.device.type == "cuda"
    return Line(
        case=case,
        attention=None,
        gpus=group.world_size,
        batch_size=config.train.global_batch_size,
        images_per_s=median,
        spread=(max(found) - min(found)) / median,
        peak_memory_gib=torch.cuda.max_memory_allocated(group.device) / 2**30 if on_gpu else None,
        start_s=start_s,
        of_limit=None,
    )


def open_betons(config: RunConfig, dataset: str) -> dict[str, Beton]:
    """Both splits of a data set.

    Raises:
        BetonError: they cannot be used.
    """
    folder = config.runtime.data_path
    return {split: Beton.open(beton_path(folder, dataset, split), dataset, split) for split in SPLITS}


def streamed_feed(config: RunConfig, group: Group, betons: dict[str, Beton], decoder: Decoder) -> StreamedFeed:
    """Images decoded as they are needed."""
    workers = config.runtime.workers or group.cpus
    images = {
        split: StreamedImages(
            beton,
            config.augment,
            img_size=config.model.img_size,
            seed=config.seed,
            device=group.device,
            workers=workers,
            decoder=decoder,
        )
        for split, beton in betons.items()
    }
    batch_size = config.train.global_batch_size // group.world_size
    return StreamedFeed(images, group, seed=config.seed, batch_size=batch_size, accum_steps=1, order=config.train.order)


def time_loader(case: str, config: RunConfig, bench: Bench, feed: StreamedFeed) -> Line:
    """Cropped uint8 batches on the device, as fast as they come."""
    group, images, began_s = bench.group, feed.images["train"], time.monotonic()

    def endless() -> Generator[Batch, None, None]:
        for epoch in itertools.count():
            with closing(feed.indices(epoch, 0)) as indices, closing(images.train_batches(indices, epoch)) as batches:
                yield from batches

    with closing(endless()) as batches:

        def run(count: int) -> None:
            for _ in itertools.islice(batches, count):
                pass

        run(3)
        wait(group.device)
        start_s = time.monotonic() - began_s
        found = rates(run, feed.global_batch_size, group, least=LOADER_BATCHES, window_s=bench.window_s)
    return as_line(case, config, group, found, start_s)


def lines_of(options: argparse.Namespace, batch_size: int, bench: Bench) -> Iterator[Line]:
    """The lines of the table at one batch size, for the processes that are there."""
    group, step = bench.group, preset(f"runtime.step={options.step}")
    for attention in options.attention:
        bare = partial(config_of, attention, batch_size, *map(preset, BARE))
        if "timm" in options.parts and group.world_size == 1:
            config = bare(preset("runtime.step=compile"), *options.overrides)
            yield time_steps("timm, compiled", config, bench, synthetic_feed(config, group), timm=True)
        if "model" in options.parts:
            config = bare(step, *options.overrides)
            yield time_steps("model", config, bench, synthetic_feed(config, group))
        if "train" in options.parts:
            whole = ("augment.crop=none", "augment.eval_crop_pct=1.0")
            config = config_of(attention, batch_size, *map(preset, whole), step, *options.overrides)
            yield time_steps("training, synthetic", config, bench, synthetic_feed(config, group))
    if options.dataset is not None:
        yield from streamed_lines(options, batch_size, bench)


def streamed_lines(options: argparse.Namespace, batch_size: int, bench: Bench) -> Iterator[Line]:
    """Those that need images of a .beton."""
    group, attentions = bench.group, options.attention
    step = preset(f"runtime.step={options.step}")
    configs = {attention: config_of(attention, batch_size, step, *options.overrides) for attention in attentions}
    config = configs[attentions[0]]
    betons = open_betons(config, options.dataset)
    stored = "JPEG" if betons["train"].is_jpeg.any() else "raw"
    decoders: list[Decoder] = ["gpu", "cpu"] if config.runtime.decoder == "auto" else [config.runtime.decoder]
    reason = None
    if "gpu" in decoders:
        reason = gpu_unsupported_reason(betons["train"], img_size=config.model.img_size, device=group.device)
    if reason is not None:
        decoders.remove("gpu")
        print(f"without decoding on the GPU: {reason}", file=sys.stderr)
    for decoder in decoders:
        if "loader" in options.parts:
            yield time_loader(f"loader, {stored}, {decoder}", config, bench, streamed_feed(config, group, betons, decoder))
        for attention in attentions if "train" in options.parts else ():
            feed = streamed_feed(configs[attention], group, betons, decoder)
            yield time_steps(f"training, {stored}, {decoder}", configs[attention], bench, feed)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The results for people."""
    head = (
        f"{'case':22s} {'attention':11s} {'GPUs':>4s} {'batch':>6s} {'images/s':>10s} {'spread':>7s} {'x timm':>7s} "
        f"{'x 1 GPU':>8s} {'of synth':>9s} {'of limit':>9s} {'GiB':>6s} {'start s':>8s}"
    )

    def cell(value: float | None, width: int, digits: int = 2) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}s}"

    rows = [head]
    for line in lines:
        rows.append(
            f"{line['case']:22s} {line['attention'] or '-':11s} {line['gpus']:4d} {line['batch_size']:6d} "
            f"{line['images_per_s']:10,.0f} {100 * line['spread']:6.1f}% {cell(line['times_timm'], 7)} "
            f"{cell(line['times_one_gpu'], 8)} {cell(line['of_synthetic'], 9)} {cell(line['of_limit'], 9)} "
            f"{cell(line['peak_memory_gib'], 6, 1)} {line['start_s']:8.1f}"
        )
    return "\n".join(rows)


def with_ratios(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines, each with its ratio to timm's, to that of one GPU and the same batch per GPU or in all, and to synthetic."""

    def rate(case: str, attention: Attention | None, gpus: int, batch_size: int) -> float | None:
        return next(
            (
                line.images_per_s
                for line in lines
                if (line.case, line.attention, line.gpus, line.batch_size) == (case, attention, gpus, batch_size)
            ),
            None,
        )

    found = []
    smallest = min((line.batch_size for line in lines), default=0)
    for line in lines:
        timm = rate("timm, compiled", line.attention, 1, smallest)
        one = None if line.gpus == 1 else rate(line.case, line.attention, 1, smallest)
        synthetic = None
        if line.case.startswith("training") and not line.case.endswith("synthetic"):
            synthetic = rate("training, synthetic", line.attention, line.gpus, line.batch_size)
        others = {"times_timm": timm, "times_one_gpu": one, "of_synthetic": synthetic}
        ratios = {name: None if other is None else line.images_per_s / other for name, other in others.items()}
        found.append({**asdict(line), **ratios})
    return found


def add_parser(benchmarks: Any) -> None:
    """The options of `vitpa bench imagenet`."""
    parser = benchmarks.add_parser(
        "imagenet",
        help="ViT-tiny at 224 pixels: the model, the loader, both, on one GPU and on several",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: vitpa bench imagenet --dataset imagenet --gpus 1,2 --json imagenet.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the imagenet recipe")
    parser.add_argument("--attention", choices=ATTENTIONS, action="append", help="only this one")
    parser.add_argument(
        "--dataset", help="a data set that `vitpa prep` made, for the loader; without it synthetic images only"
    )
    parser.add_argument(
        "--gpus", type=whole_numbers(1, 1024), default=[1], metavar="N,N,...", help="numbers of GPUs of this node: 1"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1, 1_048_576),
        default=1024,
        metavar="B",
        help="of all GPUs together, and for several also of each: 1024",
    )
    parser.add_argument("--parts", type=parts, default=PARTS, metavar="PART,...", help=f"of the table: {','.join(PARTS)}")
    parser.add_argument("--step", choices=("auto", "compile", "eager"), default="auto", help="how our steps run: auto")
    parser.add_argument(
        "--window-s",
        type=number(0, 3600, above=True),
        default=0.5,
        metavar="S",
        help="how long each of 5 windows lasts at least: 0.5",
    )
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write the figures there, too")
    parser.set_defaults(measure=run)


def parts(text: str) -> tuple[str, ...]:
    """Parts of the table, with commas between."""
    words = tuple(text.split(","))
    if not set(words) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(PARTS)}")
    return words


def run(options: argparse.Namespace) -> int:
    """Measure and print the table: this process starts those that measure, or is one of them.

    What was measured before something fails is kept.
    """
    options.gpus = list(dict.fromkeys(options.gpus))  # each once
    options.attention = list(dict.fromkeys(options.attention or ATTENTIONS))
    if "WORLD_SIZE" in os.environ:
        return work(options)
    check(options)
    lines: list[Line] = []
    facts: dict[str, Any] = {}
    complete = False
    try:
        for gpus in options.gpus:
            if not measure(gpus, options, lines, facts):
                print(f"vitpa bench: measuring with {gpus} processes has failed; see above", file=sys.stderr)
                return 1
        complete = True
    finally:
        results = with_ratios(lines)
        if results:
            print(table(results))
        if results and options.json:
            config = config_of("content", options.batch_size, *options.overrides)
            facts |= {**measured(config), "dataset": options.dataset, "step": step_of(options), "complete": complete}
            write_json(options.json, {**facts, "results": results})
    if not results:
        print("vitpa bench: none of these parts could be measured here", file=sys.stderr)
    return 0 if results else 1


def measure(gpus: int, options: argparse.Namespace, lines: list[Line], facts: dict[str, Any]) -> bool:
    """Have processes measure on so many GPUs and add what they find to `lines` and `facts`; False if they fail."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lines.json"
        words = [*worker_words(options), "--json", str(file)]
        launcher = ["vitpa.bench.torchrun", "--standalone", f"--nproc-per-node={gpus}", "-m"]
        process = subprocess.Popen([sys.executable, "-m", *launcher, "vitpa.cli", "bench", "imagenet", *words])
        try:
            process.wait()
        finally:
            if process.returncode is None:  # a stop was requested
                process.terminate()
                process.wait()
            if (measured := read_json(file)) is not None:
                facts.update(measured)
                lines += [Line(**{**each, "notes": tuple(each["notes"])}) for each in facts.pop("results")]
    return process.returncode == 0


def step_of(options: argparse.Namespace) -> str:
    """How the steps run: as the options say, or an override."""
    config = config_of("content", options.batch_size, preset(f"runtime.step={options.step}"), *options.overrides)
    return config.runtime.step


def check(options: argparse.Namespace) -> None:
    """Find out before anything is started whether it could be measured.

    Raises:
        ConfigError: a wrong override, a batch that cannot be divided, too few GPUs.
        BetonError: the data set cannot be used.
    """
    check_overrides(options)
    if options.dataset is None and options.parts == ("loader",):
        raise ConfigError("--parts loader: say with --dataset what is to be loaded")
    for gpus in options.gpus:
        if options.batch_size % (2 * gpus):
            raise ConfigError(f"--batch-size {options.batch_size} is not even for each of {gpus} processes")
        for attention in options.attention:
            config = config_of(attention, options.batch_size * gpus, *options.overrides)
    if options.dataset is not None:
        num_images, most = len(open_betons(config, options.dataset)["train"]), options.batch_size * max(options.gpus)
        if num_images < most:
            raise ConfigError(
                f"--dataset {options.dataset}: {num_images} images, less than a batch of {most}; say --batch-size"
            )
    visible = torch.cuda.device_count()
    if visible and max(options.gpus) > visible:
        raise ConfigError(f"--gpus {max(options.gpus)}: {visible} are visible here")
    if not visible:
        print("no GPU is visible here: what is measured is the CPU", file=sys.stderr)


def check_overrides(options: argparse.Namespace) -> None:
    """Find out whether an override contradicts an option, or has no meaning here.

    Raises:
        ConfigError: one does.
    """
    for override in options.overrides:
        key = override.partition("=")[0]
        if key in OPTIONS:
            raise ConfigError(f"{override}: say it by {OPTIONS[key]}")
        if key in IGNORED:
            raise ConfigError(f"{override}: this benchmark does without; leave it out")
        if key == "runtime.step" and options.step != "auto":
            raise ConfigError(f"{override} and --step {options.step}: say one of the two")
        if key == "runtime.step" and "timm" in options.parts:
            print(f"your {override} is what is measured, of timm's module, too", file=sys.stderr)


def worker_words(options: argparse.Namespace) -> list[str]:
    """The command line for the processes that measure."""
    words = [*options.overrides, "--batch-size", str(options.batch_size), "--parts", ",".join(options.parts)]
    words += ["--step", options.step, "--window-s", str(options.window_s)]
    for attention in options.attention:
        words += ["--attention", attention]
    return [*words, "--dataset", options.dataset] if options.dataset else words


def work(options: argparse.Namespace) -> int:
    """Measure as one of the processes that torchrun has started; the main one writes the file, again after every line."""
    group = init_process_group("auto")
    try:
        facts = environment(group.device)
        facts.pop("host")
        sizes = sorted({options.batch_size, options.batch_size * group.world_size})
        bench = Bench(group, product_limit_tflops(group), options.window_s)
        lines = []
        for batch_size in sizes:
            for each in lines_of(options, batch_size, bench):
                lines.append(each)
                if group.is_main:
                    notes = "".join(f"; {note}" for note in each.notes)
                    write_json(options.json, {**facts, "results": [asdict(line) for line in lines]})
                    print(f"{each.case} {each.attention or ''}: {each.images_per_s:,.0f} images/s{notes}", file=sys.stderr)
    finally:
        destroy_process_group()
    return 0
