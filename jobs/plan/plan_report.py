"""The report on a submission, for plan and submit alike: what SLURM would refuse, runs at a time, hours, price."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.plan.forecast import Forecast, Group, Kind, Speed, forecast, group_of, job_kinds, kind_of, rates_of, speeds_of
from jobs.plan.limits import attempts_needed, limits_of_runs, signal_findings
from jobs.plan.sbatch_test import only_for_now, test_only
from jobs.plan.speeds import Benchmark
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler
from jobs.scheduler.cluster import Cluster, Finding, ask
from jobs.state import RunState
from jobs.submit.submit import Batch, SubmissionPlan
from vitpa.config_file import parse_model


@dataclass(frozen=True)
class PlanReport:
    """What a submission would cost, and what stands in its way."""

    forecast: Forecast
    findings: list[Finding]
    groups: list[dict[str, Any]]  # runs with equal resources, as `plan --json` has them

    @property
    def refusals(self) -> list[str]:
        """Why SLURM would not take the runs, or never start them: `plan` and `submit` say the same."""
        return [finding.text for finding in self.findings if finding.level == "problem"]

    @property
    def warnings(self) -> list[str]:
        """What makes the runs wait, or ends them early."""
        of_forecast = ("speeds", "measured")
        return [f"warning: {each.text}" for each in self.findings if each.level == "warning" and each.about not in of_forecast]

    def lines(self) -> list[str]:
        """For people; without the refusals."""
        words = {"info": "", "warning": "warning: ", "unknown": ""}
        said = [words[finding.level] + finding.text for finding in self.findings if finding.level in words]
        return [*said, *(self.forecast.lines() if self.groups else [])]

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` has it."""
        return {**self.forecast.as_json(), "groups": self.groups, "findings": [asdict(finding) for finding in self.findings]}


EMPTY_REPORT = PlanReport(forecast([], {}), [], [])  # to be submitted


