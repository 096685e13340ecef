"""Cells of a sweep against one another, paired by seed: along an axis, and the best of a data set against all others."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from jobs.errors import SweepError
from jobs.grid import Attention, same, short_name
from vitpa.statistics import Estimate, holm, paired_p

LEVEL = 0.05  # of the corrected p values that count as a difference
NONE = "-"  # in the place of the attention that two networks have in common


@dataclass(frozen=True)
class Scores:
    """What a cell is on each axis, `attention` among them, and the accuracy of its runs by seed; None: not there yet."""

    dataset: str
    position: Mapping[str, str]
    val_top1: Mapping[int, float | None]

    @property
    def values(self) -> list[float]:
        """The accuracies that are there."""
        return [value for value in self.val_top1.values() if value is not None]

    @property
    def seeds(self) -> list[int]:
        """The seeds whose accuracies are there."""
        return sorted(seed for seed, value in self.val_top1.items() if value is not None)

    @property
    def has_attention(self) -> bool:
        """Whether it is of a ViT; else another network stands in the place of the attention."""
        return self.position.get("attention") in get_args(Attention)

    @property
    def text(self) -> str:
        """Its position, for people."""
        return " ".join(
            value if axis == "attention" else f"{short_name(axis)}={value}" for axis, value in self.position.items()
        )


@dataclass(frozen=True)
class Comparison:
    """second - first, over the seeds that both cells have.

    Attributes:
        dataset: Of both.
        common: Where both are on the other axes; the attention is that of the one that has an attention.
        first: Value of the one on the compared axis.
        second: Of the other.
        wanted: Seeds that both have in the sweep.
        val_top1: The differences' mean, standard deviation and 95 % interval, as fractions.
        seeds: That are in it.
        p: Of the paired t test, two-sided; None with fewer than two seeds.
        p_holm: The same, corrected for all comparisons of the table (Holm 1979).
    """

    dataset: str
    common: Mapping[str, str]
    first: str
    second: str
    wanted: int
    val_top1: Estimate
    seeds: list[int]
    p: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Best:
    """The cell of a data set with the highest mean, and the others that it cannot be told apart from.

    Attributes:
        dataset: Whose cells they are.
        cell: The best.
        mean: Its mean accuracy, a fraction.
        others: How many more cells have two results or more.
        alike: Those of them whose difference to it has a corrected p of 0.05 or more, among all pairs of cells.
        above: Those that are better than it by that test, which is of the seeds that both have.
        uneven: Whether the cells have results of different seeds.
    """

    dataset: str
    cell: str
    mean: float
    others: int
    alike: list[str]
    above: list[str] = field(default_factory=list)
    uneven: bool = False


def axis_named(name: str, axes: Sequence[str]) -> str:
    """The axis of that name, or of that last part of a dotted one (`lr`).

    Raises:
        SweepError: there is none, or more than one.
    """
    found = [axis for axis in axes if name == axis] or [axis for axis in axes if name == short_name(axis)]
    if len(found) != 1:
        which = "several axes are called so" if found else "the sweep has no such axis"
        raise SweepError(f"{name}: {which}; there is {', '.join(axes)}")
    return found[0]


def value_named(name: str, axis: str, cells: Sequence[Scores]) -> str:
    """The value on `axis` of that name, however a number is written.

    Raises:
        SweepError: no cell has it.
    """
    values = list(dict.fromkeys(cell.position[axis] for cell in cells))
    found = [value for value in values if value == name] or [value for value in values if same(value, name)]
    if not found:
        raise SweepError(f"--compare {axis}={name}: no run has that value; there is {', '.join(values)}")
    return found[0]


def comparisons(cells: Sequence[Scores], axis: str, base: str | None = None) -> list[Comparison]:
    """Every two cells of a data set that differ on `axis` alone; a network without attention stands beside each attention.

    With `base`, a value of the axis, only each other value against that one.
    """
    alike: dict[str, list[Scores]] = {}
    plain: dict[str, list[Scores]] = {}  # networks without attention
    for cell in cells:
        groups = alike if cell.has_attention or axis == "attention" else plain
        groups.setdefault(_place(cell, axis, attention=groups is alike), []).append(cell)
    pairs = []
    for group in alike.values():
        networks = plain.get(_place(group[0], axis, attention=False), [])
        pairs += [*itertools.combinations(group, 2), *itertools.product(group, networks)]
    for networks in plain.values():
        pairs += itertools.combinations(networks, 2)
    pairs = [pair for pair in pairs if pair[0].position[axis] != pair[1].position[axis]]
    if base is not None:
        turned = [(second, first) if second.position[axis] == base else (first, second) for first, second in pairs]
        pairs = [pair for pair in turned if pair[0].position[axis] == base]
    found = [_comparison(first, second, axis) for first, second in pairs]
    return [replace(each, p_holm=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]


def best_cells(cells: Sequence[Scores]) -> list[Best]:
    """For each data set with several cells that have two results or more, the best of them."""
    found = []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = [cell for cell in cells if cell.dataset == dataset and len(cell.values) > 1]
        if len(own) < 2:
            continue
        means = {id(cell): Estimate.of(cell.values).mean or 0.0 for cell in own}
        best = max(own, key=lambda cell: means[id(cell)])
        pairs = list(itertools.combinations(own, 2))
        corrected = holm([paired(*pair)[2] for pair in pairs])
        alike, above = [], []
        for pair, p in zip(pairs, corrected, strict=True):
            if not any(cell is best for cell in pair):
                continue
            other = pair[0] if pair[1] is best else pair[1]
            if p is None or p >= LEVEL:
                alike.append(other.text)
            elif math.fsum(paired(best, other)[1].values()) > 0:
                above.append(other.text)
        found.append(Best(dataset, best.text, means[id(best)], len(own) - 1, alike, above, uneven(own)))
    return found


def uneven(cells: Sequence[Scores]) -> bool:
    """Whether the cells have results of different seeds."""
    return len({tuple(cell.seeds) for cell in cells}) > 1


def _place(cell: Scores, axis: str, *, attention: bool) -> str:
    """Where a cell is on all axes but this one, and perhaps the attention."""
    others = {name: value for name, value in _without(cell, axis).items() if attention or name != "attention"}
    return json.dumps([cell.dataset, others])


def scores_of(cells: Sequence[Scores], its: Comparison, axis: str, value: str) -> Scores:
    """The cell of a comparison along `axis` that has this value there."""
    place = {**its.common, axis: value}
    return next(
        cell
        for cell in cells
        if cell.dataset == its.dataset
        and all(
            cell.position[name] == its_value
            for name, its_value in place.items()
            if name == axis or name != "attention" or cell.has_attention
        )
    )


def _without(cell: Scores, axis: str) -> dict[str, str]:
    return {name: value for name, value in cell.position.items() if name != axis}


def _comparison(first: Scores, second: Scores, axis: str) -> Comparison:
    wanted, differences, p = paired(first, second)
    common = _without(first if first.has_attention or not second.has_attention else second, axis)
    neither = not first.has_attention and not second.has_attention
    if neither and "attention" in common and first.position["attention"] != second.position["attention"]:
        common["attention"] = NONE
    return Comparison(
        first.dataset,
        common,
        first.position[axis],
        second.position[axis],
        wanted,
        Estimate.of(list(differences.values())),
        list(differences),
        p,
    )


def paired(first: Scores, second: Scores) -> tuple[int, dict[int, float], float | None]:
    """How many seeds are in both, second - first for those with results, and the p value of that."""
    wanted = sorted(first.val_top1.keys() & second.val_top1.keys())
    pairs = [(seed, first.val_top1[seed], second.val_top1[seed]) for seed in wanted]
    differences = {seed: b - a for seed, a, b in pairs if a is not None and b is not None}
    return len(wanted), differences, paired_p(list(differences.values()))
