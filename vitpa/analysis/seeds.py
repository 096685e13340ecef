"""The structure of several runs as statistics over seeds: a cell is the runs that differ in the seed alone. In DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from vitpa.analysis.structure import Structure
from vitpa.statistics import Estimate
from vitpa.trained import differing_settings

WHAT = ["epoch", "measure", "layer", "head"]
CHANCE = ["chance", "chance_low", "chance_high"]


def findings(structures: Sequence[Structure]) -> pd.DataFrame:
    """All numbers of the runs, a row each: those of `Finding`, with `run`, `setting`, `attention`, `seed` and `cell`.

    `setting` is the data set and the values of what differs between the runs, besides attention and seed.
    """
    parts = []
    for each, settings in zip(structures, differing_settings([each.run for each in structures]), strict=True):
        config = each.run.config
        setting = " ".join([config.dataset, *(f"{name}={value}" for name, value in settings.items())])
        its = {"run": each.run.directory.signature, "setting": setting, "attention": config.model.attention}
        cell = {"seed": config.seed, "cell": f"{setting} {config.model.attention}"}
        frame = pd.DataFrame([asdict(finding) for finding in each.findings])
        parts.append(frame.assign(**its, **cell))
    return pd.concat(parts, ignore_index=True)


def over_seeds(found: pd.DataFrame) -> pd.DataFrame:
    """For each cell, epoch, measure, layer and head: n, mean, std, ends of the 95 % t interval; means of the rest.

    The epochs of a cell ascend, whichever of them each seed was measured after.

    Args:
        found: As `findings` has it.
    """
    groups = found.groupby(["cell", "setting", "attention", *WHAT], dropna=False, sort=False)
    statistics = groups["value"].apply(_statistics).unstack()
    return _by_epoch(statistics.join(groups[["initial", *CHANCE]].mean()).reset_index(), "cell")


def differences(found: pd.DataFrame) -> pd.DataFrame:
    """content - positional, paired by seed, for each setting, epoch, measure and layer: statistics as `over_seeds` has them.

    The epochs of a setting ascend. Heads have no partners in another network: only means over them are paired. Empty unless
    both attentions have a seed in common.
    """
    of_layers = found[found["head"].isna()]
    paired = of_layers.pivot_table(
        index=["setting", "seed", "epoch", "measure", "layer"], columns="attention", values="value", dropna=False, sort=False
    )
    if {"content", "positional"} <= set(paired.columns):
        both = (paired["content"] - paired["positional"]).dropna()
    else:
        both = pd.Series()
    if both.empty:
        return pd.DataFrame(columns=["setting", "epoch", "measure", "layer", *Estimate.__dataclass_fields__])
    groups = both.groupby(["setting", "epoch", "measure", "layer"], dropna=False, sort=False)
    return _by_epoch(groups.apply(_statistics).unstack().reset_index(), "setting")


def _by_epoch(frame: pd.DataFrame, group: str) -> pd.DataFrame:
    """Rows in the order of the epochs within each `group`; groups, and rows of one epoch, in the order that they have."""
    numbers = pd.factorize(frame[group])[0]
    return frame.assign(_=numbers).sort_values(["_", "epoch"], kind="stable", ignore_index=True).drop(columns="_")


def _statistics(values: pd.Series) -> pd.Series:
    return pd.Series(asdict(Estimate.of(values.tolist())), dtype=float)
