"""The cells of a sweep's grid: every combination of its axes, without what it excludes, with what it includes besides."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from jobs.errors import SweepError
from vitpa.arguments import parse_float
from vitpa.config import RunConfig
from vitpa.config_file import Override, fields_of

Attention = Literal["content", "positional"]
OWN_LISTS = {"dataset": "recipes", "model.attention": "attentions", "seed": "seeds"}  # keys that have lists of their own
KEYS = frozenset(key for key, _ in fields_of(RunConfig))
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*")
TAKEN = {"dataset", "attention", "seed", "state", "runtime"}  # names that filters have already


@dataclass(frozen=True)
class Choice:
    """One of the values of an axis."""

    value: JsonValue  # as `include` and `exclude` name it: of a key, or the label
    settings: tuple[tuple[str, JsonValue], ...]  # dotted keys with the values that it gives them
    label: str | None = None

    @property
    def identity(self) -> str:
        """The same text for equal values; labels are texts, of which 1 and 01 are two."""
        return _identity(self.value) if self.label is None else json.dumps(self.label)

    def is_named(self, value: JsonValue) -> bool:
        """Whether `value` names it."""
        return same(self.value, value) if self.label is None else self.label == _text(value)


@dataclass(frozen=True)
class Axis:
    """A key with its values, or several keys that move together, each of whose choices has a label."""

    name: str
    choices: tuple[Choice, ...]

    def choice(self, value: JsonValue, where: str) -> Choice:
        """The choice that `value` names.

        Raises:
            SweepError: there is none.
        """
        found = [choice for choice in self.choices if choice.is_named(value)]
        if not found and not isinstance(value, str):  # a label that YAML reads as a number
            found = [choice for choice in self.choices if same(choice.value, value)]
        if len(found) == 1:
            return found[0]
        there = ", ".join(_text(choice.value) for choice in self.choices)
        raise SweepError(f"{where}: {self.name} has no value {_text(value)}; it has {there}")


@dataclass(frozen=True)
class Cell:
    """One point of the grid: what is trained with each seed."""

    recipe: str
    dataset: str
    attention: Attention
    choices: tuple[Choice, ...]  # one of each axis

    def overrides(self, where: str) -> list[Override]:
        """What the axes set, with their place for error messages."""
        settings = [setting for choice in self.choices for setting in choice.settings]
        on_axes = [Override(key, value, f"{where}: axes") for key, value in settings]
        return [*on_axes, Override("model.attention", self.attention, where)]


def short_name(axis: str) -> str:
    """An axis as names of runs and heads of columns have it: the last part of a dotted key."""
    return axis.rpartition(".")[2]


def column_of(axis: str, own: Container[str]) -> str:
    """The column of an axis in a file: its name, or axes.epochs beside an own column of that name."""
    return f"axes.{axis}" if axis in own else axis


def axes_of(axes: Mapping[str, JsonValue], overrides: Mapping[str, JsonValue], where: str) -> list[Axis]:
    """The axes that a sweep's file names: lists of values by key, mappings from labels to settings by a name of its own.

    Raises:
        SweepError: an axis that contradicts itself, another one or the overrides.
    """
    found = [_axis(name, values, f"{where}: axes.{name}") for name, values in axes.items()]
    moved_by: dict[str, str] = {}
    for axis in found:
        for key in dict.fromkeys(key for choice in axis.choices for key, _ in choice.settings):
            own = f"axes.{key}" if key == axis.name else f"axes.{axis.name}: {key}"
            if key in OWN_LISTS:
                raise SweepError(f"{where}: {own}: say it by {OWN_LISTS[key]}, which is an axis of every sweep")
            if key.startswith("runtime."):
                raise SweepError(f"{where}: {own}: it does not change the numbers; say it in the profile or to submit")
            if key in overrides:
                raise SweepError(f"{where}: {own} is in the overrides, too; say it once")
            if (other := moved_by.setdefault(key, axis.name)) != axis.name:
                raise SweepError(f"{where}: {own}: the axis {other} sets it, too; one axis for a key")
    return found


def _axis(name: str, values: JsonValue, where: str) -> Axis:
    if isinstance(values, Mapping):
        return Axis(name, tuple(_labelled(name, label, settings, where) for label, settings in values.items()))
    if not isinstance(values, list):
        raise SweepError(f"{where}: expected a list of values, such as [{_text(values)}], or labels with their settings")
    if not values:
        raise SweepError(f"{where} has no value; name some, or leave it out")
    choices = tuple(Choice(value, ((name, value),)) for value in values)
    _check_once(choices, where)
    return Axis(name, choices)


def _check_once(choices: Sequence[Choice], where: str) -> None:
    times = Counter(choice.identity for choice in choices)
    for choice in choices:
        if (count := times[choice.identity]) > 1:
            raise SweepError(f"{where}: {_text(choice.value)} is given {count} times; once is enough")


def _labelled(name: str, label: str, settings: JsonValue, where: str) -> Choice:
    if name in KEYS:
        raise SweepError(f"{where}: {name} is a key; its values are a list. Keys that move together need a name of their own")
    if name in TAKEN:
        raise SweepError(
            f"{where}: {name} is reserved, as are {', '.join(sorted(TAKEN - {name}))}: commands filter runs by them; "
            "take another name, such as mixing"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SweepError(f"{where}: no name for keys that move together; take lower-case letters and _, such as mixing")
    if not LABEL.fullmatch(label):
        raise SweepError(
            f"{where}: the label {label!r} becomes a part of names: take letters, digits, _ . + (no space, / or -)"
        )
    if not isinstance(settings, Mapping):
        raise SweepError(f"{where}.{label}: expected settings, such as {{augment.mixup_alpha: 0.8}}, or {{}} for none")
    return Choice(label, tuple(settings.items()), label)


def cells_of(
    axes: Sequence[Axis],
    datasets: Mapping[str, str],
    attentions: Sequence[Attention],
    *,
    include: Sequence[Mapping[str, JsonValue]],
    exclude: Sequence[Mapping[str, JsonValue]],
    where: str,
) -> list[Cell]:
    """The cells, in the order in which they are to be done.

    Args:
        axes: Of the sweep.
        datasets: Of each recipe.
        attentions: Of the sweep.
        include: Cells besides the grid: values by axis, also new ones; an axis that is not named has all its values.
        exclude: Cells that are left out: all those with these values.
        where: Of the sweep, for error messages.

    Raises:
        SweepError: an entry that names what there is not, takes nothing away, or adds what is there.
    """
    grid = list(_product(axes, datasets, attentions))
    for entry in exclude:
        narrowed = _narrowed(entry, axes, datasets, attentions, f"{where}: exclude", new=False)
        out = set(map(_key, _product(*narrowed)))
        if not out & set(map(_key, grid)):
            raise SweepError(f"{where}: exclude: {_text(dict(entry))}: no cell is left like this; leave the entry out")
        grid = [cell for cell in grid if _key(cell) not in out]
    if not grid and not include:
        raise SweepError(f"{where}: exclude: nothing is left of the grid; leave an entry out")
    for entry in include:
        narrowed = _narrowed(entry, axes, datasets, attentions, f"{where}: include", new=True)
        there = set(map(_key, grid))
        more = list(_product(*narrowed))
        if not more:
            raise SweepError(f"{where}: include: {_text(dict(entry))} adds no cell; leave the entry out")
        for cell in more:
            if _key(cell) in there:
                raise SweepError(f"{where}: include: {_text(dict(entry))} is in the grid already; leave the entry out")
            grid.append(cell)
    return grid


def _product(axes: Sequence[Axis], datasets: Mapping[str, str], attentions: Sequence[Attention]) -> Iterator[Cell]:
    for recipe, dataset in datasets.items():
        for choices in itertools.product(*(axis.choices for axis in axes)):
            for attention in attentions:
                yield Cell(recipe, dataset, attention, choices)


def _key(cell: Cell) -> str:
    """The same for cells of equal values, whether they are written 1 or 1.0."""
    return json.dumps([cell.recipe, cell.attention, *(choice.identity for choice in cell.choices)])


def _narrowed(
    entry: Mapping[str, JsonValue],
    axes: Sequence[Axis],
    datasets: Mapping[str, str],
    attentions: Sequence[Attention],
    where: str,
    *,
    new: bool,
) -> tuple[list[Axis], dict[str, str], list[Attention]]:
    """Axes, data sets and attentions as far as an entry names them; with `new` values also those that a key has not yet."""
    by_name = {axis.name: axis for axis in axes}
    for name in entry:
        if name == "seed":
            raise SweepError(f"{where}: seed: every cell has the seeds of the sweep; a sweep of its own can have others")
        if name not in ("dataset", "attention", *by_name):
            raise SweepError(
                f"{where}: {name} is no axis of the sweep; it has {', '.join(['dataset', 'attention', *by_name])}"
            )
    own: dict[str, Sequence[str]] = {"dataset": list(datasets.values()), "attention": attentions}
    chosen: dict[str, list[JsonValue]] = {name: list(values) for name, values in own.items()}
    for name in own.keys() & entry.keys():
        axis = Axis(name, tuple(Choice(value, (), value) for value in own[name]))
        chosen[name] = [choice.value for choice in _choices(entry[name], axis, f"{where}: {name}", where)]
    narrowed = []
    for axis in axes:
        if axis.name in entry:
            choices = _choices(entry[axis.name], axis, f"{where}: {axis.name}", where, new=new and axis.name in KEYS)
            axis = Axis(axis.name, tuple(choices))  # noqa: PLW2901 - the same axis with fewer choices
        narrowed.append(axis)
    recipes = {recipe: dataset for recipe, dataset in datasets.items() if dataset in chosen["dataset"]}
    return narrowed, recipes, [attention for attention in attentions if attention in chosen["attention"]]


def _choices(value: JsonValue, axis: Axis, place: str, where: str, *, new: bool = False) -> list[Choice]:
    """The choices of one value, or of several as a list; a list that is itself a value of the axis is one."""
    one = not isinstance(value, list) or any(choice.is_named(value) for choice in axis.choices)
    values = [value] if one or not isinstance(value, list) else value
    choices = [Choice(each, ((axis.name, each),)) if new else axis.choice(each, where) for each in values]
    _check_once(choices, place)
    return choices


def same(first: JsonValue, second: JsonValue) -> bool:
    """Whether two values are one: 1, 1.0 and the text "1" are, as a key takes them all; 1 and true are not."""
    return _identity(first) == _identity(second)


def _identity(value: JsonValue) -> str:
    """The same text for equal values, however a number is written."""
    if isinstance(value, list):
        return str([_identity(each) for each in value])
    if isinstance(value, str):
        number = parse_float(value)
        return json.dumps(value if number is None else number)
    return json.dumps(float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value)


def _text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)
