"""Runs and sweeps as a notebook wants them: configuration, weights, result, and metrics as a pandas DataFrame.

    run = vitpa.load_run("outputs/runs/0123456789abcdef")
    run.config.model.attention, run.result.val_top1, run.metrics["train/loss"], run.model()

Nothing is trained and nothing is written; a GPU is not needed. What is read is checked as the trainer checks it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field
from torch import nn

from vitpa import checkpoint, snapshot
from vitpa.checkpoint_file import CheckpointError, files_by_step, name_of
from vitpa.config import RunConfig
from vitpa.config_file import load_config
from vitpa.data.rng import Purpose, key
from vitpa.errors import UserError, os_error_line
from vitpa.metrics_file import read_metrics
from vitpa.models import build_model
from vitpa.records import Record, RunError, read_json, read_record
from vitpa.rundir import Result, RunDir

LOGGER = logging.getLogger(__name__)
COLUMNS = ("val_top1", "val_top5", "val_loss", "top1", "epochs", "steps", "train_time_s", "gpu_hours", "images_per_s")


@dataclass(frozen=True)
class TrainedRun:
    """A run, finished or not.

    Attributes:
        directory: Where its files are.
        config: Its resolved configuration.
        result: What its result.json says; None if it is not finished. Accuracies are fractions.
    """

    directory: RunDir
    config: RunConfig
    result: Result | None

    @property
    def name(self) -> str:
        """Such as cifar10-positional-s3 or cifar100-resnet18-s0."""
        return f"{self.config.dataset}-{self.config.network_name}-s{self.config.seed}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.directory.path

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl, a column per metric: step, epoch, train/loss, val/top1, ...; NaN where a row has none."""
        return pd.DataFrame(read_metrics(self.directory.metrics_jsonl))

    @cached_property
    def _environment(self) -> dict[str, Any]:
        path = self.directory.env_json
        document = read_json(path)
        if document is None:
            raise RunError(f"{path}: missing: the run has not been started; train it first")
        if not all(type(document.get(name)) is int and document[name] > 0 for name in ("steps_per_epoch", "steps_total")):
            raise RunError(f"{path}: says no steps_per_epoch or steps_total; restore it, or train the run again")
        return document

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch.

        Raises:
            RunError: the run has not been started.
        """
        return int(self._environment["steps_per_epoch"])

    @property
    def beton_sha256(self) -> dict[str, str]:
        """The checksum of each split that it was made from: by its result, or if it is not finished by its env.json.

        Raises:
            RunError: the run has not been started, or its record does not say it.
        """
        if self.result is not None:
            return self.result.beton_sha256
        found = self._environment.get("beton_sha256")
        if not isinstance(found, dict):
            raise RunError(f"{self.directory.env_json}: says no beton_sha256; restore it, or train the run again")
        return found

    def epochs(self) -> list[float]:
        """The epochs after which there are weights: 0 (initialisation), the snapshots, and the newest checkpoint.

        Raises:
            RunError: the run has no checkpoint.
        """
        return sorted({0.0, *self.kept_epochs(), self._newest_step / self.steps_per_epoch})

    def kept_epochs(self) -> list[float]:
        """The epochs after which there are snapshots.

        Raises:
            RunError: the run has no checkpoint.
        """
        return [step / self.steps_per_epoch for step in self._snapshots]

    def is_averaged(self, epoch: float) -> bool:
        """Whether there is an average of the weights after `epoch`: of a run with train.ema_decay at its newest checkpoint.

        Raises:
            RunError: the run has no checkpoint.
        """
        return self.config.train.ema_decay > 0 and round(epoch * self.steps_per_epoch) == self._newest_step

    def model(self, epoch: float | None = None, *, ema: bool = False) -> nn.Module:
        """The model with the weights after `epoch` epochs, on the CPU, ready to evaluate; None: the newest there are.

        Epoch 0 is the initialisation, made again from the seed. With `ema` it has the newest average that train.ema_decay
        keeps, whatever `epoch` is: the weights that count for such a run.

        Raises:
            RunError: there are none of that epoch, or they are damaged.
        """
        model: nn.Module = copy.deepcopy(self._initial)
        if ema:
            if self._newest.ema is None:
                raise RunError(f"{self.path}: keeps no average of the weights; train it with train.ema_decay")
            model.load_state_dict(self._newest.ema)
            return model.eval()
        step = self._newest_step if epoch is None else round(epoch * self.steps_per_epoch)
        if step:
            model.load_state_dict(self._weights(step))
        return model.eval()

    @cached_property
    def _newest_step(self) -> int:
        """Of the newest checkpoint; of a finished run its last."""
        if self.result is not None:
            return self.result.steps
        steps = files_by_step(self.directory.checkpoints)
        if not steps:
            raise RunError(f"{self.path}: there is no checkpoint: the run has not been trained, or its checkpoints are gone")
        return max(steps)

    @property
    def _snapshots(self) -> dict[int, Path]:
        """By their steps; one beyond the newest checkpoint is of a training that the run has not gone on from."""
        found = files_by_step(self.directory.snapshots)
        return {step: path for step, path in found.items() if step <= self._newest_step}

    @cached_property
    def _initial(self) -> nn.Module:
        config = self.config
        model: nn.Module = build_model(**dict(config.model), num_classes=self.num_classes, seed=key(config.seed, Purpose.INIT))
        return model

    @cached_property
    def _newest(self) -> checkpoint.Checkpoint:
        """The newest checkpoint; of a finished run that of the weights whose checksum is in its result."""
        path = self.directory.checkpoints / name_of(self._newest_step)
        try:
            state, _ = checkpoint.load(path, self.directory.signature)
        except CheckpointError as error:
            raise RunError(f"{path}: {error}; restore it, or train the run again") from error
        if self.result is not None and checkpoint.weights_sha256(state.model) != self.result.weights_sha256:
            raise RunError(f"{path}: its weights are not those that {self.directory.result_json.name} is about; restore it")
        return state

    @property
    def num_classes(self) -> int:
        """Classes of its data set, by its classifier.

        Raises:
            RunError: the run has no checkpoint.
        """
        for name in ("head.weight", "fc.weight"):  # of timm's ViTs; of its ResNets
            if name in self._newest.model:
                return len(self._newest.model[name])
        raise RunError(f"{self.path}: its newest checkpoint has no classifier; train the run again")

    def _weights(self, step: int) -> dict[str, Any]:
        if step == self._newest_step:
            return self._newest.model
        path = self._snapshots.get(step)
        if path is None:
            there = ", ".join(f"{epoch:g}" for epoch in self.epochs())
            raise RunError(
                f"{self.path}: no weights of epoch {step / self.steps_per_epoch:g} were kept, only of {there}; "
                "runtime.keep_epochs says which are"
            )
        try:
            return snapshot.read(path, self.directory.signature, dict(self._initial.state_dict()))
        except CheckpointError as error:
            raise RunError(f"{path}: {error}; remove it") from error


class _Listed(Record):
    """A run in a sweep's runs.json."""

    signature: str = Field(pattern=r"^[0-9a-f]{16}$")
    label: str
    config: dict[str, Any] = Field(default_factory=dict)  # without `runtime`


