"""What a cluster has and allows against what a sweep's runs ask for: problems, and how many runs go at a time.

sbatch's own test (sbatch_test.py) knows less: SLURM takes jobs above a QOS's MaxWall or MaxTRES, or a partition's MaxTime or
MaxMemPerNode, and never starts them, unless the site has set DenyOnLimit or EnforcePartLimits. What the cluster has and
allows comes from scheduler/cluster.py; what cannot be found out is reported as unknown, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.plan.forecast import Group, attempts
from jobs.profile import SlurmProfile
from jobs.report.status import duration
from jobs.scheduler.cluster import Cluster, Finding, Nodes, mem_mib
from jobs.scheduler.gres import Gres, gpu_count, gpus_by_type
from jobs.scheduler.options import seconds_of

SUBMIT = ("MaxSubmitPU", "MaxSubmitPA", "MaxSubmit", "GrpSubmit")
JOBS = ("MaxJobsPU", "MaxJobsPA", "MaxJobs", "GrpJobs")
TRES = ("MaxTRESPU", "MaxTRESPA", "GrpTRES")
SHORTEST_SIGNAL_S = 30  # a step, a checkpoint on a shared disk and the end of the processes have to fit in
LARGEST_LOSS = 0.25  # of an attempt


@dataclass(frozen=True)
class Need:
    """What one job asks for, in all, and what a node has to have for it."""

    nodes: int
    resources: tuple[Gres, ...]  # per node: GPUs, local scratch
    cpus: int  # per node
    mem_mib: int  # per node; 0: the partition's default
    alone: bool = False  # on its nodes

    @staticmethod
    def of(profile: SlurmProfile) -> Need:
        """What the profile asks for."""
        more, cpus = profile.additional_parameters, profile.cpus_per_node or 1
        mem = mem_mib(profile.mem or "0")
        mem += cpus * mem_mib(str(more.get("mem_per_cpu", "0"))) + gpu_count(profile.resources) * mem_mib(
            str(more.get("mem_per_gpu", "0"))
        )
        return Need(profile.nodes, profile.resources, cpus, mem, alone="exclusive" in more)

    def words(self, mem: str | None) -> str:
        """What a node has to have, for people."""
        asked = [_words_of(each) for each in self.resources if each.count]
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return ", ".join([*asked, cpus, *([f"{mem} of memory"] if mem else [])])

    def fits(self, nodes: Nodes) -> int:
        """How many such shares one of these nodes has room for."""
        rooms = [nodes.cpus // self.cpus, *([1] if self.alone else [])]
        rooms += [nodes.has(each.name, each.type) // each.count for each in self.resources if each.count]
        rooms += [nodes.mem_mib // self.mem_mib] if self.mem_mib else []
        return min(rooms)

    def total(self, kind: str) -> int | None:
        """What a run takes of a trackable resource, as sacctmgr names it; None for one that we do not count."""
        if kind.startswith("gres/"):
            name, _, of_type = kind.removeprefix("gres/").partition(":")
            counts = [each.count for each in self.resources if each.name == name and of_type in ("", each.type)]
            return self.nodes * sum(counts) if counts else None
        return {"node": self.nodes, "cpu": self.nodes * self.cpus, "mem": self.nodes * self.mem_mib}.get(kind)


def _words_of(resource: Gres) -> str:
    if resource.name == "gpu":
        return f"{resource.count} {resource.type + ' ' if resource.type else ''}GPU{'s' if resource.count > 1 else ''}"
    return str(resource)


def limits_of_runs(profile: SlurmProfile, group: Group, cluster: Cluster) -> tuple[list[Finding], list[int | None]]:
    """Findings on runs with equal resources, and bounds on how many of them run at a time."""
    findings = list(signal_findings(profile, group))
    most: list[int | None] = []
    need = Need.of(profile)
    names = [cluster.partition(name) for name in (profile.partition.split(",") if profile.partition else [None])]
    if not all(names):
        known = ", ".join(sorted(cluster.partitions))
        findings.append(Finding("unknown", "partition", f"there is no partition {profile.partition}; partitions: {known}"))
    elif len(names) > 1:
        findings.append(Finding("unknown", "partition", "several partitions: only what sbatch says is known"))
    else:
        fields = cluster.partitions[names[0]]
        findings += _of_partition(profile, need, fields, profile.account or cluster.account)
        found, bound = _of_nodes(profile, need, names[0], cluster)
        findings += found
        most.append(bound)
    for source, row in _limits_of(profile, cluster, [cluster.partitions[name] for name in names if name]):
        for finding, bound in _of_accounting(source, row, cluster, profile=profile, need=need, jobs=len(group.durations_s)):
            findings.append(finding)
            most.append(bound)
    return findings, most


def attempts_needed(profile: SlurmProfile, group: Group) -> int | None:
    """How many attempts of the profile's time the longest run takes; None if its time is not known."""
    return None if group.longest_s is None else attempts(group.longest_s, profile.time_s, profile.signal_delay_s)


