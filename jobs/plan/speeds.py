"""What the file of `vitpa bench imagenet --json FILE`, or of `small`, says of the speed of runs of which none has finished.

A line counts for a job if network, precision, attention, runtime.step, batch size, GPUs and seeds in a step are the job's own.
Nothing is scaled: where there is no such line, the answer is why, and how to measure it. The line nearest to a whole training
counts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vitpa.arguments import ConfigError
from vitpa.bench.schema import RECIPES, Case, Line
from vitpa.config import RunConfig
from vitpa.config_file import load_config, parse_model, shipped_configs
from vitpa.data.residency import streaming_setting
from vitpa.records import read_json

LOADER_LEFT_OUT = "without the loader: the real rate is lower, or the same at best"
MODEL_ALONE = "without the loader and augmentation: the real rate is lower"
SYNTHETIC, MODEL = 2, 3  # distances from a whole training, after the decoders' distances


@dataclass(frozen=True)
class Rate:
    """What a line of a benchmark says of a job."""

    images_per_s: float  # in training, of all seeds of the job together
    case: str
    images_of: str  # the data set whose images were decoded; empty: none were, or nobody says
    hardware: str
    gpus: int
    batch_size: int  # of a seed, over all GPUs
    replicas: int
    caveat: str  # what the case leaves out
    file: str

    def __str__(self) -> str:
        images = f" with images of {self.images_of}" if self.images_of else ""
        seeds = f", {self.replicas} seeds in a step" if self.replicas > 1 else ""
        caveat = f", {self.caveat}" if self.caveat else ""
        return (
            f"{self.images_per_s:,.0f} images/s on {self.gpus} x {self.hardware} at batch {self.batch_size}{seeds} "
            f"(`{self.case}`{images}{caveat})"
        )


class Benchmark(BaseModel):
    """A whole file."""

    model_config = ConfigDict(frozen=True, strict=True)

    file: str
    name: Literal["small", "imagenet"]  # of `vitpa bench NAME`
    gpu: str | None
    results: list[Line] = Field(min_length=1)
    network: dict[str, Any] | None = None  # None: nobody knows
    augment: dict[str, Any] | None = None
    dataset: str | None = None

    @property
    def recipe(self) -> str:
        """Whose network it measures, if not told otherwise."""
        return RECIPES[self.name]

    def rate(self, config: RunConfig, *, gpus: float, nodes: int, replicas: int) -> Rate | str:
        """The rate of a job that trains `replicas` seeds of `config` together, or why there is none.

        `gpus` are those of the job, on all its nodes; a fraction if it shares one.
        """
        unusual = (
            (gpus == 0, "no GPU"),
            (0 < gpus < 1, "a share of a GPU"),
            (nodes > 1, f"{nodes} nodes"),
            (config.runtime.accum_steps > 1, f"runtime.accum_steps={config.runtime.accum_steps}"),
            (config.runtime.step == "eager", "runtime.step=eager"),
        )
        for has, what in unusual:
            if has:
                return f"a job has {what}, which is not measured"
        fitting_steps = ("auto", "graph", config.runtime.step)
        steps = {str(line.case.step) for line in self.results if line.case.model == "vitpa"}
        if steps and steps.isdisjoint(fitting_steps):
            made, wanted_step = ", ".join(sorted(steps)), config.runtime.step
            return f"its steps were made by runtime.step={made}, and the run has runtime.step={wanted_step}"
        advice = how_to_measure(config, gpus=int(gpus), replicas=replicas)
        # what a file does not say, the version that wrote it had no key for: it measured the recipe's
        other = difference(_network_of(self.recipe) | (self.network or {}), config.network())
        if other:
            return f"it is of another network ({other}); {advice}"
        if self.name == "small" and (setting := streaming_setting(config)):
            return f"vitpa bench small measures images on the device, and this run streams them ({setting}); {advice}"
        wanted = (int(gpus), config.train.global_batch_size, replicas)
        near = [
            (distance, line)
            for line in self.results
            if line.case.attention == config.model.attention
            and line.case.step in fitting_steps
            and (distance := distance_of(line.case, config.runtime.decoder)) is not None
        ]
        fitting = [(distance, line) for distance, line in near if setup_of(line.case) == wanted]
        if not fitting:
            there = "; ".join(map(_words, sorted({setup_of(line.case) for _, line in near}))) or "none of this attention"
            return f"it has no line for {_words(wanted)} (it has: {there}); {advice}"
        return self._rate_of(*min(fitting, key=lambda pair: pair[0]))

    def _rate_of(self, distance: int, line: Line) -> Rate:
        case = line.case
        # the images of a run that `small` measures lie on the device, too: it leaves out nothing
        caveats = {SYNTHETIC: LOADER_LEFT_OUT if self.name == "imagenet" else "", MODEL: MODEL_ALONE}
        return Rate(
            images_per_s=line.images_per_s,
            case=case.name,
            images_of=(self.dataset or "") if case.decoder else "",
            hardware=self.gpu or "",
            gpus=case.gpus,
            batch_size=case.batch_size,
            replicas=case.replicas,
            caveat=caveats.get(distance, ""),
            file=self.file,
        )


def setup_of(case: Case) -> tuple[int, int, int]:
    """GPUs, batch size, seeds in a step."""
    return case.gpus, case.batch_size, case.replicas


def distance_of(case: Case, decoder: str) -> int | None:
    """How far from a whole training with `runtime.decoder` it is, 0 the nearest; None: of something else, or not ours."""
    if case.model != "vitpa" or case.differing or case.without:
        return None
    if case.decoder is None:
        return SYNTHETIC if case.augmentation else MODEL
    decoders = ["gpu", "cpu"] if decoder == "auto" else [decoder]
    return decoders.index(case.decoder) if case.decoder in decoders else None


def load_benchmark(path: Path) -> Benchmark:
    """The benchmark that was written to `path`.

    Raises:
        ConfigError: there is no such file, it is not a benchmark's, of a CPU, or of a network with a key we do not know.
        RunError: it is not JSON.
    """
    document = read_json(path)
    if document is None:
        raise ConfigError(f"{path}: no such file; vitpa bench imagenet --json FILE writes one")
    try:
        _check_lines(document.get("results"), path)
        found = parse_model(Benchmark, {**document, "file": str(path)}, str(path))
    except ConfigError as error:
        raise ConfigError(
            f"{error}; expected a file that vitpa bench imagenet or small wrote with --json in this version"
        ) from None
    if found.gpu is None:
        raise ConfigError(f"{path}: was measured on a CPU, whose speed depends on the cores a run has; measure on a GPU")
    known = _network_of(found.recipe)
    unknown = sorted((found.network or {}).keys() - known.keys())
    if unknown:
        raise ConfigError(f"{path}: unknown key network.{unknown[0]}; known keys: {', '.join(known)}")
    return found


def _check_lines(lines: object, path: Path) -> None:
    """Refuse the file if there is a line that is wrong; it is most often the same in all, so only the first is shown."""
    problems = []
    for index, line in enumerate(lines if isinstance(lines, list) else []):
        try:
            parse_model(Line, line, f"{path}: results.{index}")
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - 1
        raise ConfigError(problems[0] + (f"; and {more} more line{'s' if more > 1 else ''} with a problem" if more else ""))


def how_to_measure(config: RunConfig, *, gpus: int, replicas: int) -> str:
    """The benchmark that gives a line for a job of such runs: its command, or that there is none."""
    if config.model.kind != "vit":
        return "no benchmark measures that"
    batch_size = config.train.global_batch_size
    small = load_config(shipped_configs()[RECIPES["small"]])
    if gpus == 1 and config.model.img_size == small.model.img_size and streaming_setting(config) is None:
        name, words = "small", ["--replicas", str(replicas)]
        if batch_size != small.train.global_batch_size:
            words.append(f"train.global_batch_size={batch_size}")
    elif replicas == 1:
        name, words = "imagenet", ["--gpus", str(gpus), "--batch-size", str(batch_size)]
    else:
        return "no benchmark measures that"
    recipe = _network_of(RECIPES[name])
    for key, value in config.network().items():
        if value != recipe[key]:
            section = "train" if key == "precision" else "model"
            words.append(f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}")
    return f"to measure that: vitpa bench {name} {shlex.join(words)} --json FILE"


def _network_of(recipe: str) -> dict[str, Any]:
    return load_config(shipped_configs()[recipe]).network()


def difference(measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is unequal, for people, the first three of it; a key that only one of them has is of another version."""
    unequal = [key for key in measured if key in wanted and measured[key] != wanted[key]]
    words = [f"{key}={measured[key]}, here {wanted[key]}" for key in unequal[:3]]
    return "; ".join(words) + (" ..." if len(unequal) > 3 else "")


def _words(setup: tuple[int, int, int]) -> str:
    gpus, batch_size, replicas = setup
    return f"{gpus} GPU{'s' if gpus > 1 else ''} at batch {batch_size}" + (
        f", {replicas} seeds in a step" if replicas > 1 else ""
    )
