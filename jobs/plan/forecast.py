"""How long a sweep will take and what it will cost: arithmetic on what was measured, never a guess.

A run takes (training images x epochs) / (images per second of finished runs of its data set and attention), evaluation
included, for that is how images_per_s is measured. Training images that are smaller than the model's (train.image_sizes)
count by their share of its arithmetic (vitpa/flops.py), when measured and now. A run that goes on from a checkpoint counts as
a whole one. Where runs share a GPU, as replicas or side by side, each counts by its share: it costs the GPU-hours that
measured ones have cost.

Where no run of a kind has finished, a benchmark's rate of training may stand in (jobs/plan/speeds.py). It has no evaluation
in it: an image of that is counted as a third of one in training, of whose arithmetic the forward pass is a third.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.groups import num_images
from jobs.plan.speeds import Benchmark, Rate, difference
from jobs.report.status import duration
from jobs.state import RunState
from jobs.submit.submit import Batch
from jobs.sweep import TRIAL, Run
from vitpa.arguments import ConfigError
from vitpa.config import ModelConfig, RunConfig
from vitpa.config_file import parse_config, parse_model, read_yaml
from vitpa.flops import full_size_epochs
from vitpa.records import RunError, made_with, read_json
from vitpa.rundir import Result, RunDir

Kind = tuple[str, str]  # data set, network
JobKind = tuple[str, str, int]  # the same, and the runs that a job trains together
Finished = tuple[Result, float]  # a finished run's result, and its `mean_share`
EVALUATED = 1 / 3  # of an image in training is what one in an evaluation costs
CONFIGS_LOOKED_AT = 20  # of finished runs of other sweeps, for each kind: reading YAML takes time


@dataclass(frozen=True)
class Speed:
    """What finished runs of a kind have measured."""

    images_per_s: float  # of the model's size
    runs: int
    hardware: str  # GPU's name, or `CPU`; empty if it was not written down
    gpus_per_run: float  # its share where several had one together; 0 on the CPU


@dataclass(frozen=True)
class Group:
    """Jobs with equal resources, in the order in which they start; each trains a run, or several as replicas."""

    durations_s: tuple[float | None, ...]  # of each job; None: its kind has not been measured
    gpus: float  # of one job
    at_a_time: int | None = None  # jobs, as far as is known; None: as many as SLURM gives
    replicas: float = 1  # runs of a job, on the average

    @property
    def gpus_per_run(self) -> float:
        """What a run has of the GPUs."""
        return self.gpus / self.replicas

    @property
    def known_s(self) -> list[float]:
        """The durations that are known."""
        return [seconds for seconds in self.durations_s if seconds is not None]

    @property
    def longest_s(self) -> float | None:
        """The longest job; None unless all are known."""
        return None if None in self.durations_s else max(self.known_s, default=0.0)


@dataclass(frozen=True)
class Forecast:
    """The whole submission. None where a kind of run has not been measured."""

    train_s: float | None  # one job after the other
    gpu_hours: float | None
    wall_s: float | None  # once they start; None also where nobody says how many run at a time
    speeds: Mapping[Kind, Speed]
    unmeasured: tuple[Kind, ...]
    longest_s: float | None = None  # of the jobs
    rates: Mapping[JobKind, Rate] | None = None  # of a benchmark, where there are no speeds; None: no benchmark was given
    gpu_hour_price: float | None = None

    @property
    def cost(self) -> float | None:
        """Of the GPU-hours, in the currency of their price."""
        return None if self.gpu_hours is None or self.gpu_hour_price is None else self.gpu_hours * self.gpu_hour_price

    @property
    def _rates(self) -> list[tuple[JobKind, Rate]]:
        return sorted((self.rates or {}).items(), key=lambda pair: pair[0])

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` has it."""
        return {
            "estimated_train_s": self.train_s,
            "gpu_hours": self.gpu_hours,
            "gpu_hour_price": self.gpu_hour_price,
            "cost": self.cost,
            "wall_s": self.wall_s,
            "measured": {" ".join(kind): asdict(speed) for kind, speed in sorted(self.speeds.items())},
            "benchmark": [{"dataset": kind[0], "attention": kind[1], **asdict(rate)} for kind, rate in self._rates],
            "unmeasured": [" ".join(kind) for kind in self.unmeasured],
        }

    def lines(self) -> list[str]:
        """For people."""
        if self.train_s is None:
            if not self.unmeasured:
                return ["GPU-hours and time: unknown until the number of images is known: run `vitpa prep` first"]
            kinds = ", ".join(map(" ".join, self.unmeasured))
            advice = "; --speeds FILE takes a benchmark's figures instead" if self.rates is None else ""
            return [f"GPU-hours and time: unknown until a run of each kind has finished (not yet: {kinds}){advice}"]
        parts = [f"{self.gpu_hours:,.{1 if self.gpu_hours >= 10 else 2}f} GPU-hours"] if self.gpu_hours else []
        if self.cost:
            parts[-1] += f" ({self.cost:,.2f} at {self.gpu_hour_price:,.2f} each)"
        parts.append(f"{duration(self.train_s)} of training one after the other (the longest job: {duration(self.longest_s)})")
        if self.wall_s is not None:
            parts.append(f"{duration(self.wall_s)} once they start (waiting in the queue and restarts are not counted)")
        return [f"about {', '.join(parts)}", *self._sources()]

    def _sources(self) -> list[str]:
        """What the figures rest on."""
        measured = [
            f"{' '.join(kind)} {speed.images_per_s:,.0f} images/s{f' on {speed.hardware}' if speed.hardware else ''} "
            f"({speed.runs} run{'s' if speed.runs > 1 else ''})"
            for kind, speed in sorted(self.speeds.items())
        ]
        lines = [f"measured: {'; '.join(measured)}"] if measured else []
        for rate in dict.fromkeys(rate for _, rate in self._rates):  # small data sets have it in common
            kinds = ", ".join(" ".join(kind[:2]) for kind, its in self._rates if its == rate)
            lines.append(f"{rate.file}: {kinds}: {rate}")
        if self.rates:
            lines.append(
                "with a benchmark's rate, an evaluation is an estimate (an image of it as a third of one in training), and "
                "start, compilation and checkpoints are left out"
            )
        return lines


