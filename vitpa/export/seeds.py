"""The runs of a sweep that differ from a run in the seed alone: what the accuracy of a model card is a mean over."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitpa.errors import UserError
from vitpa.statistics import Estimate
from vitpa.trained import TrainedRun, TrainedSweep, load_sweep

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seeds:
    """A run's accuracy over the seeds of its sweep.

    Attributes:
        sweep: The sweep's name; empty if the run is in none with other seeds.
        top1: The estimate, of fractions.
        seeds: That are in it.
        wanted: How many the sweep has.
        left_out: Names of finished runs that other code or data have made, which are not in it.
        without: Names of the runs that have no result to be in it, each with the reason: not started, not finished, damaged.
        unread: Sweeps that have the run, but whose record cannot be used.
    """

    sweep: str
    top1: Estimate
    seeds: list[int]
    wanted: int
    left_out: list[str]
    without: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def seeds_of(run: TrainedRun) -> Seeds:
    """The accuracy over the seeds of the sweep, of those that have this finished run, in which most are finished.

    A warning says what of a sweep is damaged.
    """
    assert run.result is not None
    found, unread = [Seeds("", Estimate.of([run.result.top1]), [run.config.seed], 1, [])], []
    for listed in sorted(run.path.parent.parent.glob("sweeps/*/runs.json")):
        if run.directory.signature in listed.read_text(encoding="utf-8", errors="replace"):
            try:
                found.append(_in_sweep(run, listed.parent))
            except UserError as error:  # the card is about this run
                LOGGER.warning(f"the seeds of the sweep {listed.parent.name} are not in the card: {error}")
                unread.append(listed.parent.name)
    return replace(max(found, key=lambda each: (each.top1.n, each.wanted)), unread=unread)


def _in_sweep(run: TrainedRun, folder: Path) -> Seeds:
    sweep = load_sweep(folder)
    cell = [each for each in sweep if _is_alike(run, each)]
    done = [each for each in cell if each.result is not None]
    counted = [each for each in done if _made_by(each) == _made_by(run)]
    others = _alike_without_record(run, sweep)
    for name in others:
        if name in sweep.broken:
            LOGGER.warning(f"{name} is not in the card: {sweep.broken[name]}")
    unfinished = {sweep.label(each): "not finished" for each in cell if each.result is None}
    return Seeds(
        sweep=sweep.name,
        top1=Estimate.of([each.result.top1 for each in counted if each.result is not None]),
        seeds=sorted(each.config.seed for each in counted),
        wanted=len(cell) + len(others),
        left_out=[sweep.label(each) for each in done if each not in counted],
        without={**unfinished, **{name: "damaged" if name in sweep.broken else "not started" for name in others}},
    )


def _alike_without_record(run: TrainedRun, sweep: TrainedSweep) -> list[str]:
    """The names of the sweep's runs that differ in the seed alone, and have no record that can be used."""
    found = []
    for signature, name in sweep.labels.items():
        if (name in sweep.broken or name in sweep.missing) and signature in sweep.seeds:
            its = run.config.model_copy(update={"seed": sweep.seeds[signature]})
            if its.signature == signature:
                found.append(name)
    return found


def _is_alike(run: TrainedRun, other: TrainedRun) -> bool:
    return other.config.model_copy(update={"seed": run.config.seed}).signature == run.directory.signature


def _made_by(run: TrainedRun) -> tuple[str, dict[str, str]]:
    assert run.result is not None
    return run.result.code_version, run.result.beton_sha256
