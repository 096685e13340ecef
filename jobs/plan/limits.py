"""What a cluster's limits say to a sweep before it is submitted: sbatch's own test, and arithmetic on what SLURM publishes.

What the cluster has and allows comes from scheduler/cluster.py; what cannot be found out is reported as unknown, not guessed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.plan.forecast import Forecast, Group, Kind, Speed, attempts, forecast, group_of, job_kinds, rates_of, speeds_of
from jobs.plan.speeds import Benchmark
from jobs.profile import SlurmProfile
from jobs.report.status import duration
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.cluster import Cluster, Finding, Nodes, ask, mem_mib, seconds_of
from jobs.scheduler.gres import Gres, gpu_count, gpus_by_type
from jobs.scheduler.sbatch import slurm_executor
from jobs.state import RunState
from jobs.submit.submit import Batch, Order
from vitpa.config_file import parse_model

SUBMIT = ("MaxSubmitPU", "MaxSubmitPA", "MaxSubmit", "GrpSubmit")
JOBS = ("MaxJobsPU", "MaxJobsPA", "MaxJobs", "GrpJobs")
TRES = ("MaxTRESPU", "MaxTRESPA", "GrpTRES")
SHORTEST_SIGNAL_S = 30  # a step, a checkpoint on a shared disk and the end of the processes have to fit in
LARGEST_LOSS = 0.25  # of an attempt
UNAVAILABLE = "Requested node configuration is not available"
WAITS = (  # what sbatch says in its test, and does not refuse (job_allocate in SLURM's job_mgr.c)
    *("Requested nodes are busy", "Required node not available", "Requested reservation not usable now"),
    *("Requested reservation is in use", "Requested partition configuration not available now", "Licenses not available"),
)


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


@dataclass(frozen=True)
class Outlook:
    """What lies ahead of a submission."""

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


NOTHING = Outlook(forecast([], {}), [], [])  # to be submitted


def look_ahead(
    order: Order,
    states: Sequence[RunState],
    root: Path,
    name: str,
    scheduler: Scheduler | None,
    *,
    benchmark: Benchmark | None = None,
    gpu_hour_price: float | None = None,
) -> Outlook:
    """What it would cost to submit `order` for the sweep of that name, and what stands in the way.

    Args:
        order: What would be submitted.
        states: Of the sweep's runs; those that have finished say how fast they are.
        root: Folder of runs/ and sweeps/.
        name: Of the sweep.
        scheduler: None: SLURM is not asked.
        benchmark: How fast runs are of which none has finished.
        gpu_hour_price: In any currency.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    batches = by_resources(order.batches)
    runs = [state.run for batch in order.batches for state in batch.chosen]
    speeds = speeds_of(states, runs, root)
    rates, said = (None, []) if benchmark is None else rates_of(order.batches, benchmark, speeds)
    groups = [group_of(same, speeds, rates or {}) for same in batches]
    findings = [Finding("info", "nodes", note) for note in order.notes]
    if order.batches and order.batches[0].how["executor"] == "slurm":
        groups, found = _review(batches, groups, scheduler, root, name) if scheduler else _unasked(batches, groups)
        findings += found
    findings += [Finding("warning", "speeds", text) for text in said]
    findings += [Finding("warning", "measured", text) for text in dict.fromkeys(_measured_otherwise(batches, groups, speeds))]
    unmeasured = {kind[:2] for kind in job_kinds(order.batches).keys() - (rates or {}).keys()} - speeds.keys()
    details = [_details(same, group) for same, group in zip(batches, groups, strict=True)]
    expected = forecast(groups, speeds, unmeasured, rates=rates, gpu_hour_price=gpu_hour_price)
    return Outlook(expected, findings, details)


def _measured_otherwise(
    batches: Sequence[Sequence[Batch]], groups: Sequence[Group], speeds: Mapping[Kind, Speed]
) -> Iterator[str]:
    """Where the measured runs had other hardware than these will have."""
    for same, group in zip(batches, groups, strict=True):
        for kind in sorted({(state.run.dataset, state.run.attention) for batch in same for state in batch.chosen}):
            speed = speeds.get(kind)
            if speed and group.gpus and speed.hardware == "CPU":
                yield f"{' '.join(kind)} was measured on CPUs, these runs have GPUs: expect less time"
            elif speed and group.gpus and abs(speed.gpus - group.gpus_per_run) > 0.1 * group.gpus_per_run:
                measured, have = f"{speed.gpus:.2g}", f"{group.gpus_per_run:.2g}"
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
        findings += _of_signal(_profile_of(same), group)
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
    return {**common, "arrays": len(batches), "time_s": profile.time_s, "attempts": _attempts(profile, group)}