def forecast(
    groups: Sequence[Group],
    speeds: Mapping[Kind, Speed],
    unmeasured: Iterable[Kind] = (),
    *,
    rates: Mapping[JobKind, Rate] | None = None,
    gpu_hour_price: float | None = None,
) -> Forecast:
    """Add up what the groups take. They run side by side."""
    found = Forecast(None, None, None, speeds, tuple(sorted(set(unmeasured))), rates=rates, gpu_hour_price=gpu_hour_price)
    if any(group.longest_s is None for group in groups):
        return found
    walls = [makespan_s(group.known_s, group.at_a_time) for group in groups]
    return replace(
        found,
        train_s=math.fsum(sum(group.known_s) for group in groups),
        gpu_hours=math.fsum(sum(group.known_s) * group.gpus for group in groups) / 3600,
        wall_s=None if None in walls else max((wall for wall in walls if wall is not None), default=0.0),
        longest_s=max((max(group.known_s, default=0.0) for group in groups), default=0.0),
    )


def makespan_s(durations_s: Sequence[float], at_a_time: int | None) -> float | None:
    """Time until all are done, if the next one starts whenever one ends; None if nobody knows how many run at a time."""
    if at_a_time is None:
        return None
    free = [0.0] * min(at_a_time, len(durations_s))
    for seconds in durations_s:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free, default=0.0)


def attempts(run_s: float, time_s: float, signal_delay_s: float) -> int:
    """How often a run is executed if it gets a signal `signal_delay_s` before each time limit and stops."""
    return max(1, math.ceil(run_s / (time_s - signal_delay_s)))


def run_s(run: Run, speeds: Mapping[Kind, Speed], images: int | None) -> float | None:
    """Seconds of training of a run on `images` images; None if that or its speed is not known."""
    speed = speeds.get(kind_of(run))
    if speed is None or images is None:
        return None
    return images * full_size_epochs(run.config, run.stop_after_epoch or run.config.train.epochs) / speed.images_per_s


