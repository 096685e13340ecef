"""The runs of a sweep that differ from a run in the seed alone: what the accuracy of a model card is a mean over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitpa.errors import UserError
from vitpa.statistics import Estimate
from vitpa.trained import TrainedRun, load_sweep


@dataclass(frozen=True)
class Seeds:
    """A run's accuracy over the seeds of its sweep.

    Attributes:
        sweep: The sweep's name; empty if the run is in none with other seeds.
        top1: The estimate, of fractions.
        seeds: That are in it.
        wanted: How many the sweep has.
        left_out: Names of finished runs that other code or data have made, which are not in it.
    """

    sweep: str
    top1: Estimate
    seeds: list[int]
    wanted: int
    left_out: list[str]


def seeds_of(run: TrainedRun) -> Seeds:
    """The accuracy over the seeds of the sweep, of those that have this finished run, in which most are finished."""
    assert run.result is not None
    found = [Seeds("", Estimate.of([run.result.top1]), [run.config.seed], 1, [])]
    for listed in sorted(run.path.parent.parent.glob("sweeps/*/runs.json")):
        if run.directory.signature in listed.read_text(encoding="utf-8", errors="replace"):
            try:
                found.append(_in_sweep(run, listed.parent))
            except UserError:  # of another run, or the sweep's record: the card is about this run
                continue
    return max(found, key=lambda each: each.top1.n)


def _in_sweep(run: TrainedRun, folder: Path) -> Seeds:
    sweep = load_sweep(folder)
    cell = [each for each in sweep if _is_alike(run, each)]
    done = [each for each in cell if each.result is not None]
    counted = [each for each in done if _made_by(each) == _made_by(run)]
    return Seeds(
        sweep=sweep.name,
        top1=Estimate.of([each.result.top1 for each in counted if each.result is not None]),
        seeds=sorted(each.config.seed for each in counted),
        wanted=len(cell),
        left_out=[each.name for each in done if each not in counted],
    )


def _is_alike(run: TrainedRun, other: TrainedRun) -> bool:
    return other.config.model_copy(update={"seed": run.config.seed}).signature == run.directory.signature


def _made_by(run: TrainedRun) -> tuple[str, dict[str, str]]:
    assert run.result is not None
    return run.result.code_version, run.result.beton_sha256
