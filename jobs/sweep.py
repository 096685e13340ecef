"""WHICH runs: a sweep's YAML file and the ordered, resolved list of runs it stands for.

Also the sweep's own directory, where that list is recorded, so that a sweep in flight stays what it was when the YAML file
or a recipe is edited.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, JsonValue, ValidationError

from jobs.errors import SweepError
from jobs.grid import KEYS, OWN_LISTS, Attention, Axis, Cell, Choice, axes_of, cells_of, short_name
from jobs.search.config import SearchConfig
from jobs.search.ledger import Ledger, Trial
from jobs.search.plan import SearchPlan
from vitpa.arguments import ConfigError, expand_path
from vitpa.config import Float, RunConfig, Section, name_validator
from vitpa.config_file import Override, load_model, parse_config, read_yaml, shipped_configs
from vitpa.documents import to_yaml
from vitpa.installation import CODE
from vitpa.records import RunError, make_folders, read_json, write_atomic, write_json
from vitpa.rundir import RunDir
from vitpa.together import value_of

TRIAL = "trial"  # the axis of a search


class Reference(Section):
    """A published accuracy to stand beside ours."""

    val_top1: Float = Field(ge=0, le=1, description="top-1 accuracy, fraction")
    source: str = Field(min_length=1, description="who published it, and what differs")


class SweepConfig(Section):
    """A sweep's YAML file: recipes x attentions x axes x seeds."""

    name: Annotated[str, name_validator("letters", "A-Za-z")] = Field(
        max_length=100, description="its directory is <root>/sweeps/<name>"
    )
    description: str = Field("", description="what is compared, and its source")
    recipes: list[str] = Field(
        min_length=1, description="shipped recipes by name, or paths beside the sweep's file", examples=["[cifar10]"]
    )
    attentions: list[Attention] = Field(
        min_length=1, description="values of model.attention", examples=["[content, positional]"]
    )
    axes: dict[str, JsonValue] = Field(
        {},
        description="dotted key: its values; or a name: labels, each with settings of keys that move together",
        examples=["{optim.lr: [5e-4, 1e-3]}"],
    )
    include: list[dict[str, JsonValue]] = Field(
        [], description="cells besides the grid: values by axis", examples=["[{optim.lr: 2e-3}]"]
    )
    exclude: list[dict[str, JsonValue]] = Field(
        [], description="cells to be left out: values by axis", examples=["[{optim.lr: 1e-3, attention: content}]"]
    )
    search: SearchConfig | None = Field(None, description="instead of axes: trials that look for the best settings")
    seeds: list[int] = Field(min_length=1, description="values of seed", examples=["[0, 1, 2]"])
    overrides: dict[str, JsonValue] = Field(
        {}, description="dotted key: value, for all runs", examples=["{train.epochs: 100}"]
    )
    reference: dict[str, dict[Attention, Reference]] = Field({}, description="per data set and attention")


@dataclass(frozen=True)
class Run:
    """One resolved configuration of a sweep."""

    config: RunConfig
    recipe: str
    signature: str
    axes: tuple[str, ...] = ()  # names of the sweep's axes: dotted keys, or names of keys that move together
    labels: tuple[tuple[str, str], ...] = ()  # of the second kind, by the axis's name
    stop_after_epoch: int | None = None  # where it pauses now, if its sweep is a search

    @property
    def dataset(self) -> str:
        """Name of its data set."""
        return self.config.dataset

    @property
    def attention(self) -> Attention:
        """What its attention matrix depends on."""
        return self.config.model.attention

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    @property
    def settings(self) -> dict[str, str]:
        """Its value or label on each axis, as it stands in its name, by the axis's name."""
        labels = dict(self.labels)
        return {axis: labels[axis] if axis in labels else _value_text(self.config, axis) for axis in self.axes}

    def on_axis(self, axis: str) -> str:
        """Where it is on an axis, as a part of a name: its label, or lr0.001."""
        return dict(self.labels).get(axis) or f"{short_name(axis)}{self.settings[axis]}"

    @property
    def cell(self) -> str:
        """The name of its cell, which has a run for each seed."""
        return "-".join([self.dataset, self.config.network_name, *map(self.on_axis, self.axes)])

    @property
    def label(self) -> str:
        """Its name within the sweep, for people."""
        return f"{self.cell}-s{self.seed}"

    def with_seed(self, seed: int) -> Run:
        """The same with another seed, which must be an allowed one."""
        config = self.config.model_copy(update={"seed": seed})
        return replace(self, config=config, signature=config.signature)

    def directory(self, root: Path) -> RunDir:
        """Where it lives under `root`."""
        return RunDir(root, self.signature)


