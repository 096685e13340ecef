"""What a SLURM cluster is made of and allows, as SLURM publishes it: partitions, nodes, limits of users and QOS.

A handful of questions, whatever the number of runs. What SLURM does not say is reported as unknown, not guessed.
"""

from __future__ import annotations

import math
import os
import pwd
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.gres import Gres, parse_gres

Level = Literal["problem", "warning", "unknown", "info"]  # problem: refused, or never started

UNUSABLE = ("down", "drain", "fail", "maint", "unk", "error", "boot", "power", "reboot")
NODE_FORMAT = "%R|%D|%G|%c|%m|%T"  # of sinfo
QOS = (
    "Name,GrpJobs,GrpSubmit,GrpTRES,MaxTRES,MaxTRESPerNode,MaxWall,"
    "MaxTRESPU,MaxJobsPU,MaxSubmitPU,MaxTRESPA,MaxJobsPA,MaxSubmitPA"
)
ASSOCIATION = "Account,User,Partition,GrpJobs,GrpSubmit,GrpTRES,MaxJobs,MaxSubmit,MaxTRES,MaxTRESPerNode,MaxWall,DefaultQOS"


@dataclass(frozen=True)
class Finding:
    """One thing that the user should know."""

    level: Level
    about: str
    text: str


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of a partition."""

    count: int
    resources: tuple[Gres, ...]  # GPUs by type, local scratch
    cpus: int
    mem_mib: int
    state: str

    def has(self, name: str, of_type: str) -> int:
        """How many of a resource each has, of any type if that is empty."""
        return sum(each.count for each in self.resources if each.name == name and of_type in ("", each.type))

    @property
    def usable(self) -> bool:
        """Whether jobs may start on them."""
        return not self.state.startswith(UNUSABLE)


@dataclass
class Cluster:
    """What SLURM has said of itself and of us."""

    configuration: dict[str, str]
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: dict[str, list[Nodes]] = field(default_factory=dict)  # by partition
    own_jobs: int = 0  # in the queue, tasks of arrays counted
    jobs: int | None = None  # in the queue, of all users
    qos: dict[str, dict[str, str]] = field(default_factory=dict)
    associations: list[dict[str, str]] = field(default_factory=list)
    account: str = ""  # the default one
    unknown: list[Finding] = field(default_factory=list)

    def partition(self, name: str | None) -> str:
        """The partition of that name, or else the default one; empty if there is neither."""
        if name is not None:
            return name if name in self.partitions else ""
        return next((key for key, fields in self.partitions.items() if fields.get("Default") == "YES"), "")


def ask(scheduler: Scheduler) -> Cluster:
    """What SLURM says of itself.

    Raises:
        SchedulerError: it does not answer.
    """
    cluster = Cluster(scheduler.configuration())
    for line in scheduler.ask("scontrol", "show", "partition", "--all", "--oneliner").splitlines():
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        if "PartitionName" in fields:
            cluster.partitions[fields["PartitionName"]] = fields
    for line in scheduler.ask("sinfo", "--all", "--noheader", "--exact", f"--format={NODE_FORMAT}").splitlines():
        partition, *columns = line.strip().split("|")
        if len(columns) != NODE_FORMAT.count("|"):  # a line of a site's wrapper
            continue
        cluster.nodes.setdefault(partition, []).append(_nodes_of(columns))
    own = scheduler.ask("squeue", "--all", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i")
    cluster.own_jobs = len(re.findall(r"^\d+(?:_\d+)?$", own, re.MULTILINE))
    _ask_for_the_load(scheduler, cluster)
    _ask_for_limits(scheduler, cluster)
    return cluster


def _nodes_of(columns: Sequence[str]) -> Nodes:
    count, gres, cpus, mem, state = columns
    try:
        resources = parse_gres(gres)
    except ValueError:  # of a SLURM that writes them otherwise
        resources = ()
    return Nodes(int(count), resources, int(cpus.rstrip("+")), int(mem.rstrip("+")), state)


def _ask_for_the_load(scheduler: Scheduler, cluster: Cluster) -> None:
    try:
        text = scheduler.ask("sdiag")
    except SchedulerError as error:
        cluster.unknown.append(Finding("unknown", "MaxJobCount", f"jobs of all users: not known ({error})"))
        return
    counts = [int(number) for number in re.findall(r"^Jobs (?:pending|running):\s+(\d+)", text, re.MULTILINE)]
    cluster.jobs = sum(counts) if counts else None


def _ask_for_limits(scheduler: Scheduler, cluster: Cluster) -> None:
    """The limits of accounting: of the user, the account, the QOS."""
    enforced = cluster.configuration.get("AccountingStorageEnforce", "")
    if not {"limits", "safe", "qos", "all"} & set(enforced.split(",")):
        cluster.unknown.append(
            Finding("info", "limits", f"no limits per user or QOS are enforced (AccountingStorageEnforce={enforced})")
        )
        return
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        table = ("sacctmgr", "--noheader", "--parsable2", "--readonly", "show")
        cluster.qos = {row["Name"]: row for row in _rows(scheduler.ask(*table, "qos", f"format={QOS}"), QOS)}
        default = scheduler.ask(*table, "user", user, "format=DefaultAccount").split()
        cluster.account = default[0] if default else ""
        where = f"cluster={cluster.configuration.get('ClusterName', '')}"
        of_user = scheduler.ask(*table, "association", "where", where, f"user={user}", f"format={ASSOCIATION}")
        cluster.associations = list(_rows(of_user, ASSOCIATION))
        accounts = ",".join(sorted({row["Account"] for row in cluster.associations}))
        if accounts:
            of_accounts = scheduler.ask(*table, "association", "where", where, f"account={accounts}", f"format={ASSOCIATION}")
            cluster.associations += [row for row in _rows(of_accounts, ASSOCIATION) if not row["User"]]
    except (SchedulerError, KeyError) as error:
        cluster.unknown.append(Finding("unknown", "limits", f"limits per user, account and QOS: not known ({error})"))


def _rows(text: str, columns: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        if line.count("|") == columns.count(","):  # not one of a site's wrapper
            yield dict(zip(columns.split(","), line.split("|"), strict=True))


def mem_mib(text: str) -> int:
    """Memory as sbatch and sacctmgr write it (`64G`, without a unit MiB) in MiB."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)", text)
    if match is None:
        return 0
    return math.ceil(float(match[1]) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}[match[2] or "M"])