class _List(Record):
    """Of a sweep's runs.json: its runs in order."""

    runs: list[_Listed]


@dataclass(frozen=True)
class TrainedSweep:
    """The runs of a sweep that have been started, in the sweep's order.

    Attributes:
        path: The sweep's folder.
        runs: Those that have a configuration; finished or not.
        missing: The names of those that have none.
        labels: The names that the runs have in the sweep, by signature, of all of them.
        broken: The names of those whose configuration, result or another record cannot be trusted, each with the reason.
        seeds: Of all runs by signature, where the sweep's record says them.
    """

    path: Path
    runs: list[TrainedRun]
    missing: list[str]
    labels: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.name

    def __iter__(self) -> Iterator[TrainedRun]:
        return iter(self.runs)

    def label(self, run: TrainedRun) -> str:
        """The name of a run in the sweep, with its place on the axes."""
        return self.labels.get(run.directory.signature, run.name)

    def frame(self) -> pd.DataFrame:
        """A row per run, indexed by its signature: what it is, whether it is finished, and its result (NaN before that).

        Runs that cannot be used (`broken`) have none; a warning names them.
        `attention` is missing (NaN) where the network has none.
        Other settings that differ between the runs have a column each, such as train.epochs; lists are tuples, so that
        `groupby` takes them. Accuracies are fractions, of
        the images that `evaluated_on` names. `top1` is the one that counts: of the weights' average if a run keeps one, else
        val_top1.
        """
        for name, reason in self.broken.items():
            LOGGER.warning(f"{name} is left out: {reason}")
        rows = []
        for run, settings in zip(self.runs, differing_settings(self.runs), strict=True):
            model = run.config.model
            attention = model.attention if model.kind == "vit" else None
            its = {"dataset": run.config.dataset, "attention": attention, "seed": run.config.seed}
            found = {name: getattr(run.result, name) if run.result else float("nan") for name in COLUMNS}
            signature = run.directory.signature
            done = {"finished": run.result is not None, "evaluated_on": run.config.evaluated_on}
            columns = {name: _hashable(value) for name, value in settings.items()}
            rows.append({"signature": signature, **its, **columns, **done, **found})
        return pd.DataFrame(rows, columns=None if rows else ["signature"]).set_index("signature")


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def differing_settings(runs: Sequence[TrainedRun]) -> list[dict[str, Any]]:
    """For each run what differs between the runs besides data set, attention and seed: dotted keys with values.

    Keys that do not count for a run, such as model.depth for a ResNet, are None and make no difference.
    """
    documents = [settings_of(run.config) for run in runs]
    names = list(dict.fromkeys(name for document in documents for name in document))
    differ = [name for name in names if len({repr(each[name]) for each in documents if name in each}) > 1]
    return [{name: document.get(name) for name in differ} for document in documents]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What counts for a run besides data set, attention and seed: dotted keys with values, those of the defaults, too."""
    counts = config.experiment()["model"].keys() | {"kind"}
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json", exclude={"runtime"}).items()
        if isinstance(values, dict)
        for name, value in values.items()
        if section != "model" or (name in counts and name != "attention")
    }


def load_run(path: str | os.PathLike[str]) -> TrainedRun:
    """The run in a folder, such as `outputs/runs/<signature>` or a link to it below a sweep's `by-name`.

    Raises:
        RunError: the folder holds no run, or one that cannot be used.
        ConfigError: its configuration has been edited.
    """
    folder = Path(path).expanduser().resolve()
    directory = RunDir(folder.parent.parent, folder.name)
    if directory.path != folder or not directory.config_yaml.is_file():
        raise RunError(
            f"{path}: holds no run; name a folder such as outputs/runs/<signature> or outputs/sweeps/<name>/by-name/..."
        )
    config = load_config(directory.config_yaml)
    if config.signature != folder.name:
        raise RunError(f"{directory.config_yaml}: is the configuration of run {config.signature}; restore it")
    return TrainedRun(directory, config, directory.result())


def load_sweep(path: str | os.PathLike[str]) -> TrainedSweep:
    """The sweep in a folder, such as `outputs/sweeps/<name>`.

    Raises:
        RunError: the folder holds no sweep, or its record cannot be used.
    """
    folder = Path(path).expanduser().resolve()
    listed = read_record(_List, folder / "runs.json")
    if listed is None:
        raise RunError(f"{path}: holds no sweep; name a folder such as outputs/sweeps/<name>")
    runs, missing, broken = [], [], {}
    for each in listed.runs:
        directory = RunDir(folder.parent.parent, each.signature)
        try:
            if directory.config_yaml.is_file():
                runs.append(load_run(directory.path))
            else:
                missing.append(each.label)
        except UserError as error:
            broken[each.label] = str(error)
        except OSError as error:
            broken[each.label] = os_error_line(error)
    seeds = {each.signature: seed for each in listed.runs if type(seed := each.config.get("seed")) is int}
    labels = {each.signature: each.label for each in listed.runs}
    return TrainedSweep(folder, runs, missing, labels, broken, seeds)


def found_target(target: Path, root: Path) -> TrainedRun | TrainedSweep:
    """The run or the sweep that the user means: a folder, else a name below `root`.

    Raises:
        RunError: there is none.
    """
    for folder in (target, root / "sweeps" / target, root / "runs" / target):
        if (folder / "runs.json").is_file():
            return load_sweep(folder)
        if (folder / "config.yaml").is_file():
            return load_run(folder)
    there = ", ".join(sorted(path.parent.name for path in root.glob("sweeps/*/runs.json"))) or "none"
    raise RunError(
        f"{target}: neither a run's folder nor a sweep's, and no run or sweep of that name in {root} (its sweeps: {there})"
    )