def signal_findings(profile: SlurmProfile, group: Group) -> Iterator[Finding]:
    """The time limit against the expected run time, and the warning before it."""
    number = attempts_needed(profile, group)
    if number is not None and number > profile.max_attempts:
        yield Finding(
            "problem",
            "time",
            f"the longest run ({duration(group.longest_s)}) would take {number} attempts of time={profile.time}, and is given "
            f"up after max_attempts={profile.max_attempts}; raise `time` or max_attempts",
        )
    elif number is not None and number > 1:
        yield Finding(
            "info",
            "time",
            f"the longest run ({duration(group.longest_s)}) takes {number} attempts of time={profile.time}, each going on "
            "from the last checkpoint",
        )
    if profile.signal_delay_s < SHORTEST_SIGNAL_S:
        yield Finding(
            "warning",
            "signal_delay_s",
            f"signal_delay_s={profile.signal_delay_s}: a step, a checkpoint and the end of all processes have to fit in; "
            f"{SHORTEST_SIGNAL_S} or more is safe",
        )
    elif profile.signal_delay_s > LARGEST_LOSS * profile.time_s and number != 1:
        share = 100 * profile.signal_delay_s / profile.time_s
        yield Finding(
            "warning",
            "signal_delay_s",
            f"signal_delay_s={profile.signal_delay_s}: the last {share:.0f} % of each attempt are not used; raise `time`",
        )


def _of_accounts(profile: SlurmProfile, fields: Mapping[str, str], account: str) -> Iterator[Finding]:
    """Whether a partition is for these runs' account and QOS: SLURM takes others, and never starts them."""
    for key, own in (("Accounts", account), ("Qos", profile.qos or "")):
        allowed, denied = (fields.get(prefix + key, "") for prefix in ("Allow", "Deny"))
        if own and ((allowed not in ("", "ALL", "N/A") and own not in allowed.split(",")) or own in denied.split(",")):
            what = f"is for {allowed} only" if allowed not in ("", "ALL", "N/A") else "is not for it"
            name, kind = fields["PartitionName"], "account" if key == "Accounts" else "QOS"
            yield Finding(
                "problem", f"Allow{key}", f"{kind} {own}: partition {name} {what}; choose another partition, or {kind}"
            )


def _of_partition(profile: SlurmProfile, need: Need, fields: Mapping[str, str], account: str) -> Iterator[Finding]:
    name = fields["PartitionName"]
    if fields.get("State", "UP") != "UP":
        yield Finding("warning", "partition", f"partition {name} is {fields['State']}: nothing starts there now")
    yield from _of_accounts(profile, fields, account)
    limit_s = seconds_of(fields.get("MaxTime", ""))
    if limit_s is not None and profile.time_s > limit_s:
        yield Finding(
            "problem", "MaxTime", f"time={profile.time} is more than partition {name} allows (MaxTime={fields['MaxTime']}): "
            "it would be refused or wait for ever; a longer run goes on in the next attempt, so a lower `time` will do"
        )  # fmt: skip
    bounds = (
        ("MaxNodes", need.nodes, "nodes"),
        ("MaxCPUsPerNode", need.cpus, "CPUs per node"),
        ("MaxMemPerNode", need.mem_mib, "MiB per node"),
    )
    for key, wanted, unit in bounds:
        text = fields.get(key, "")
        if text.isdecimal() and wanted > int(text):
            yield Finding("problem", key, f"{wanted} {unit}: partition {name} allows {text} ({key})")
    least = fields.get("MinNodes", "")
    if least.isdecimal() and need.nodes < int(least):
        yield Finding("problem", "MinNodes", f"{need.nodes} nodes: partition {name} wants at least {least} (MinNodes)")


