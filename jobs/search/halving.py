"""Which trials go on, and how many there may be: pure functions of the scores.

Trials pause at rungs, which are epochs; the last rung is the end of the training. Of all that have come to a rung the best
`keep` go on, as they come, as in ASHA (Li et al. 2020, Algorithm 2), but never more than that share of them; one at least. The
places of the others are given to new trials at the first rung, until the budget is used up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jobs.search.ledger import Trial


def share_of(count: int, keep: float) -> int:
    """How many of `count` trials at a rung go on."""
    return math.floor(count * keep + 1e-9)


def epochs_of(trials: int, rungs: Sequence[int], keep: float) -> int:
    """The most epochs that a search of so many trials trains, over all of them."""
    total, count, before = 0, trials, 0
    for rung in rungs:
        total += count * (rung - before)
        count, before = max(1, share_of(count, keep)), rung
    return total


def trials_within(epochs: float, rungs: Sequence[int], keep: float) -> int:
    """The most trials whose search trains no more than so many epochs."""
    few, many = 0, 1
    while epochs_of(many, rungs, keep) <= epochs:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if epochs_of(middle, rungs, keep) <= epochs else (few, middle)
    return few


def who_goes_on(trials: Sequence[Trial], rungs: Sequence[int], keep: float, places: int) -> list[tuple[int, int]]:
    """Trials that go on now, at most `places`: their numbers, each with the rung up to which. The farthest come first."""
    chosen: list[tuple[int, int]] = []
    for rung, following in reversed(list(pairwise(rungs))):
        there = ranked([trial for trial in trials if rung in trial.scores and not trial.out], rung)
        arrived = sum(rung in trial.scores for trial in trials)
        best = there[: share_of(arrived, keep)]
        free = share_of(arrived, keep) - sum(trial.epochs > rung for trial in trials)
        chosen += [(trial.number, following) for trial in best if trial.epochs == rung][: max(0, free)]
    return chosen[:places]


def last_hope(trials: Sequence[Trial], rungs: Sequence[int]) -> list[tuple[int, int]]:
    """The best of the farthest rung, where too few have come for a share of them to be one; empty at the end.

    For when nothing else is left to train.
    """
    for rung, following in reversed(list(pairwise(rungs))):
        if any(trial.epochs > rung and not trial.out for trial in trials):
            return []
        there = ranked([trial for trial in trials if rung in trial.scores and not trial.out], rung)
        if there:
            return [(there[0].number, following)]
    return []


def ranked(trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials with a score at `rung`, the best first; of equal ones that with the lower number."""
    return sorted(trials, key=lambda trial: (-trial.score(rung), trial.number))
