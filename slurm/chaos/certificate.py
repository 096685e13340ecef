"""What a sweep under faults came to, in numbers: as JSON and for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from slurm.chaos.daly import daly_interval_s, efficiency, young_interval_s
from slurm.chaos.watch import Life, Outage, Strike, causes, kept_s, outages, trained_s

RESTART = "restart"  # the kind of those that are measured beforehand
UNEXPLAINED = "unexplained"
DIGITS = 4  # of shares and seconds, behind the point


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        finished: It has a result.
        doubled: What says that it was trained, or finished, twice; empty if nothing does.
        different: How it differs from the same run undisturbed; empty if in no bit.
    """

    label: str
    finished: bool
    doubled: str = ""
    different: str = ""


@dataclass(frozen=True)
class Observed:
    """All that was seen; times in seconds by one clock."""

    began_s: float  # from when on faults might strike
    ended_s: float
    lives: Sequence[Life]
    strikes: Sequence[Strike]
    endings: Sequence[Ending]
    by_command: Mapping[str, str]  # submission -> submit or retry: those that were not the first
    checkpoint_every_s: float
    checkpoint_s: float  # what training waits for one


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed (nearest rank); None of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """How many, and their median, 95th percentile and maximum, rounded to tenths."""
    found = {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95), "max": max(values, default=None)}
    return {"count": len(values), **{key: None if value is None else round(value, 1) for key, value in found.items()}}


def numbers(seen: Observed) -> dict[str, Any]:
    """The certificate's figures."""
    found = [(life.label, outage) for life in seen.lives for outage in outages(life)]
    restarts = [
        outage.lost_s
        for label, outage in found
        if outage.attempts[0].at_s <= seen.began_s and RESTART in _kinds(outage, label, seen.strikes)
    ]
    faults = [strike for strike in seen.strikes if strike.kind != RESTART]
    counted = [(outage, _kinds(outage, label, faults)) for label, outage in found if outage.attempts[0].at_s > seen.began_s]
    lost = [outage.lost_s for outage, _ in counted if outage.lost_s is not None]
    struck = Counter(strike.kind for strike in faults)
    interruptions = Counter(kind for _, kinds in counted for kind in kinds)
    by_kind = {}
    for kind in [*struck, *({UNEXPLAINED} & set(interruptions))]:
        its = [outage for outage, kinds in counted if kinds[0] == kind]
        by_kind[kind] = {
            "struck": struck[kind],
            "interruptions": interruptions[kind],
            "lost_s": summary([outage.lost_s for outage in its if outage.lost_s is not None]),
            "recovered_by": dict(Counter(_recovered_by(outage, seen.by_command) for outage in its)),
        }
    recovered = Counter(_recovered_by(outage, seen.by_command) for outage, _ in counted)
    return {
        "faults_by_kind": by_kind,
        "lost_s": summary(lost),
        "recoveries": {each: recovered[each] for each in ("itself", "submit", "retry", "nobody")},
        "ettr": _ettr(seen, sum(_times(outage, seen.ended_s) for outage, _ in counted), restarts),
        "runs": {
            "count": len(seen.endings),
            "lost": [ending.label for ending in seen.endings if not ending.finished],
            "doubled": {ending.label: ending.doubled for ending in seen.endings if ending.doubled},
            "different": {ending.label: ending.different for ending in seen.endings if ending.different},
            "trained_twice_at_once_s": round(max((life.twice_s for life in seen.lives), default=0.0), 1),
        },
    }


def _kinds(outage: Outage, label: str, strikes: Sequence[Strike]) -> list[str]:
    """Of the faults that made the attempts of an outage necessary, in order."""
    return [found.kind if found else UNEXPLAINED for found in causes(outage, label, strikes)]


def _times(outage: Outage, until_s: float) -> int:
    """How often the run was interrupted in an outage until then: Daly's failures may also come during a restart."""
    return sum([outage.began_s < until_s, *(start.at_s < until_s for start in outage.attempts[1:])])


def _recovered_by(outage: Outage, by_command: Mapping[str, str]) -> str:
    """What brought the run back: SLURM or its job by itself, `submit` again, `retry`, or nothing."""
    if outage.lost_s is None:
        return "nobody"
    commands = {by_command.get(submission, "submit") for submission in outage.submissions}
    return "retry" if "retry" in commands else "submit" if commands else "itself"


