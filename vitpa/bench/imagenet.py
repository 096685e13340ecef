"""`vitpa bench imagenet`: ViT-tiny on images of 224 pixels: the model alone, the loader alone, both together; several GPUs.

`model` is whole steps (forward, backward, AdamW) on random images that lie on the device, without augmentation; `timm, model`
the same of timm's module compiled, the yardstick on one GPU. `training, synthetic` is ours with all that the recipe does to
cropped images. `loader` gives cropped uint8 batches on the device from a .beton, `training` is both. Every number of GPUs has
processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vitpa.arguments import ConfigError, whole_number, whole_numbers
from vitpa.bench.measure import Bench, measure, synthetic_feed
from vitpa.bench.report import Report
from vitpa.bench.schema import RECIPES, Attention, Case, Decoder, Line
from vitpa.config import RunConfig
from vitpa.config_file import Override, load_config, preset, shipped_configs
from vitpa.data.beton import Beton, open_splits
from vitpa.data.decode.gpu import gpu_unsupported_reason
from vitpa.data.open import streamed_feed
from vitpa.distributed import Group, destroy_process_group
from vitpa.records import RunError

HELP = "ViT-tiny at 224 pixels: the model, the loader, both, on one GPU and on several"
EXAMPLE = "vitpa bench imagenet --dataset imagenet --gpus 1,2 --json imagenet.json"
PARTS = ("timm", "model", "loader", "train")
SYNTHETIC_STEPS = 4  # batches of random images on the device; they come again and again
LEAVE_OUT = "this benchmark does without; leave it out"
REFUSED = {  # keys of the recipe that an option says, or that have no meaning here
    "dataset": "say it by --dataset",
    "model.attention": "say it by --attention",
    "model.kind": "benchmarks measure ViTs; leave it out",
    "train.image_sizes": "benchmarks measure one size; say it by model.img_size",
    "train.global_batch_size": "say it by --batch-size",
    **{f"runtime.{key}": LEAVE_OUT for key in ("accum_steps", "device", "stage_dir", "cpu_threads")},
}
WHOLE_IMAGES = ("augment.crop=none", "augment.eval_crop_pct=1.0")
BARE = (*WHOLE_IMAGES, "augment.policy=none", "augment.erase_prob=0.0", "augment.mixup_alpha=0.0", "augment.cutmix_alpha=0.0")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    add = parser.add_argument
    add("--dataset", help="a data set that `vitpa prep` made, for the loader; without it synthetic images only")
    add("--gpus", type=whole_numbers(1, 1024), default=[1], metavar="N,N,...", help="numbers of GPUs of this node: 1")
    sizes = "of all GPUs together, and for several also of each: 1024"
    add("--batch-size", type=whole_number(1, 1_048_576), default=1024, metavar="B", help=sizes)
    add("--parts", type=parts_among(PARTS), default=PARTS, metavar="PART,...", help=f"of the table: {','.join(PARTS)}")
    add("--step", choices=("auto", "compile", "eager"), default="auto", help="how our steps run: auto")
    add("--worker", action="store_true", help=argparse.SUPPRESS)  # one of the processes that measure


def parts_among(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: some of the known parts of a table, with commas between."""

    def parts(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if not set(words) <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
        return words

    return parts


def config_of(attention: Attention, batch_size: int, *changes: str | Override) -> RunConfig:
    """The imagenet recipe with these changes."""
    words = [f"model.attention={attention}", f"train.global_batch_size={batch_size}"]
    return load_config(shipped_configs()[RECIPES["imagenet"]], [*map(preset, words), *changes])


def cases(options: argparse.Namespace, gpus: int, stored: str = "", decoders: Sequence[Decoder] = ()) -> dict[Case, RunConfig]:
    """What is measured on so many GPUs, or processes on the CPU, in the order of the table, and the recipe as it is for that.

    The data set's images are `stored` as JPEG or raw, and decoded by `decoders`; none: no data set.

    Raises:
        ConfigError: a wrong override.
    """
    found: dict[Case, RunConfig] = {}
    step, parts = f"runtime.step={options.step}", options.parts

    def add(attention: Attention, batch_size: int, *changes: str, **values: Any) -> None:
        config = config_of(attention, batch_size, *map(preset, changes), *options.overrides)
        found[Case.of(config, gpus=gpus, **values)] = config

    for size in sorted({options.batch_size, options.batch_size * gpus}):
        for attention in options.attention:
            if "timm" in parts and gpus == 1:
                add(attention, size, *BARE, "runtime.step=compile", model="timm", augmentation=False)
            if "model" in parts:
                add(attention, size, *BARE, step, augmentation=False)
            if "train" in parts:
                add(attention, size, *WHOLE_IMAGES, step)
        for decoder in decoders:
            images = {"images": stored, "decoder": decoder}
            if "loader" in parts:
                add(options.attention[0], size, model=None, augmentation=False, **images)
            for attention in options.attention if "train" in parts else ():
                add(attention, size, step, **images)
    return found


def run(options: argparse.Namespace) -> int:
    """Measure and print the table: this process starts those that measure, or is one of them."""
    if options.worker:
        return work(options)
    options.gpus = list(dict.fromkeys(options.gpus))  # each once
    check(options)
    with Report(options, config_of("content", options.batch_size, *options.overrides)) as report:
        for gpus in options.gpus:
            measure_with(gpus, options, report)
        if not report.lines:
            raise RunError("none of these parts could be measured here")
    return 0


def measure_with(gpus: int, options: argparse.Namespace, report: Report) -> None:
    """Have processes measure on so many GPUs and report what they find.

    Raises:
        RunError: they have failed.
    """
    launcher = ["vitpa.bench.torchrun", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    command = [sys.executable, "-m", *launcher, "vitpa.cli", "bench", "imagenet", *worker_words(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            receive(process.stdout, report)
        except BaseException:  # a stop was requested
            process.terminate()
            receive(process.stdout, report)
            raise
    if process.returncode:
        raise RunError(f"measuring with {gpus} processes has failed; see above")


def receive(documents: Iterable[str], report: Report) -> None:
    """Report what `work` sends, until it sends no more."""
    for text in documents:
        document = json.loads(text)
        if "case" in document:
            report.add(Line.model_validate_json(text))
        else:
            report.facts |= document


def worker_words(options: argparse.Namespace) -> list[str]:
    """The command line for the processes that measure."""
    words = ["--worker", *options.overrides, "--batch-size", str(options.batch_size), "--parts", ",".join(options.parts)]
    words += ["--step", options.step, "--window-s", str(options.window_s)]
    words += ["--kernels", str(options.kernels)] if options.kernels else []
    for attention in options.attention:
        words += ["--attention", attention]
    return [*words, "--dataset", options.dataset] if options.dataset else words


def work(options: argparse.Namespace) -> int:
    """Measure as one of the processes that torchrun has started; the main one sends JSON: its hardware, then each line."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no document
    bench = Bench.start(options.window_s, options.kernels)

    def send(document: Mapping[str, Any]) -> None:
        if bench.group.is_main:
            print(json.dumps(document), file=pipe, flush=True)

    try:
        send(bench.facts())
        betons: dict[str, Beton] = {}
        stored, decoders = "", list[Decoder]()
        if options.dataset is not None:
            config = config_of(options.attention[0], options.batch_size, *options.overrides)
            betons = open_splits(config.runtime.data_path, options.dataset)
            stored = "JPEG" if betons["train"].is_jpeg.any() else "raw"
            decoders = decoders_of(config, betons["train"], bench.group)
        for case, config in cases(options, bench.group.world_size, stored, decoders).items():
            send(line_of(case, config, bench, betons).model_dump(mode="json"))
    finally:
        destroy_process_group()
    return 0


def line_of(case: Case, config: RunConfig, bench: Bench, betons: Mapping[str, Beton]) -> Line:
    """Measure `case` with images of its own, which are freed."""
    group, batch_size = bench.group, case.batch_size // case.gpus
    if case.decoder is not None:
        feed = streamed_feed(config, betons, group, batch_size=batch_size, decoder=case.decoder)
        return measure(case, [config], bench, feed)
    num_images = {"train": SYNTHETIC_STEPS * case.batch_size, "val": batch_size}
    return measure(case, [config], bench, synthetic_feed(case, config, group, num_images))


def decoders_of(config: RunConfig, beton: Beton, group: Group) -> list[Decoder]:
    """The decoders to be measured: that of the configuration, or all that can decode these images."""
    decoders: list[Decoder] = ["gpu", "cpu"] if config.runtime.decoder == "auto" else [config.runtime.decoder]
    if "gpu" in decoders:
        reason = gpu_unsupported_reason(beton, img_size=config.model.img_size, device=group.device)
        if reason is not None:
            decoders.remove("gpu")
            print(f"without decoding on the GPU: {reason}", file=sys.stderr)
    return decoders


def check(options: argparse.Namespace) -> None:
    """Find out before anything is started whether it could be measured.

    Raises:
        ConfigError: a wrong override, a batch that cannot be divided, too few GPUs.
        BetonError: the data set cannot be used.
    """
    for override in options.overrides:
        key = override.partition("=")[0]
        if key in REFUSED:
            raise ConfigError(f"{override}: {REFUSED[key]}")
        if key == "runtime.step" and options.step != "auto":
            raise ConfigError(f"{override} and --step {options.step}: say one of the two")
    if options.dataset is None and options.parts == ("loader",):
        raise ConfigError("--parts loader: say with --dataset what is to be loaded")
    for gpus in options.gpus:
        if options.batch_size % (2 * gpus):
            raise ConfigError(f"--batch-size {options.batch_size} is not even for each of {gpus} processes")
        for attention in options.attention:
            config = config_of(attention, options.batch_size * gpus, *options.overrides)
    if options.dataset is not None:
        num_images, most = (
            len(open_splits(config.runtime.data_path, options.dataset)["train"]),
            options.batch_size * max(options.gpus),
        )
        if num_images < most:
            raise ConfigError(
                f"--dataset {options.dataset}: {num_images} images, less than a batch of {most}; say --batch-size"
            )
    visible = torch.cuda.device_count()
    if visible and max(options.gpus) > visible:
        raise ConfigError(f"--gpus {max(options.gpus)}: {visible} are visible here")
    if not visible:
        print("no GPU is visible here: what is measured is the CPU", file=sys.stderr)
