"""What the file of `vitpa bench imagenet --json FILE`, or of `small`, says of the speed of runs of which none has finished.

A line counts for a job if network, precision, attention, batch size, GPUs and seeds in a step are the job's own. Nothing is
scaled: where there is no such line, the answer is why. Of several lines the one nearest to a whole training counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vitpa.config import ConfigError, RunConfig, load_config, parse_model, read_json, shipped_configs

LOADER_LEFT_OUT = "without the loader: the real rate is lower, or the same at best"
MODEL_ALONE = "without the loader and augmentation: the real rate is lower"


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

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` has it."""
        return asdict(self)

    def __str__(self) -> str:
        images = f" with images of {self.images_of}" if self.images_of else ""
        seeds = f", {self.replicas} seeds in a step" if self.replicas > 1 else ""
        caveat = f", {self.caveat}" if self.caveat else ""
        return (
            f"{self.images_per_s:,.0f} images/s on {self.gpus} x {self.hardware} at batch {self.batch_size}{seeds} "
            f"(`{self.case}`{images}{caveat})"
        )


class Line(BaseModel):
    """A line of either benchmark, as far as it is read."""

    model_config = ConfigDict(frozen=True, strict=True)

    case: str
    attention: Literal["content", "positional"] | None  # None: no network
    images_per_s: float = Field(gt=0, allow_inf_nan=False)
    batch_size: int = Field(ge=1)
    gpus: int | None = Field(None, ge=1)  # `imagenet` only; `small` uses one
    step: str | None = None  # `small` only
    runtime_step: str | None = None  # how it ran, if the user has said so
    replicas: int = Field(1, ge=1)
    augmentation: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.gpus is None) == (self.step is None):
            raise ValueError(f"{self.case}: expected either gpus (vitpa bench imagenet) or step (vitpa bench small)")
        return self

    @property
    def place(self) -> tuple[int, int, int]:
        """GPUs, batch size, seeds in a step."""
        return self.gpus or 1, self.batch_size, self.replicas

    def rank(self, decoder: str) -> int | None:
        """How near it is to a whole training with `runtime.decoder`, 0 the nearest; None: another one, or not ours."""
        if self.attention is None or not self.augmentation:
            return None
        if self.step is not None:
            return 0 if self.step == "graph" and self.runtime_step in (None, "graph") else None
        decoders = ["gpu", "cpu"] if decoder == "auto" else [decoder]
        *part, last = self.case.split(", ")
        if part[:1] == ["training"] and last in decoders:
            return decoders.index(last)
        return {"training, synthetic": 2, "model": 3}.get(self.case)


class Benchmark(BaseModel):
    """A whole file. One of an earlier version does not say which network it has measured: the recipe's, then."""

    model_config = ConfigDict(frozen=True, strict=True)

    file: str
    gpu: str | None
    results: list[Line] = Field(min_length=1)
    network: dict[str, Any] | None = None
    augment: dict[str, Any] | None = None
    dataset: str | None = None

    @property
    def name(self) -> str:
        """Of `vitpa bench NAME`."""
        return "imagenet" if self.results[0].step is None else "small"

    @property
    def recipe(self) -> str:
        """Whose network it measures, if not told otherwise."""
        return "imagenet" if self.name == "imagenet" else "cifar10"

    def rate(self, config: RunConfig, *, gpus: float, nodes: int, replicas: int) -> Rate | str:
        """The rate of a job, or why there is none.

        Args:
            config: Of one of its runs, with the runtime section that they will run with.
            gpus: Of the job, on all its nodes; a fraction if it shares one.
            nodes: Of the job.
            replicas: Seeds that it trains together.
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
        other = difference(self.network or {}, config.network())
        if other:
            return f"it is of another network ({other})"
        wanted = (int(gpus), config.train.global_batch_size, replicas)
        ranked = [
            (rank, line)
            for line in self.results
            if line.attention == config.model.attention and (rank := line.rank(config.runtime.decoder)) is not None
        ]
        fitting = [(rank, line) for rank, line in ranked if line.place == wanted]
        if not fitting:
            there = "; ".join(map(_words, sorted({line.place for _, line in ranked}))) or "none of this attention"
            option = f"--gpus {wanted[0]} --batch-size {wanted[1]}" if self.name == "imagenet" else f"--replicas {replicas}"
            return f"it has no line for {_words(wanted)} (it has: {there}); to measure that: vitpa bench {self.name} {option}"
        return self._rate_of(min(fitting, key=lambda pair: pair[0])[1])

    def _rate_of(self, line: Line) -> Rate:
        gpus, batch_size, replicas = line.place
        decoded = line.case.startswith("training, ") and line.case != "training, synthetic"
        return Rate(
            images_per_s=line.images_per_s,
            case=line.case,
            images_of=(self.dataset or "") if decoded else "",
            hardware=self.gpu or "",
            gpus=gpus,
            batch_size=batch_size,
            replicas=replicas,
            caveat={"training, synthetic": LOADER_LEFT_OUT, "model": MODEL_ALONE}.get(line.case, ""),
            file=self.file,
        )


def load_benchmark(path: Path) -> Benchmark:
    """The benchmark that was written to `path`.

    Raises:
        ConfigError: there is no such file, it is not a benchmark's, or of a CPU.
        RunError: it is not JSON.
    """
    document = read_json(path)
    if document is None:
        raise ConfigError(f"{path}: no such file; vitpa bench imagenet --json FILE writes one")
    try:
        found = parse_model(Benchmark, {**document, "file": str(path)}, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; expected a file that vitpa bench imagenet or small wrote with --json") from None
    if found.gpu is None:
        raise ConfigError(f"{path}: was measured on a CPU, whose speed depends on the cores a run has; measure on a GPU")
    if found.network is not None:
        return found
    recipe = load_config(shipped_configs()[found.recipe])
    return found.model_copy(update={"network": recipe.network()})


def difference(measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is unequal, for people, the first three of it; a key that only one of them has is of another version."""
    unequal = [key for key in measured if key in wanted and measured[key] != wanted[key]]
    words = [f"{key}={measured[key]}, here {wanted[key]}" for key in unequal[:3]]
    return "; ".join(words) + (" ..." if len(unequal) > 3 else "")


def _words(place: tuple[int, int, int]) -> str:
    gpus, batch_size, replicas = place
    return f"{gpus} GPU{'s' if gpus > 1 else ''} at batch {batch_size}" + (
        f", {replicas} seeds in a step" if replicas > 1 else ""
    )
