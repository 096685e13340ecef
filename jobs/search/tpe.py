"""Trials drawn by optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

The study is made anew from our ledger each time, in memory, with a seed that follows from the number of trials: the ledger is
the only truth, and whoever goes on after a kill draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from jobs.errors import SweepError
from jobs.search.ledger import Trial
from jobs.search.space import TRIES, Dimension, Taken, whole_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

HINT = "search.sampler=tpe needs optuna, which is not installed: pip install optuna (>= 4), or take sampler: random"


def tpe_values(
    dimensions: Sequence[Dimension], seed: int, trials: Sequence[Trial], count: int, taken: Taken
) -> list[dict[str, JsonValue]]:
    """The values of the next `count` trials, none of them `taken`; fewer where the space has no more.

    Trials that stopped at an epoch count as pruned there, with their score; those without a score as worse than all.

    Raises:
        SweepError: optuna is not installed.
    """
    try:
        import optuna  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SweepError(HINT) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {each.key: _distribution(each) for each in dimensions}
    sampler = optuna.samplers.TPESampler(seed=whole_seed(f"{seed} {len(trials)}"), constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    longest = max((epoch for trial in trials for epoch in trial.scores), default=0)
    for trial in trials:
        study.add_trial(_frozen(trial, dimensions, distributions, longest))
    by_key = {each.key: each for each in dimensions}
    found: list[dict[str, JsonValue]] = []
    in_vain = 0
    while len(found) < count and in_vain < TRIES:
        asked = study.ask(distributions)
        values = {key: _value(by_key[key], value) for key, value in asked.params.items()}
        if taken.take(values):
            found.append(values)
            in_vain = 0
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            in_vain += 1
    return found


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import (  # noqa: PLC0415 - an optional dependency
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if dimension.choices:
        return CategoricalDistribution(range(len(dimension.choices)))  # optuna takes no lists as choices
    if dimension.whole:
        return IntDistribution(round(dimension.low), round(dimension.high), dimension.log, round(dimension.step or 1))
    return FloatDistribution(dimension.low, dimension.high, dimension.log, dimension.step)


def _value(dimension: Dimension, parameter: Any) -> JsonValue:
    return dimension.choices[parameter] if dimension.choices else dimension.value_of(parameter)


def _frozen(
    trial: Trial, dimensions: Sequence[Dimension], distributions: dict[str, BaseDistribution], longest: int
) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial  # noqa: PLC0415 - an optional dependency

    parameters = {
        each.key: each.choices.index(trial.values[each.key]) if each.choices else trial.values[each.key] for each in dimensions
    }
    scores = {epoch: trial.score(epoch) for epoch in trial.scores}
    complete = longest in scores and not trial.out
    return create_trial(
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        value=scores[longest] if complete else None,
        params=parameters,
        distributions=distributions,
        intermediate_values=scores,
    )