def _value_text(config: RunConfig, key: str) -> str:
    """The value of a dotted key, as a part of a file's name."""
    return value_text(value_of(config, key))


def value_text(value: Any) -> str:
    """A value of a key, as a part of a file's name."""
    if isinstance(value, tuple | list):  # of numbers, or of several each
        return "_".join("-".join(map(str, each)) if isinstance(each, tuple | list) else str(each) for each in value)
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Sweep:
    """A sweep and the runs it stands for, in the order in which they are to be done."""

    config: SweepConfig
    runs: list[Run]
    search: SearchPlan | None = None
    ledger: Ledger | None = None  # of the search; before it has begun: that of its first round

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name


class _RecordedRun(BaseModel):
    signature: str = ""
    label: str
    recipe: str
    axes: list[str] = []
    labels: dict[str, str] = {}
    config: dict[str, Any]

    @classmethod
    def of(cls, run: Run) -> Self:
        """What is recorded of a run."""
        config = run.config.model_dump(mode="json")
        axes, labels = list(run.axes), dict(run.labels)
        return cls(signature=run.signature, label=run.label, recipe=run.recipe, axes=axes, labels=labels, config=config)


class _Recorded(BaseModel):
    """`runs.json`, as far as it is read again."""

    runs: list[_RecordedRun]


class SweepDir:
    """All paths of a sweep: `<root>/sweeps/<name>`."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.path = root / "sweeps" / name
        self.sweep_yaml = self.path / "sweep.yaml"
        self.runs_json = self.path / "runs.json"
        self.submissions = self.path / "submissions"
        self.by_name = self.path / "by-name"
        self.report = self.path / "report"
        self.tensorboard = self.path / "tb"  # views of the runs' metrics: `vitpa sweep tensorboard`
        self.messages = self.path / "messages"  # what is told of it, by the profile's `notify`
        self.search = self.path / "search"  # the ledger of a search

    def recorded(self, known: Iterable[Run] = ()) -> list[Run] | None:
        """The runs of the last submission of this sweep; None before the first.

        The configuration of `known` runs is not read again where the record has the same.

        Raises:
            SweepError: its record has been cut or edited.
        """
        hint = "delete it and submit again"
        by_signature = {run.signature: run for run in known}
        try:
            document = read_json(self.runs_json)
            if document is None:
                return None
            entries = _Recorded.model_validate(document).runs
            return [
                run
                if (run := by_signature.get(entry.signature)) is not None and entry == _RecordedRun.of(run)
                else _run(entry.config, entry.recipe, f"{self.runs_json}: {entry.label}", axes=entry.axes, labels=entry.labels)
                for entry in entries
            ]
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise SweepError(f"{self.runs_json}: {field}: {first['msg']}; {hint}") from error
        except (RunError, ConfigError) as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise SweepError(f"{error}; {hint}") from error

    def record(self, sweep: Sweep) -> None:
        """Write down what the sweep stands for, with a readable name for each of its runs."""
        make_folders(self.by_name)
        write_atomic(self.sweep_yaml, to_yaml(sweep.config.model_dump(mode="json")))
        runs = [_RecordedRun.of(run).model_dump() for run in sweep.runs]
        write_json(self.runs_json, {"name": sweep.name, "runs": runs})
        labels = {run.label for run in sweep.runs}
        for link in self.by_name.iterdir():
            if link.name not in labels and not link.name.startswith("."):  # no longer in the sweep
                link.unlink(missing_ok=True)
        for run in sweep.runs:
            _link(self.by_name / run.label, Path("..") / ".." / ".." / "runs" / run.signature)


def _link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, replacing another one atomically."""
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.symlink_to(target)
    temporary.replace(link)


def shipped_sweeps() -> dict[str, Path]:
    """The sweeps that come with vitpa, by name."""
    return {path.stem: path for path in sorted((CODE / "jobs" / "sweeps").glob("*.yaml"))}


def load_sweep(spec: str, root: Path) -> Sweep:
    """The sweep that `spec` names: a path, a shipped sweep, or one submitted under `root` before.

    Raises:
        SweepError: there is none, or its grid contradicts itself.
        ConfigError: its file, or a recipe, is not valid.
    """
    path = _find(spec, root)
    config = load_model(SweepConfig, path)
    config = config.model_copy(update={"recipes": [_recipe_path(recipe, path) for recipe in config.recipes]})
    return sweep_of(config, str(path), root)