def look_ahead(
    plan: SubmissionPlan,
    states: Sequence[RunState],
    root: Path,
    name: str,
    scheduler: Scheduler | None,
    *,
    benchmark: Benchmark | None = None,
    gpu_hour_price: float | None = None,
) -> PlanReport:
    """What it would cost to submit `plan` for the sweep of that name, and what stands in the way.

    Runs that have finished, among the `states` of the sweep, say how fast they are, a `benchmark` where none has finished.
    Without a `scheduler` SLURM is not asked. The price may be in any currency.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    batches = by_resources(plan.batches)
    runs = [state.run for batch in plan.batches for state in batch.chosen]
    speeds = speeds_of(states, runs, root)
    rates, said = (None, []) if benchmark is None else rates_of(plan.batches, benchmark, speeds)
    groups = [group_of(same, speeds, rates or {}) for same in batches]
    findings = [Finding("info", "nodes", note) for note in plan.notes]
    if plan.batches and plan.batches[0].how["executor"] == "slurm":
        groups, found = _review(batches, groups, scheduler, root, name) if scheduler else _unasked(batches, groups)
        findings += found
    findings += [Finding("warning", "speeds", text) for text in said]
    findings += [Finding("warning", "measured", text) for text in dict.fromkeys(_measured_otherwise(batches, groups, speeds))]
    unmeasured = {kind[:2] for kind in job_kinds(plan.batches).keys() - (rates or {}).keys()} - speeds.keys()
    details = [_details(same, group) for same, group in zip(batches, groups, strict=True)]
    expected = forecast(groups, speeds, unmeasured, rates=rates, gpu_hour_price=gpu_hour_price)
    return PlanReport(expected, findings, details)


def _measured_otherwise(
    batches: Sequence[Sequence[Batch]], groups: Sequence[Group], speeds: Mapping[Kind, Speed]
) -> Iterator[str]:
    """Where the measured runs had other hardware than these will have."""
    for same, group in zip(batches, groups, strict=True):
        for kind in sorted({kind_of(state.run) for batch in same for state in batch.chosen}):
            speed = speeds.get(kind)
            if speed and group.gpus and speed.hardware == "CPU":
                yield f"{' '.join(kind)} was measured on CPUs, these runs have GPUs: expect less time"
            elif speed and group.gpus and abs(speed.gpus_per_run - group.gpus_per_run) > 0.1 * group.gpus_per_run:
                measured, have = f"{speed.gpus_per_run:.2g}", f"{group.gpus_per_run:.2g}"
                yield f"{' '.join(kind)} was measured with {measured} GPUs for a run, these have {have}"


def _review(
    batches: Sequence[Sequence[Batch]], groups: Sequence[Group], scheduler: Scheduler, root: Path, name: str
) -> tuple[list[Group], list[Finding]]:
    """Hold the runs against the cluster: the groups with what is known of how many run at a time, and findings."""
    cluster = ask(scheduler)
    findings = list(_of_all(batches, cluster))
    bounded = []
    for same, group in zip(batches, groups, strict=True):
        profile = _profile_of(same)
        answer = only_for_now(test_only(scheduler, same, profile, root, name), profile, cluster)
        found, most = limits_of_runs(profile, group, cluster)
        known = [number for number in (group.at_a_time, *most) if number is not None]
        bounded.append(replace(group, at_a_time=max(1, min(known)) if known else None))
        label = f"{_datasets(same)}: " if len(groups) > 1 else ""
        findings += [replace(finding, text=label + finding.text) for finding in (answer, *found)]
    return bounded, findings + cluster.unknown


def _unasked(batches: Sequence[Sequence[Batch]], groups: Sequence[Group]) -> tuple[list[Group], list[Finding]]:
    """The groups as they are, and what can be said without SLURM."""
    findings = [
        Finding("unknown", "limits", "SLURM does not answer: what it allows, and how many jobs at a time, is not known")
    ]
    for same, group in zip(batches, groups, strict=True):
        findings += signal_findings(_profile_of(same), group)
    return list(groups), findings


def _profile_of(batches: Sequence[Batch]) -> SlurmProfile:
    return parse_model(SlurmProfile, batches[0].how["profile"], "the profile")


def _datasets(batches: Sequence[Batch]) -> str:
    return ", ".join(sorted({state.run.dataset for batch in batches for state in batch.chosen}))


def _details(batches: Sequence[Batch], group: Group) -> dict[str, Any]:
    common = {
        "datasets": _datasets(batches),
        "runs": sum(len(batch.chosen) for batch in batches),
        "jobs": len(group.durations_s),
        "at_a_time": group.at_a_time,
        "gpus_per_run": group.gpus_per_run,
        "longest_run_s": group.longest_s,
    }
    if batches[0].how["executor"] != "slurm":
        return common
    profile = _profile_of(batches)
    return {**common, "arrays": len(batches), "time_s": profile.time_s, "attempts": attempts_needed(profile, group)}


def by_resources(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches with equal resources together: SLURM's limit on arrays may have split them, each with its share of runs."""
    groups: dict[str, list[Batch]] = {}
    for batch in batches:
        resources = {key: value for key, value in batch.how.get("profile", {}).items() if key != "array_parallelism"}
        groups.setdefault(repr(resources), []).append(batch)
    return list(groups.values())


def _of_all(groups: Sequence[Sequence[Batch]], cluster: Cluster) -> Iterator[Finding]:
    """What concerns the submission as a whole."""
    batches = [batch for group in groups for batch in group]
    count, jobs = sum(len(batch.chosen) for batch in batches), sum(len(batch.tasks) for batch in batches)
    runs = f"{count} runs" + (f" ({jobs} jobs)" if jobs < count else "")
    arrays = f"{len(batches)} job array{'s' if len(batches) > 1 else ''}"
    option = re.search(r"max_array_tasks=\d+", cluster.configuration.get("SchedulerParameters", ""))
    most = f"MaxArraySize {cluster.configuration.get('MaxArraySize', 'not known')}" + (f", {option[0]}" if option else "")
    yield Finding(
        "info",
        "MaxArraySize",
        f"{runs} in {arrays} ({most}); {cluster.own_jobs} jobs of yours are in the queue",
    )
    room = int(cluster.configuration.get("MaxJobCount", "10000"))
    if cluster.jobs is not None and cluster.jobs + jobs >= room:
        yield Finding(
            "problem", "MaxJobCount", f"{runs} and {cluster.jobs} jobs in the queue are more than MaxJobCount={room}; "
            "submit a part of them (a filter such as seed=0)"
        )  # fmt: skip