def _of_nodes(profile: SlurmProfile, need: Need, partition: str, cluster: Cluster) -> tuple[list[Finding], int | None]:
    """Whether the partition has such nodes, and how many runs they have room for."""
    nodes = cluster.nodes.get(partition, [])
    if not nodes:
        return [Finding("unknown", "nodes", f"nodes of partition {partition}: sinfo shows none")], None
    fitting = [kind for kind in nodes if need.fits(kind)]
    wanted = need.words(profile.mem)
    there = sum(kind.count for kind in fitting)
    if there < need.nodes:
        kinds = "; ".join(dict.fromkeys(_describe(kind) for kind in nodes))
        text = f"{there} nodes of partition {partition} have {wanted}, {need.nodes} are needed; there are: {kinds}"
        return [Finding("problem", "nodes", text)], None
    if profile.constraint or profile.nodelist or profile.reservation:
        text = "jobs at a time: not known, since constraint, nodelist or reservation choose among the nodes"
        return [Finding("unknown", "nodes", text)], None
    usable = [kind for kind in fitting if kind.usable]
    count = sum(kind.count for kind in usable)
    if count < need.nodes:
        which = f"none of the {there}" if not count else f"{count} of the {there}"
        needed = f", {need.nodes} are needed" if count else ""
        verb = "are" if count > 1 else "is"
        text = f"{which} nodes of partition {partition} with {wanted} {verb} in service now{needed}: jobs will wait"
        return [Finding("warning", "nodes", text)], None
    room = sum(kind.count * need.fits(kind) for kind in usable) // need.nodes
    text = f"{count} of {sum(kind.count for kind in nodes)} nodes of partition {partition} are in service and have {wanted}: "
    return [Finding("info", "nodes", f"{text}at most {room} jobs at a time")], room


def _describe(nodes: Nodes) -> str:
    gpus = [f"{number} {kind + ' ' if kind else ''}GPUs" for kind, number in gpus_by_type(nodes.resources).items()]
    others = [str(each) for each in nodes.resources if each.name != "gpu"]
    rest = [*others, f"{nodes.cpus} CPUs", f"{nodes.mem_mib / 1024:.0f}G"]
    return ", ".join([f"{nodes.count} x {', '.join(gpus) or 'no GPU'}", *rest])


def _limits_of(
    profile: SlurmProfile, cluster: Cluster, partitions: Sequence[Mapping[str, str]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of accounting that hold for these runs, each with a name for it."""
    account = profile.account or cluster.account
    rows = [row for row in cluster.associations if row["Account"] == account]
    here = {fields["PartitionName"] for fields in partitions}
    of_user = [row for row in rows if row["User"] and (not row["Partition"] or row["Partition"] in here)]
    names = {profile.qos or next((row["DefaultQOS"] for row in of_user if row["DefaultQOS"]), "")}
    names |= {fields.get("QoS", "N/A") for fields in partitions}
    for row in of_user:
        yield f"your account {account}", row
    for row in rows:
        if not row["User"]:
            yield f"account {account}", row
    for name in sorted(names & cluster.qos.keys()):
        yield f"QOS {name}", cluster.qos[name]


def _of_accounting(
    source: str, row: Mapping[str, str], cluster: Cluster, *, profile: SlurmProfile, need: Need, jobs: int
) -> Iterator[tuple[Finding, int | None]]:
    for key in SUBMIT:
        if row.get(key) and jobs + cluster.own_jobs > int(row[key]):
            queued = f" and {cluster.own_jobs} of yours in the queue" if cluster.own_jobs else ""
            text = f"{source} allows {row[key]} jobs in the queue ({key}), these are {jobs}{queued}: submit a part of them"
            yield Finding("problem", key, f"{text} (a filter such as seed=0)"), None
    for key in JOBS:
        if row.get(key):
            yield Finding("info", key, f"{source} allows {row[key]} jobs at a time ({key})"), int(row[key])
    for key in (*TRES, "MaxTRES", "MaxTRESPerNode"):
        for kind, text in (pair.split("=") for pair in row.get(key, "").split(",") if "=" in pair):
            wanted, limit = need.total(kind), mem_mib(text) if kind == "mem" else int(text)
            if key == "MaxTRESPerNode" and wanted is not None:
                wanted //= need.nodes
            if wanted and wanted > limit:
                yield Finding("problem", key, f"a run takes {kind}={wanted}, {source} allows {kind}={text} ({key})"), None
            elif wanted and key in TRES:
                room = limit // wanted
                yield Finding("info", key, f"{source} allows {kind}={text} ({key}): at most {room} jobs at a time"), room
    limit_s = seconds_of(row.get("MaxWall", ""))
    if limit_s is not None and profile.time_s > limit_s:
        yield Finding("problem", "MaxWall", f"time={profile.time}: {source} allows {row['MaxWall']} (MaxWall)"), None
