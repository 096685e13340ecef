"""`vitpa bench ablation`: a recipe's training steps as they are, with each of our mechanisms off alone, and by other means.

The steps are whole ones on random images that lie on the device, or with --dataset on those of a .beton. `without ...` has one
mechanism off: the CUDA graph, compilation, the step that runs share, one of the kernels (torch's own operation instead),
reading rows later, the decoder on the GPU; `of whole` is its rate over that with all of them on. Beside them: timm's module
and several seeds by torch.func (`vmap`), both compiled and, where the recipe mixes images, without augmentation. With
--dataset: the loader alone, FFCV's, torchvision's decoder (nvJPEG on a GPU) and nvImageCodec if it is
installed, on the same photos. `cores` are those of the processor that the main process kept busy.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

from vitpa.arguments import ConfigError, whole_number
from vitpa.bench.imagenet import BARE, SYNTHETIC_STEPS, WHOLE_IMAGES, decoders_of, parts_among
from vitpa.bench.measure import LATE_READING, Bench, measure, replicas_of, synthetic_feed
from vitpa.bench.report import Report
from vitpa.bench.rival_loaders import Rival, rival_loader
from vitpa.bench.schema import Attention, Case
from vitpa.config import RunConfig
from vitpa.config_file import Override, load_config, preset, shipped_configs
from vitpa.data.beton import Beton, open_splits
from vitpa.data.open import streamed_feed
from vitpa.together import MAX_REPLICAS

HELP = "what each of our mechanisms is worth, and how other ways do in the same job"
EXAMPLE = "vitpa bench ablation --recipe cifar100 --replicas 5 --json ablation.json"
NUM_IMAGES = {"train": 50_000, "val": 10_000}  # on the device, where whole data sets of a recipe lie there
PARTS = ("rivals", "whole", "without", "loaders")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    add = parser.add_argument
    add("--recipe", choices=sorted(shipped_configs()), default="cifar10", metavar="NAME", help="whose steps: cifar10")
    add("--dataset", help="a data set that `vitpa prep` made: its images instead of random ones, and the loaders")
    seeds = "seeds in a step: 5, or 1 of images that are streamed"
    add("--replicas", type=whole_number(1, MAX_REPLICAS), metavar="R", help=seeds)
    add("--parts", type=parts_among(PARTS), default=PARTS, metavar="PART,...", help=f"of the table: {','.join(PARTS)}")


def config_of(options: argparse.Namespace, attention: Attention, *changes: str) -> RunConfig:
    """The recipe with this attention and these changes.

    Raises:
        ConfigError: a wrong override, or the recipe's network is no ViT.
    """
    before: list[str | Override] = [preset(f"model.attention={attention}")]
    return load_config(shipped_configs()[options.recipe], [*before, *options.overrides, *map(preset, changes)])


def streams(config: RunConfig) -> bool:
    """Whether its images are decoded as they are needed."""
    return config.augment.crop == "random_resized"


def cases(options: argparse.Namespace, stored: str = "", on_gpu: bool = True) -> dict[Case, list[RunConfig]]:
    """What is measured of trainings, in the order of the table, and the runs that share its step.

    `stored` is how the images of the data set are, JPEG or raw; empty: random images on the device. `on_gpu`: they are decoded
    there.

    Raises:
        ConfigError: a wrong override.
    """
    found: dict[Case, list[RunConfig]] = {}
    changes = WHOLE_IMAGES if streams(config_of(options, options.attention[0])) and not stored else ()
    images: dict[str, Any] = {"images": stored, "decoder": "gpu" if on_gpu else "cpu"} if stored else {}

    def add(config: RunConfig, count: int, **values: Any) -> None:
        found[Case.of(config, replicas=count, **values)] = replicas_of(config, count)

    for attention in options.attention:
        config = config_of(options, attention, *changes)
        count = options.replicas or (1 if streams(config_of(options, attention)) else 5)
        if "rivals" in options.parts:
            mixes = config.augment.mixes
            usual = config_of(options, attention, *(BARE if mixes else changes), *compiled(config))
            add(usual, 1, model="timm", augmentation=not mixes)
            add(usual, count, model="vmap", augmentation=not mixes)
        if "whole" in options.parts:
            add(config, count, **images)
        if "without" in options.parts:
            for name, (other, replicas) in without_one(config, count).items():
                add(other, replicas, without=name, **images)
            if images.get("decoder") == "gpu":
                add(config, count, without="the decoder on the GPU", **{**images, "decoder": "cpu"})
    return found


def compiled(config: RunConfig) -> tuple[str, ...]:
    """What compiles the usual way, unless a user wants nothing compiled."""
    return () if config.runtime.step == "eager" else ("runtime.step=compile",)


def without_one(config: RunConfig, replicas: int) -> dict[str, tuple[RunConfig, int]]:
    """For each mechanism that such a training uses on a GPU: how it is trained, and by how many runs at a time, without it."""

    def changed(**values: Any) -> tuple[RunConfig, int]:
        return config.model_copy(update={"runtime": config.runtime.model_copy(update=values)}), replicas

    found = {}
    if config.runtime.step in {"auto", "graph"}:
        found["the CUDA graph"] = changed(step="compile")
    if config.runtime.step != "eager":
        found["compilation"] = changed(step="eager")
    if replicas > 1:
        found["the shared step"] = (config, 1)
    used = ["attention" if config.model.attention == "content" else "mix", "add_norm", "bias_gelu"]
    if config.augment.policy == "randaugment_timm":
        used.append("policy")
    if config.augment.mixes or (config.augment.erase_prob > 0 and config.augment.erase_mode == "pixel"):
        used.append("erase")
    for name in used:
        found[f"the {name} kernel"] = changed(torch_operations=(*config.runtime.torch_operations, name))
    found[LATE_READING] = (config, replicas)
    return found


def run(options: argparse.Namespace) -> int:
    """Measure and print the table."""
    betons = betons_of(options)
    bench = Bench.start(options.window_s, options.kernels)
    first = config_of(options, options.attention[0])
    on_gpu = bool(betons) and decoders_of(first, betons["train"], bench.group)[0] == "gpu"
    with Report(options, first) as report:
        report.facts |= {**bench.facts(), "recipe": options.recipe}
        for case, configs in cases(options, stored_as(betons), on_gpu).items():
            if case.decoder is not None:
                batch_size = case.batch_size
                feed = streamed_feed(configs[0], betons, bench.group, batch_size=batch_size, decoder=case.decoder)
                report.add(measure(case, configs, bench, feed))
            else:
                few = {"train": SYNTHETIC_STEPS * case.batch_size, "val": case.batch_size}
                sizes = few if streams(first) else NUM_IMAGES
                report.add(measure(case, configs, bench, synthetic_feed(case, configs[0], bench.group, sizes)))
        if betons and "loaders" in options.parts:
            measure_loaders(first, betons, bench, report)
    return 0


def measure_loaders(config: RunConfig, betons: dict[str, Beton], bench: Bench, report: Report) -> None:
    """Measure our loader alone, and each other that can be had here."""
    stored = stored_as(betons)
    values: dict[str, Any] = {"model": None, "augmentation": False, "images": stored}
    batch_size, device = config.train.global_batch_size, bench.group.device
    for decoder in decoders_of(config, betons["train"], bench.group):
        feed = streamed_feed(config, betons, bench.group, batch_size=batch_size, decoder=decoder)
        report.add(measure(Case.of(config, decoder=decoder, **values), [config], bench, feed))
    for rival in get_args(Rival) if stored == "JPEG" else ():
        loader = rival_loader(rival, betons["train"], config, device, config.runtime.workers or bench.group.cpus)
        if isinstance(loader, str):
            print(f"left out: {loader}", file=sys.stderr)
        else:
            report.add(measure(Case.of(config, loader=rival, **values), [config], bench, loader))


def stored_as(betons: dict[str, Beton]) -> str:
    """How the images are: JPEG or raw; empty without a data set."""
    if not betons:
        return ""
    return "JPEG" if betons["train"].is_jpeg.any() else "raw"


def betons_of(options: argparse.Namespace) -> dict[str, Beton]:
    """Both splits of --dataset, or none.

    Raises:
        ConfigError: the recipe's images are not streamed, or the data set has less than a batch.
        BetonError: it cannot be used.
    """
    configs = [config_of(options, attention) for attention in options.attention]
    if options.dataset is None:
        return {}
    if not streams(configs[0]):
        raise ConfigError(
            f"--dataset {options.dataset}: the images of --recipe {options.recipe} lie on the device, where random ones do; "
            "leave it out"
        )
    betons = open_splits(configs[0].runtime.data_path, options.dataset)
    num_images, batch_size = len(betons["train"]), configs[0].train.global_batch_size
    if num_images < batch_size:
        raise ConfigError(
            f"--dataset {options.dataset}: {num_images} images, less than a batch of {batch_size}; "
            "say train.global_batch_size=N"
        )
    return betons
