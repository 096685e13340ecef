"""`vitpa bench small`: training steps of the paper's small ViT on images of 32 pixels, the usual way and ours.

Whole steps (forward, backward, clipping, AdamW) with the order of the images, their augmentation and the metrics, on random
images that lie on the device. `timm` is its module, with the steps `eager` and `compile`; `graph` is the step of
vitpa/step/step.py. `model` is without augmentation.

A setting with several values, such as optim.lr=5e-4,1e-3, adds a step whose runs differ in it, one for every combination of
such settings, beside as many that differ in their seeds alone: how much a search gains by trying settings in one step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Literal

from vitpa.arguments import whole_numbers
from vitpa.bench.measure import Bench, measure, replicas_of, synthetic_feed
from vitpa.bench.report import Report
from vitpa.bench.schema import RECIPES, Case
from vitpa.config import RunConfig
from vitpa.config_file import Override, load_config, preset, shipped_configs
from vitpa.together import MAX_REPLICAS, alternatives, check_together, differing

HELP = "training steps of the small ViT: timm's module, compiled, and several seeds in one CUDA graph"
EXAMPLE = "vitpa bench small --attention positional --replicas 1,5 --json small.json"
NUM_IMAGES = {"train": 50_000, "val": 10_000}  # as in CIFAR-10
BARE = ("augment.policy=none", "augment.crop=none", "augment.hflip=false")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    seeds = "seeds in a step: 1,5,10"
    parser.add_argument("--replicas", type=whole_numbers(1, MAX_REPLICAS), default=[1, 5, 10], metavar="R,R,...", help=seeds)
    parser.add_argument("--no-ablation", action="store_true", help="leave out the lines without augmentation")
    parser.add_argument("--only-graph", action="store_true", help="leave out timm's module")


def cases(options: argparse.Namespace) -> dict[Case, list[RunConfig]]:
    """What is measured, in the order of the table, and the runs that share its step.

    Raises:
        ConfigError: a wrong override, or settings that cannot differ in a step.
    """
    settings = list(itertools.product(*map(alternatives, options.overrides)))  # one, unless an override has several values
    counts = [*options.replicas, *([len(settings)] if len(settings) > 1 else [])]
    timm: list[tuple[Literal["timm", "vitpa"], str, int]] = [("timm", "eager", 1), ("timm", "compile", 1)]
    ways = [*([] if options.only_graph else timm), *(("vitpa", "graph", count) for count in dict.fromkeys(counts))]
    found = {}
    for attention in options.attention:
        for augmentation in (True,) if options.no_ablation else (True, False):
            for model, step, count in ways:
                runs = replicas_of(_config(settings[0], attention, step, augmentation), count)
                found[Case.of(runs[0], replicas=count, model=model, augmentation=augmentation)] = runs
            if len(settings) > 1:
                runs = [_config(each, attention, "graph", augmentation) for each in settings]
                check_together(runs)
                case = Case.of(runs[0], replicas=len(runs), augmentation=augmentation, differing=tuple(differing(runs)))
                found[case] = runs
    return found


def _config(setting: Sequence[str | Override], attention: str, step: str, augmentation: bool) -> RunConfig:
    """The cifar10 recipe as it is for that, with the overrides of a setting."""
    before, after = [f"model.attention={attention}", f"runtime.step={step}"], () if augmentation else BARE
    changes: list[str | Override] = [*map(preset, before), *setting, *map(preset, after)]
    return load_config(shipped_configs()[RECIPES["small"]], changes)


def run(options: argparse.Namespace) -> int:
    """Measure and print the table."""
    wanted = cases(options)
    bench = Bench.start(options.window_s, options.kernels)
    with Report(options, next(iter(wanted.values()))[0]) as report:
        report.facts |= bench.facts()
        for case, configs in wanted.items():
            report.add(measure(case, configs, bench, synthetic_feed(case, configs[0], bench.group, NUM_IMAGES)))
    return 0