def job_s(runs: Sequence[float | None], speed: Speed | None, gpus: float) -> float | None:
    """Seconds of a job with `gpus` that trains runs of one kind together, which take so long as they were measured."""
    known = [seconds for seconds in runs if seconds is not None]
    if len(known) < len(runs) or speed is None:
        return None
    shares = 0 < speed.gpus_per_run <= 1 and 0 < gpus <= 1  # of one GPU, when measured and now
    return max(known) * (speed.gpus_per_run * len(runs) / gpus if shares else 1)


def benchmark_s(config: RunConfig, rate: Rate, images: tuple[int | None, int | None]) -> float | None:
    """Seconds of a job of `rate.replicas` runs, with evaluations, by its `rate` and the configuration of one of them.

    `images` are the numbers of them in the training set and in that of an evaluation; None if they are not known.
    """
    train, val = images
    if train is None or val is None:
        return None
    epochs = config.last_epoch
    evaluations = math.ceil(epochs / config.runtime.eval_every_epochs)
    return rate.replicas * (train * full_size_epochs(config, epochs) + EVALUATED * val * evaluations) / rate.images_per_s


def gpus_of(batch: Batch) -> float:
    """GPUs of a job, on all its nodes; a share of one where several processes have it."""
    if batch.how["executor"] == "slurm":
        return float(batch.how["profile"]["nodes"] * batch.how["profile"]["gpus_per_node"])
    return len(batch.how["slots"][0]["gpus"]) / batch.configs[0].runtime.runs_per_gpu


def group_of(batches: Sequence[Batch], speeds: Mapping[Kind, Speed], rates: Mapping[JobKind, Rate]) -> Group:
    """The jobs of batches with equal resources."""
    how, gpus = batches[0].how, gpus_of(batches[0])
    if how["executor"] == "slurm":
        at_a_time = sum(batch.how["profile"]["array_parallelism"] or 0 for batch in batches) or None  # each has its share
    else:
        at_a_time = len(how["slots"])
    images: dict[str, tuple[int | None, int | None]] = {}
    durations = []
    for batch in batches:
        for task in batch.tasks:
            run, config = batch.chosen[task[0]].run, batch.configs[task[0]]
            if run.dataset not in images:
                images[run.dataset] = num_images(config, "train"), num_images(config, "val")
            rate = rates.get((*kind_of(run), len(task)))
            if rate is not None:
                durations.append(benchmark_s(config, rate, images[run.dataset]))
                continue
            runs = [run_s(batch.chosen[index].run, speeds, images[run.dataset][0]) for index in task]
            durations.append(job_s(runs, speeds.get(kind_of(run)), gpus))
    replicas = sum(len(batch.chosen) for batch in batches) / len(durations)
    return Group(tuple(durations), gpus, at_a_time, replicas)


# --- what has been measured


def kind_of(run: Run) -> Kind:
    """Runs of one kind are as fast as one another: of the sweep's axes, those of the network and of the batches count.

    So do keys that move together, since they may be of these; the trials of a search are taken to be of one kind.
    """
    counts = {axis for axis, _ in run.labels if axis != TRIAL}
    on_axes = [run.on_axis(axis) for axis in run.axes if axis in counts or axis.startswith(("model.", "train."))]
    return run.dataset, "-".join([run.config.network_name, *on_axes])


def speeds_of(states: Sequence[RunState], wanted: Iterable[Run], root: Path) -> dict[Kind, Speed]:
    """The speeds of the kinds of the `wanted` runs: of the sweep's finished runs, or else of others with the same model."""
    finished: dict[Kind, list[Finished]] = {}
    for state in states:
        if state.result is not None:
            finished.setdefault(kind_of(state.run), []).append((state.result, mean_share(state.run.config)))
    models: dict[Kind, dict[str, Any]] = {kind_of(run): run.config.model.model_dump(mode="json") for run in wanted}
    elsewhere = {kind: model for kind, model in models.items() if kind not in finished}
    if elsewhere:
        finished |= _finished_elsewhere(elsewhere, root)
    found = {kind: _speed_of(results, root) for kind, results in finished.items() if kind in models}
    return {kind: speed for kind, speed in found.items() if speed is not None}


