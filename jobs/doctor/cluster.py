"""What `vitpa doctor` reads from a cluster's configuration, and what it means for sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.plan.forecast import Group
from jobs.plan.limits import limits_of_runs
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.cluster import Cluster, Finding

Level = Literal["ok", "warning", "problem", "skipped"]
PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SHORT_MEMORY_S = 60  # MinJobAge below this, and a job may be gone between two looks


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    hint: str = ""

    def line(self) -> str:
        """For people."""
        return f"{self.level:8} {self.name:16} {self.found}" + (f" -> {self.hint}" if self.hint else "")


def accounting(scheduler: Scheduler) -> Check:
    """Whether sacct answers."""
    try:
        scheduler.ask("sacct", "--noheader", "--allocations", "--starttime=now", "--format=JobID")
    except SchedulerError as error:
        words = str(error).partition(";")[0]
        return Check(
            "accounting",
            "warning",
            f"{words}: how a job ended is known only while SLURM remembers it (MinJobAge); later, its run is shown as lost",
            "nothing is wrong with the results; ask the administrators for sacct",
        )
    return Check("accounting", "ok", "sacct answers")


def configured(cluster: Cluster, profile: SlurmProfile) -> Iterator[Check]:
    """The cluster's configuration: requeueing, preemption, time limits."""
    configuration = cluster.configuration
    partition = cluster.partitions.get(cluster.partition(profile.partition), {})
    yield Check("MaxArraySize", "ok", f"{configuration.get('MaxArraySize')}: a sweep of more runs is split into arrays")
    yield from _requeueing(configuration)
    yield _preemption(configuration, partition)
    kill_wait = configuration.get("KillWait", "not known")
    grace = f"{partition['GraceTime']} s" if "GraceTime" in partition else "not known"
    yield Check(
        "time to stop",
        "ok",
        f"KillWait {kill_wait}, GraceTime of the partition {grace}: what a preempted run has for its checkpoint; "
        f"before the time limit it has {profile.signal_delay_s} s (signal_delay_s)",
    )
    keys = ("OverTimeLimit", "UnkillableStepTimeout", "KillOnBadExit")
    limits = ", ".join(f"{key} {configuration.get(key, 'not known')}" for key in keys)
    yield Check("ends of jobs", "ok", f"{limits} (jobs of vitpa set it to 0)")
    yield _memory(configuration)


def _requeueing(configuration: Mapping[str, str]) -> Iterator[Check]:
    default = "" if configuration.get("JobRequeue") == "1" else "; jobs of vitpa ask for it with --requeue"
    yield Check("JobRequeue", "ok", f"{configuration.get('JobRequeue', 'not known')}{default}")
    codes = configuration.get("RequeueExit", "(null)")
    if "1" in _numbers(codes):
        yield Check(
            "RequeueExit",
            "warning",
            f"{codes}: SLURM starts failed runs again by itself; each is given up after max_idle_attempts executions",
            "set max_idle_attempts: 1 in the profile if you do not want that",
        )
    held = configuration.get("RequeueExitHold", "(null)")
    if "1" in _numbers(held):
        yield Check(
            "RequeueExitHold",
            "warning",
            f"{held}: SLURM puts the job of a failed run on hold; its runs are pending (special_exit) until you act",
            "vitpa sweep status names such jobs: scontrol release has one try again, vitpa sweep cancel gives its runs up",
        )


def _numbers(text: str) -> set[str]:
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found |= {str(number) for number in range(int(first), int(last or first) + 1)}
    return found


def _preemption(configuration: Mapping[str, str], partition: Mapping[str, str]) -> Check:
    kind = configuration.get("PreemptType", "not known")
    by_partition = kind == "preempt/partition_prio"
    mode = (partition.get("PreemptMode") if by_partition else None) or configuration.get("PreemptMode", "not known")
    if by_partition and not partition:
        return Check("preemption", "warning", "not known: it depends on the partition, and there is none of that name")
    if kind == "preempt/none" or mode == "OFF":
        return Check("preemption", "ok", "jobs of this partition are not preempted")
    if "REQUEUE" in mode:
        return Check("preemption", "ok", f"PreemptMode {mode}: preempted runs are requeued and go on from their checkpoint")
    if "CANCEL" in mode:
        return Check(
            "preemption",
            "warning",
            f"PreemptMode {mode}: preempted runs end and are not started again by SLURM",
            "submit the sweep again then: it goes on from the checkpoints",
        )
    return Check("preemption", "warning", f"PreemptMode {mode} ({kind}): preempted runs are held, and keep their memory")


def _memory(configuration: Mapping[str, str]) -> Check:
    age = configuration.get("MinJobAge", "")
    number = age.split()[0] if age else ""
    text = f"{age or 'not known'}: so long squeue shows jobs that have ended"
    if number.isdecimal() and 0 < int(number) < SHORT_MEMORY_S:
        return Check("MinJobAge", "warning", text, "without sacct, runs whose job has ended badly are shown as lost")
    return Check("MinJobAge", "ok", text)


def of_profile(profile: SlurmProfile, cluster: Cluster) -> list[Check]:
    """The limits that the profile would hit, whatever the sweep."""
    levels: dict[str, Level] = {"info": "ok", "unknown": "warning", "warning": "warning", "problem": "problem"}
    return [
        Check(finding.about, levels[finding.level], finding.text, "change the profile" if finding.level == "problem" else "")
        for finding in (*limits_of_runs(profile, Group((), 0), cluster)[0], *cluster.unknown)
    ]


def accepted(profile: SlurmProfile, cluster: Cluster, answer: Finding) -> Check:
    """What sbatch says to the profile, with what there is to choose from."""
    if answer.level != "problem":
        return Check("submission", "warning" if answer.level == "warning" else "ok", answer.text)
    named = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint", "reservation")}
    ours = ", ".join(f"{key}={value}" for key, value in named.items() if value) or "the partition, account and QOS by default"
    there = _choices("partitions", cluster.partitions) + _choices("QOS", cluster.qos)
    accounts = _choices("your accounts", {row["Account"]: row for row in cluster.associations if row["User"]})
    return Check("submission", "problem", f"{answer.text} ({ours})", f"change the profile; {'; '.join(there + accounts)}")


def _choices(what: str, names: Mapping[str, object] | Sequence[str]) -> list[str]:
    return [f"{what}: {', '.join(sorted(names))}"] if names else []