def sweep_of(config: SweepConfig, where: str, root: Path) -> Sweep:
    """The sweep of a file; one that is a search has the trials of its ledger below `root`, or of its first round.

    Raises:
        SweepError, ConfigError: as for `resolve`.
        RunError: the ledger has been cut or edited.
    """
    if config.search is None:
        return Sweep(config, resolve(config, where))
    plan = _search_plan(config, config.search, where)
    ledger = Ledger.read(SweepDir(root, config.name).search)
    plan.check(ledger, where)
    if not ledger.rounds:
        ledger = replace(ledger, rounds=[plan.next_round(ledger, {}, {}, 0.0)])
    return Sweep(config, resolve(config, where, ledger.trials), plan, ledger)


def with_ledger(sweep: Sweep, ledger: Ledger) -> Sweep:
    """A search with the trials of another ledger."""
    return replace(sweep, runs=resolve(sweep.config, sweep.name, ledger.trials), ledger=ledger)


def with_newest_rounds(sweep: Sweep) -> Sweep:
    """The sweep, or if it is a search to whose ledger a launcher has added rounds since it was loaded: with these.

    Raises:
        SweepError, RunError: the ledger cannot be used.
    """
    if sweep.ledger is None:
        return sweep
    ledger = Ledger.read(sweep.ledger.folder)
    return with_ledger(sweep, ledger) if len(ledger.rounds) > len(sweep.ledger.rounds) else sweep


def _search_plan(config: SweepConfig, search: SearchConfig, where: str) -> SearchPlan:
    for name in ("axes", "include", "exclude", "reference"):
        if getattr(config, name):
            raise SweepError(f"{where}: {name} and search: a search has trials instead; leave one of the two out")
    if len(config.recipes) > 1:
        raise SweepError(f"{where}: recipes: a search is for one recipe; take a sweep for each")
    document = read_yaml(shipped_configs().get(config.recipes[0], Path(config.recipes[0])))

    def configure(settings: Mapping[str, JsonValue], place: str) -> RunConfig:
        overrides = [Override(key, value, f"{where}: overrides") for key, value in config.overrides.items()]
        return parse_config(document, where, [*overrides, *(Override(key, value, place) for key, value in settings.items())])

    return SearchPlan.of(search, config.overrides, configure, attentions=config.attentions, seeds=config.seeds, where=where)


def recorded_sweep(name: str, root: Path) -> Sweep | None:
    """The sweep of that name as it was submitted last under `root`, whatever has become of its recipes; None without one.

    Raises:
        SweepError: its record has been cut or edited.
        ConfigError: so has its sweep.yaml.
    """
    directory = SweepDir(root, name)
    if not directory.sweep_yaml.is_file() or (runs := directory.recorded()) is None:
        return None
    return Sweep(load_model(SweepConfig, directory.sweep_yaml), runs)


def _find(spec: str, root: Path) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    shipped = shipped_sweeps()
    recorded = SweepDir(root, spec).sweep_yaml
    if spec in shipped:
        return shipped[spec]
    if recorded.is_file():
        return recorded
    there = ", ".join(sorted(path.parent.name for path in root.glob("sweeps/*/runs.json")))
    raise SweepError(
        f"sweep {spec!r}: no such file, none of the shipped sweeps ({', '.join(shipped)}) and recipes "
        f"({', '.join(shipped_configs())}), and not in {root}/sweeps" + (f", where there is {there}" if there else "")
    )


def _recipe_path(recipe: str, sweep_path: Path) -> str:
    """A shipped recipe stays a name; anything else is a file beside the sweep's file or in the current directory."""
    if recipe in shipped_configs():
        return recipe
    expanded = expand_path(recipe, f"{sweep_path}: recipes")
    for path in (sweep_path.parent / expanded, expanded, Path(recipe)):  # the last one: as it was recorded
        if path.is_file():
            return str(path.resolve())
    names = ", ".join(shipped_configs())
    raise SweepError(f"{sweep_path}: recipe {recipe!r}: neither a shipped one ({names}) nor a file beside {sweep_path}")