def _ettr(seen: Observed, interruptions: int, restarts: Sequence[float | None]) -> dict[str, Any]:
    windows_s, trained = 0.0, 0.0
    for life in seen.lives:
        end_s = min(seen.ended_s, life.done_s if life.done_s is not None else math.inf)
        if end_s <= seen.began_s:  # it was done before anything might happen
            continue
        windows_s += end_s - seen.began_s
        trained += kept_s(life, end_s) - trained_s(life, seen.began_s)
    # the time in a run's rows has what it waited for checkpoints, which is no training
    share = seen.checkpoint_every_s / (seen.checkpoint_every_s + seen.checkpoint_s)
    measured = share * trained / windows_s if windows_s > 0 else None
    mttf_s = windows_s / interruptions if interruptions else math.inf
    restart_s = median(found) if (found := [each for each in restarts if each is not None]) else 0.0
    cost = {"checkpoint_s": seen.checkpoint_s, "restart_s": restart_s, "mttf_s": mttf_s}
    best_s = daly_interval_s(checkpoint_s=seen.checkpoint_s, mttf_s=mttf_s)
    bound = efficiency(seen.checkpoint_every_s, **cost)
    found_all = {
        "measured": measured,
        "daly_bound": bound,
        "of_daly_bound": None if measured is None else measured / bound,
        "checkpoint_every_s": seen.checkpoint_every_s,
        "interruptions": interruptions,
        "mean_time_to_interruption_s": None if math.isinf(mttf_s) else mttf_s,
        "checkpoint_s": seen.checkpoint_s,
        "restart_s": restart_s,
        "restarts_measured_s": [round(each, 1) for each in found],
        "daly_best_interval_s": None if math.isinf(best_s) else best_s,
        "young_best_interval_s": None
        if math.isinf(mttf_s)
        else young_interval_s(checkpoint_s=seen.checkpoint_s, mttf_s=mttf_s),
        "daly_bound_at_best_interval": 1.0 if math.isinf(best_s) or not best_s else efficiency(best_s, **cost),
        "run_hours": windows_s / 3600,
    }
    return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in found_all.items()}


def is_clean(certificate: Mapping[str, Any]) -> bool:
    """Whether no run was lost, doubled or different."""
    runs = certificate["runs"]
    return not (runs["lost"] or runs["doubled"] or runs["different"])


def as_text(certificate: Mapping[str, Any]) -> str:
    """For people."""
    runs, ettr, back = certificate["runs"], certificate["ettr"], certificate["recoveries"]
    lines = [
        f"{certificate['sweep']}: {runs['count']} runs under faults for {certificate['hours']:.3g} h, "
        f"seed {certificate['seed']}, MTTF {certificate['mttf_min']:g} min of a run, "
        f"a checkpoint every {ettr['checkpoint_every_s']:g} s",
        f"{'fault':<20} {'struck':>6} {'interrupted':>12} {'lost s: p50':>12} {'p95':>7} {'max':>7}   back by",
    ]
    for kind, its in certificate["faults_by_kind"].items():
        lines.append(_line(kind, its["struck"], its["interruptions"], its["lost_s"], its["recovered_by"]))
    everything = sum(its["struck"] for its in certificate["faults_by_kind"].values())
    lines.append(_line("all", everything, sum(back.values()), certificate["lost_s"], back))
    lines += [f"left out: {kind}: {why}" for kind, why in certificate["left_out"].items()]
    if ettr["measured"] is not None:
        lines.append(
            f"ETTR {ettr['measured']:.3f}, {ettr['of_daly_bound']:.3f} of Daly's {ettr['daly_bound']:.3f} "
            f"({_minutes(ettr['mean_time_to_interruption_s'])} between interruptions of a run, {ettr['restart_s']:.1f} s "
            f"for a restart, {1000 * ettr['checkpoint_s']:.0f} ms for a checkpoint)"
        )
    lines.append(f"recoveries: {back['itself']} without a hand, {back['submit']} by submit again, {back['retry']} by retry")
    lines.append(
        ", ".join(f"{len(runs[what])} {what}" for what in ("lost", "doubled", "different")) + f" of {runs['count']} runs"
    )
    if runs["trained_twice_at_once_s"]:
        lines.append(f"two processes trained the same run for {runs['trained_twice_at_once_s']} s at most")
    lines += [f"lost: {label}" for label in runs["lost"]]
    lines += [f"{what}: {label}: {why}" for what in ("doubled", "different") for label, why in runs[what].items()]
    return "\n".join(lines)


def _line(kind: str, struck: int, interrupted: int, lost: Mapping[str, Any], back: Mapping[str, int]) -> str:
    figures = " ".join(
        f"{'' if lost[key] is None else lost[key]:>{width}}" for key, width in (("p50", 12), ("p95", 7), ("max", 7))
    )
    by = ", ".join(f"{count} {who}" for who, count in back.items() if count)
    return f"{kind:<20} {struck:>6} {interrupted:>12} {figures}   {by}".rstrip()


def _minutes(seconds: float | None) -> str:
    return "no end" if seconds is None else f"{seconds / 60:.1f} min"


def checkpoint_cost_s(parts: Sequence[Mapping[str, float]], every_s: float) -> float:
    """What training waits for a checkpoint, from the `seconds.json` of undisturbed attempts: seconds per interval."""
    return fmean(each["checkpoints_s"] / max(1.0, each["train_time_s"] / every_s) for each in parts) if parts else 0.0