def by_resources(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches with equal resources together: SLURM's limit on arrays may have split them, each with its share of runs."""
    groups: dict[str, list[Batch]] = {}
    for batch in batches:
        resources = {key: value for key, value in batch.how.get("profile", {}).items() if key != "array_parallelism"}
        groups.setdefault(repr(resources), []).append(batch)
    return list(groups.values())


def test_only(scheduler: Scheduler, batches: Sequence[Batch], profile: SlurmProfile, root: Path, name: str) -> Finding:
    """What sbatch says to the script that `submit` would send.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    count = max(len(batch.tasks) for batch in batches)
    exclude = batches[0].how["exclude"]
    folder = root / "sweeps" / name / "submissions" / "plan"
    try:
        executor = slurm_executor(
            profile, folder, root=root, name=name, token="plan", exclude=exclude, indices=list(range(count)), count=count
        )
        if count > 1:
            executor.parameters["map_count"] = count
        script = executor._make_submission_file_text("true", "plan")
    except (ValueError, RuntimeError) as error:
        return Finding("problem", "sbatch", f"submitit does not take the profile: {error}")
    return test_script(scheduler, script)


def test_script(scheduler: Scheduler, script: str) -> Finding:
    """What sbatch says to a script.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            answer = scheduler.test_only(file.name)
        except SchedulerError as error:
            if is_silence(error):
                raise
            words = re.sub(r"sbatch: (error: )?|allocation failure: ", "", str(error))
            return Finding("problem", "sbatch", f"SLURM would refuse it: {words}")
    return Finding("info", "sbatch", re.sub(r"sbatch: Job \d+ to start", "SLURM accepts it; a first run could start", answer))


def only_for_now(answer: Finding, profile: SlurmProfile, cluster: Cluster) -> Finding:
    """sbatch's answer, as a warning where it refuses in its test what it would take and let wait.

    Its test knows no nodes that are down, drained or reserved, and no partition that is down. Jobs wait for them.
    """
    if answer.level != "problem":
        return answer
    waits = any(words in answer.text for words in WAITS) or (profile.reservation and "Invalid time" in answer.text)
    if UNAVAILABLE in answer.text and not waits:
        names = [cluster.partition(name) for name in (profile.partition or "").split(",")] if profile.partition else [None]
        waits = any(_is_out_of_service(profile, cluster.partition(name), cluster) for name in names)
    if not waits:
        return answer
    return Finding("warning", answer.about, answer.text.replace("SLURM would refuse it", "SLURM takes it, but it would wait"))


def _is_out_of_service(profile: SlurmProfile, partition: str, cluster: Cluster) -> bool:
    """Whether a partition has the nodes for a run, but they are, or may be, out of service now."""
    need = Need.of(profile)
    fitting = [kind for kind in cluster.nodes.get(partition, []) if need.fits(kind)]
    if sum(kind.count for kind in fitting) < need.nodes:
        return False
    usable = sum(kind.count for kind in fitting if kind.usable)
    chosen = profile.constraint or profile.nodelist or profile.exclude or profile.reservation
    down = cluster.partitions.get(partition, {}).get("State") == "DOWN"
    return down or usable < need.nodes or bool(chosen and usable < sum(kind.count for kind in fitting))


def is_silence(error: SchedulerError) -> bool:
    """Whether SLURM has not answered, rather than refused."""
    silence = ("not found; is this", "no answer from SLURM", "Unable to contact", "Socket timed out", "Connection refused")
    return any(words in str(error) for words in silence)


# --- arithmetic


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


def limits_of_runs(profile: SlurmProfile, group: Group, cluster: Cluster) -> tuple[list[Finding], list[int | None]]:
    """Findings on runs with equal resources, and bounds on how many of them run at a time."""
    findings = list(_of_signal(profile, group))
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


def _attempts(profile: SlurmProfile, group: Group) -> int | None:
    return None if group.longest_s is None else attempts(group.longest_s, profile.time_s, profile.signal_delay_s)


def _of_signal(profile: SlurmProfile, group: Group) -> Iterator[Finding]:
    """The time limit against the expected run time, and the warning before it."""
    number = _attempts(profile, group)
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