def resolve(config: SweepConfig, where: str, trials: Sequence[Trial] = ()) -> list[Run]:
    """Its runs, seed by seed, so that what is finished after a while is a whole comparison with fewer seeds.

    `trials` are those of a search, which are the choices of an axis of their own.

    Raises:
        SweepError: the grid contradicts itself. `where` names its origin in messages.
        ConfigError: a recipe, or a value on an axis, is not valid.
    """
    for key in config.overrides:
        if key in (*OWN_LISTS, "runtime.root"):
            raise SweepError(f"{where}: overrides.{key} is not for the overrides: it belongs to the grid or the command line")
    axes = axes_of(config.axes, config.overrides, where)
    if trials:
        axes = [Axis(TRIAL, tuple(Choice(trial.label, tuple(trial.values.items()), trial.label) for trial in trials))]
    if axes and config.reference:
        raise SweepError(f"{where}: reference: it is of a data set and an attention, and this sweep has axes; leave it out")
    for name in ("recipes", "attentions", "seeds"):
        value, times = Counter(getattr(config, name)).most_common(1)[0]
        if times > 1:
            raise SweepError(f"{where}: {name}: {value} is given {times} times; once is enough")
    documents = {recipe: read_yaml(shipped_configs().get(recipe, Path(recipe))) for recipe in config.recipes}
    datasets = {recipe: str(document.get("dataset")) for recipe, document in documents.items()}
    grid = cells_of(axes, datasets, config.attentions, include=config.include, exclude=config.exclude, where=where)
    firsts = [_first_run(config, cell, axes, documents[cell.recipe], where) for cell in grid]
    epochs = {trial.label: trial.epochs for trial in trials}
    firsts = [_pausing(run, epochs[run.settings[TRIAL]]) for run in firsts] if trials else firsts
    runs = [first.with_seed(seed) for seed in config.seeds for first in firsts]
    labels = Counter(run.label for run in runs)
    label, times = labels.most_common(1)[0]
    if times > 1:
        raise SweepError(f"{where}: {label} comes up {times} times; two recipes of one data set need a sweep each")
    by_signature: dict[str, Run] = {}
    for run in firsts:
        if (first := by_signature.setdefault(run.signature, run)) is not run:
            raise SweepError(
                f"{where}: {first.label} and {run.label} are the same run: leave out a value that makes no difference"
            )
    _check_images(firsts, where)
    _check_reference(config, {run.dataset for run in runs}, where)
    return runs


def _pausing(run: Run, epochs: int) -> Run:
    return replace(run, stop_after_epoch=epochs if epochs < run.config.train.epochs else None)


def _first_run(config: SweepConfig, cell: Cell, axes: Sequence[Axis], document: Mapping[str, Any], where: str) -> Run:
    """The run of a cell with the smallest seed; the seeds up to the largest are allowed if these two are."""
    overrides = [Override(key, value, f"{where}: overrides") for key, value in config.overrides.items()]
    names = [axis.name for axis in axes]
    labels = {name: choice.label for name, choice in zip(names, cell.choices, strict=True) if choice.label is not None}
    first, _ = (
        _run(
            document,
            cell.recipe,
            f"{where}: {cell.recipe}",
            [*overrides, *cell.overrides(where), Override("seed", seed, f"{where}: seeds")],
            axes=names,
            labels=labels,
        )
        for seed in (min(config.seeds), max(config.seeds))
    )
    return first


def _check_images(runs: Iterable[Run], where: str) -> None:
    """Refuse cells of a data set that are evaluated on other images: their accuracies would be compared."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.dataset, run)
        if other.config.train.holdout != run.config.train.holdout:
            found = " and ".join(f"{each.label} on {each.config.evaluated_on}" for each in (other, run))
            raise SweepError(f"{where}: evaluates {found}, which cannot be compared; take a sweep for each train.holdout")


def _check_reference(config: SweepConfig, datasets: set[str], where: str) -> None:
    for dataset, attentions in config.reference.items():
        if dataset not in datasets:
            raise SweepError(f"{where}: reference.{dataset}: no data set of the sweep; there is {', '.join(sorted(datasets))}")
        for attention in attentions:
            if attention not in config.attentions:
                known = ", ".join(config.attentions)
                raise SweepError(f"{where}: reference.{dataset}.{attention}: no attention of the sweep; there is {known}")


def _run(
    document: Mapping[str, Any],
    recipe: str,
    where: str,
    overrides: Sequence[Override] = (),
    *,
    axes: Sequence[str] = (),
    labels: Mapping[str, str],
) -> Run:
    config = parse_config(document, where, overrides)
    for axis in axes:
        if axis not in KEYS and axis not in labels:
            raise ConfigError(f"{where}: axes: unknown key {axis}")
    return Run(config, recipe, config.signature, tuple(axes), tuple(labels.items()))