def mean_share(config: RunConfig) -> float:
    """What an image of its training takes on the average, in the arithmetic of one of the model's size."""
    return full_size_epochs(config, config.train.epochs) / config.train.epochs


def _finished_elsewhere(models: Mapping[Kind, dict[str, Any]], root: Path) -> dict[Kind, list[Finished]]:
    found: dict[Kind, list[Finished]] = {}
    looked_at = dict.fromkeys(models, 0)
    for path in sorted((root / "runs").glob("*/result.json")):
        try:
            document = read_json(path) or {}
            its = (document.get("dataset"), document.get("attention"))
            kinds = [
                kind
                for kind, model in models.items()
                if (kind[0], model["attention"]) == its and looked_at[kind] < CONFIGS_LOOKED_AT
            ]
            if not kinds or (result := RunDir(root, path.parent.name).result()) is None:
                continue
            config = read_yaml(path.with_name("config.yaml"))
            model, share = _model_of(config, str(path)), _share_of(config, str(path))
            for kind in kinds:
                looked_at[kind] += 1
                if models[kind] == model:
                    found.setdefault(kind, []).append((result, share))
        except (OSError, ValidationError, ConfigError, RunError):  # `status` says what is wrong with it
            continue
    return found


def _model_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The section `model` of a recorded configuration; what it does not say was the default when it was written, too."""
    return parse_model(ModelConfig, config.get("model") or {}, where).model_dump(mode="json")


def _share_of(config: Mapping[str, Any], where: str) -> float:
    """The `mean_share` of a recorded configuration; only one that has several sizes need be of this version."""
    return mean_share(parse_config(config, where)) if (config.get("train") or {}).get("image_sizes") else 1.0


def _speed_of(finished: list[Finished], root: Path) -> Speed | None:
    finished = [pair for pair in finished if pair[0].images_per_s > 0 and pair[0].train_time_s > 0]
    valid = [result for result, _ in finished]
    if not valid:
        return None
    gpus = math.fsum(result.gpu_hours * 3600 / result.train_time_s for result in valid) / len(valid)
    env = made_with(RunDir(root, valid[-1].signature).env_json)
    hardware = str(env.get("gpu") or ("CPU" if env.get("device") == "cpu" else ""))
    speed = math.fsum(result.images_per_s * share for result, share in finished) / len(valid)
    return Speed(speed, len(valid), hardware, gpus)


def job_kinds(batches: Iterable[Batch]) -> dict[JobKind, tuple[Batch, RunConfig]]:
    """The kinds of jobs, each with the batch and the configuration of the first of them."""
    found: dict[JobKind, tuple[Batch, RunConfig]] = {}
    for batch in batches:
        for task in batch.tasks:
            run = batch.chosen[task[0]].run
            found.setdefault((*kind_of(run), len(task)), (batch, batch.configs[task[0]]))
    return found


def rates_of(
    batches: Iterable[Batch], benchmark: Benchmark, speeds: Mapping[Kind, Speed]
) -> tuple[dict[JobKind, Rate], list[str]]:
    """What the benchmark says of jobs whose kind has no speed, and for people: of which it says nothing, and what differs."""
    rates: dict[JobKind, Rate] = {}
    said: list[str] = []
    for (dataset, attention, replicas), (batch, config) in job_kinds(batches).items():
        if (dataset, attention) in speeds:
            continue
        nodes = batch.how["profile"]["nodes"] if batch.how["executor"] == "slurm" else 1
        found = benchmark.rate(config, gpus=gpus_of(batch), nodes=nodes, replicas=replicas)
        if isinstance(found, str):
            said.append(f"{benchmark.file} says nothing of {dataset} {attention}: {found}")
            continue
        rates[dataset, attention, replicas] = found
        other = difference(benchmark.augment or {}, config.augment.model_dump(mode="json"))
        if other:
            said.append(f"{benchmark.file} was measured with another augmentation than that of {dataset} ({other})")
        if found.images_of not in ("", dataset):
            said.append(f"{benchmark.file} was measured with images of {found.images_of}, not of {dataset}")
    if rates and benchmark.network is None:
        said.append(f"{benchmark.file} does not say what network it was measured with: taken for that of {benchmark.recipe}")
    return rates, list(dict.fromkeys(said))
