"""Submission: which runs are taken, and by whom, written down before and after anything is started.

1. intent.json: the runs wanted, each with the number of its next attempt.
2. Each run is claimed by creating that attempt. If another process was faster, the claim fails and that one has the run: the
   number follows the last attempt that was seen, so that nothing is claimed for what was seen too long ago.
3. A helper in a session of its own starts the jobs (jobs/submit/launch.py) and writes receipt.json. They need no launcher.
4. Each job works for its submission: on this machine it takes a slot and works through the claims (jobs/execute/local.py), in
   SLURM it is a task of an array and trains the runs of its index (jobs/execute/slurm.py).

Runs that train together (jobs/groups.py) are one task of the submission; each of them is claimed by itself.

A launcher may be killed anywhere in this; jobs/submit/submission.py settles what it has left. What was not claimed is missing;
what was claimed and has nobody left to start it is `uncertain`. The next submission withdraws such a claim and makes a new
one. Withdrawing and starting are the same exclusive creation (start.json): a job that was only slow to come up, and the
withdrawal, cannot both succeed.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import SweepError
from jobs.execute import bad_nodes
from jobs.execute.attempt import training_command
from jobs.execute.bad_nodes import BadNode
from jobs.execute.slots import gpu_memory_gib, slots_of, threads_per_process
from jobs.groups import ASSUMED_GPU_MEMORY_GIB, group_runs, most_replicas, notes_on_steps
from jobs.profile import LocalProfile, Profile, SlurmProfile
from jobs.records import Place
from jobs.scheduler.client import Scheduler, scheduler_environment
from jobs.scheduler.job_output import ENDED_EARLY
from jobs.state import RunState, withdraw
from jobs.submit.submission import WRITERS, SubmissionDir, adopt, check_root, close
from jobs.sweep import Run, SweepDir
from vitpa.arguments import ConfigError, literal_path
from vitpa.child_process import child_environment
from vitpa.code_version import code_version
from vitpa.config import RunConfig
from vitpa.config_file import Override, parse_config, record_config
from vitpa.datasets import DATASETS
from vitpa.documents import append_regular, lines_at_end, to_yaml
from vitpa.records import ProcessId, make_folders, utc_now, write_json
from vitpa.rundir import AttemptDir, RunDir

NEVER_STARTED = "never started: nobody was left to start it"


class RefusedError(SweepError):
    """SLURM said no: one line with its own words."""


@dataclass(frozen=True)
class Batch:
    """Runs that make one submission. Nothing has been written yet."""

    chosen: list[RunState]
    configs: list[RunConfig]  # of `chosen`, with the runtime section that they will run with
    tasks: list[list[int]]  # those that train together, as indices into `chosen`
    how: dict[str, Any]  # what the intent says about how and where they are to run; with the key `executor`


@dataclass(frozen=True)
class SubmissionPlan:
    """What is to be submitted, and where it will run."""

    batches: list[Batch]
    at_a_time: int | None  # tasks; None: as many as SLURM gives
    notes: list[str] = field(default_factory=list)  # what the user should know
    place: Place = field(default_factory=Place)  # as the user has said it, for the next time

    @property
    def groups(self) -> list[list[RunState]]:
        """The runs, those that train together together."""
        return [[batch.chosen[index] for index in task] for batch in self.batches for task in batch.tasks]

    @property
    def jobs(self) -> str:
        """How many jobs the runs make, and how many at a time, to be said after their number."""
        grouped = any(len(group) > 1 for group in self.groups)
        count = len(self.groups)
        made = f" in {count} job{'s' if count > 1 else ''}" if grouped else ""
        return made + (f", {self.at_a_time} at a time" if self.at_a_time else "")


def prepare(
    chosen: list[RunState],
    profile: Profile,
    root: Path,
    overrides: Sequence[Override],
    scheduler: Scheduler | None,
    *,
    gpus: list[str] | None = None,
) -> SubmissionPlan:
    """Who trains where, and what can go wrong before something is written: slots, limits, runtime settings.

    Args:
        chosen: The runs.
        profile: Where they run.
        root: Folder of runs/ and sweeps/.
        overrides: Runtime settings.
        scheduler: None: SLURM is not asked, its arrays are taken to be as large as they need to be.
        gpus: The GPUs that this machine is taken to have.

    Raises:
        SweepError: too few GPUs, contradicting devices, a root that jobs cannot use, or SLURM does not answer.
        ConfigError: a runtime setting that does not exist.
    """
    if not chosen:
        return SubmissionPlan([], 0)
    check_root(root, profile.executor)
    if isinstance(profile, LocalProfile):
        return _prepare_local(chosen, profile, root, overrides, gpus)
    return _prepare_slurm(chosen, profile, root, overrides, scheduler)


def _prepare_local(
    chosen: list[RunState], profile: LocalProfile, root: Path, overrides: Sequence[Override], gpus: list[str] | None
) -> SubmissionPlan:
    configs = [_configure(state.run, profile.runtime, root, overrides) for state in chosen]
    for override in overrides:
        if override.key == "runtime.runs_per_gpu":
            raise SweepError(f"{override.text}: on this machine it is runs_per_gpu in the profile")
    devices = sorted({config.runtime.device for config in configs})
    if len(devices) > 1:
        raise SweepError(f"the recipes ask for different devices ({', '.join(devices)}); add runtime.device={devices[0]}")
    slots = slots_of(profile, devices[0], gpus)
    threads = threads_per_process(profile, slots)
    configs = [_with_share(config, threads, profile.runs_per_gpu if slots[0].gpus else 1) for config in configs]
    how = {
        "executor": "local",
        "slots": [slot.model_dump() for slot in slots],
        "train_command": training_command(len(slots[0].gpus)),
    }
    memory_gib = (gpu_memory_gib() or ASSUMED_GPU_MEMORY_GIB) if slots[0].gpus else None
    for_each_slot = math.ceil(len(chosen) / len(slots))  # replicas beyond that would leave a slot idle

    def most(config: RunConfig, runs: int) -> int:
        fitting = most_replicas(config, runs, profile.replicas, processes=len(slots[0].gpus), gpu_memory_gib=memory_gib)
        return min(fitting, for_each_slot) if profile.replicas == "auto" else fitting

    groups = group_runs(configs, most)
    return SubmissionPlan([Batch(chosen, configs, groups, how)], len(slots), notes_on_steps(configs, groups, most))


def _prepare_slurm(
    chosen: list[RunState], profile: SlurmProfile, root: Path, overrides: Sequence[Override], scheduler: Scheduler | None
) -> SubmissionPlan:
    """Runs with equal resources make an array, or several where SLURM limits their size; a group of them is a task."""
    limit = len(chosen) if scheduler is None else scheduler.max_array_tasks()
    cluster: dict[str, str] = {} if scheduler is None else _cluster_of(scheduler)
    failed: list[BadNode] = []
    if scheduler is not None and profile.exclude_failed_nodes:
        failed = bad_nodes.failed(root, cluster["cluster"], scheduler)
    notes = [f"leaving out {node.name}: {node.reason} (to use it again: {node.again})" for node in failed]
    by_dataset = {dataset: profile.for_dataset(dataset) for dataset in {state.run.dataset for state in chosen}}
    same_resources: dict[str, list[RunState]] = {}
    for state in chosen:
        same_resources.setdefault(by_dataset[state.run.dataset].model_dump_json(), []).append(state)
    parts = []
    for states in same_resources.values():
        resources = by_dataset[states[0].run.dataset]
        if scheduler is not None and resources.nodelist and failed:
            _check_nodelist(resources.nodelist, failed, scheduler)
        configs = [_configure(state.run, resources.runtime, root, overrides) for state in states]
        most = partial(_most_in_a_job, resources)
        groups = group_runs(configs, most)
        notes += notes_on_steps(configs, groups, most)
        for first in range(0, len(groups), limit):
            parts.append((resources, states, configs, groups[first : first + limit]))
    _check_per_dataset(profile, [config for _, _, configs, _ in parts for config in configs])
    at_a_time = shares(profile.array_parallelism, [len(groups) for *_, groups in parts])
    batches = []
    for (resources, states, configs, groups), share in zip(parts, at_a_time, strict=True):
        how = {
            "executor": "slurm",
            "profile": resources.model_copy(update={"array_parallelism": share}).model_dump(mode="json"),
            "processes_per_node": resources.processes,
            "cpus_per_node": resources.cpus_per_node,
            "train_command": training_command(resources.processes),  # on one node; several are brought together by the job
            "exclude": [node.name for node in failed],
            **cluster,
        }
        batches.append(_part(Batch(states, configs, groups, how), [index for group in groups for index in group]))
    together = sum(filter(None, at_a_time)) or None
    if together is not None and together > (profile.array_parallelism or 0):
        notes.append(
            f"array_parallelism={profile.array_parallelism}, but {len(parts)} arrays are needed, each with a job at a time"
        )
    return SubmissionPlan(batches, together, notes)


def _check_nodelist(nodelist: str, failed: Sequence[BadNode], scheduler: Scheduler) -> None:
    """Refuse a list with nodes that are left out: a job gets all the nodes of its list, or none."""
    wanted = scheduler.hostnames(nodelist)
    bad = [node for node in failed if node.name in wanted]
    if bad:
        said = "; ".join(f"{node.name} {node.reason} ({node.utc})" for node in bad)
        again = "; ".join(node.again for node in bad)
        raise SweepError(f"the profile's nodelist={nodelist}: {said}; name other nodes, or, to use it again: {again}")


def _check_per_dataset(profile: SlurmProfile, configs: Sequence[RunConfig]) -> None:
    """Refuse values for a data set that there is not: not in the sweep, not among vitpa's, not in the data folder."""
    known = DATASETS.keys() | {config.dataset for config in configs}
    for folder in {config.runtime.data_path for config in configs}:
        known |= {path.parent.name for path in folder.glob("*/train.beton")}
    for dataset in profile.per_dataset.keys() - known:
        raise SweepError(f"the profile's per_dataset.{dataset}: no such data set; there is {', '.join(sorted(known))}")


def _cluster_of(scheduler: Scheduler) -> dict[str, str]:
    """Which cluster gets the jobs, as claims and intents name it: whoever asks another one about them learns nothing."""
    found = {"cluster": scheduler.cluster()}
    if conf := scheduler.environment.get("SLURM_CONF"):
        found["slurm_conf"] = str(Path(conf).absolute())
    return found


def _most_in_a_job(resources: SlurmProfile, config: RunConfig, runs: int) -> int:
    memory_gib = (resources.gpu_memory_gib or ASSUMED_GPU_MEMORY_GIB) if resources.gpus_per_node else None
    processes = resources.nodes * resources.processes
    return most_replicas(config, runs, resources.replicas, processes=processes, gpu_memory_gib=memory_gib)


def _part(batch: Batch, kept: Sequence[int]) -> Batch:
    """`batch` with the runs of these indices only, in this order, and the tasks that they then make."""
    place = {index: position for position, index in enumerate(kept)}
    tasks = [[place[index] for index in task if index in place] for task in batch.tasks]
    chosen, configs = [batch.chosen[index] for index in kept], [batch.configs[index] for index in kept]
    return replace(batch, chosen=chosen, configs=configs, tasks=[task for task in tasks if task])


def shares(limit: int | None, sizes: Sequence[int]) -> list[int | None]:
    """Tasks at a time of arrays of these sizes, so that all have `limit` together; each needs at least one."""
    if limit is None:
        return [None] * len(sizes)
    given = [1] * len(sizes)
    for _ in range(limit - len(sizes)):
        given[max(range(len(sizes)), key=lambda index: sizes[index] / given[index])] += 1
    return list(given)


def _configure(run: Run, runtime: dict[str, Any], root: Path, overrides: Sequence[Override]) -> RunConfig:
    document = run.config.model_dump(mode="json")
    of_profile = [Override(f"runtime.{key}", value, "the profile") for key, value in runtime.items()]
    ours = [Override("runtime.root", literal_path(root), "--root")]
    if run.stop_after_epoch is not None:
        ours.append(Override("runtime.stop_after_epoch", run.stop_after_epoch, "search.halving"))
    config = parse_config(document, run.label, [*of_profile, *overrides, *ours])
    assert config.signature == run.signature, "the runtime section must not change the signature"
    data_dir = literal_path(Path(os.path.realpath(config.runtime.data_path)))
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"data_dir": data_dir})})


def _with_share(config: RunConfig, threads: int, runs_per_gpu: int) -> RunConfig:
    """`config` with the run's share of the machine, where the user has not fixed it."""
    share: dict[str, int] = {key: threads for key in ("cpu_threads", "workers") if getattr(config.runtime, key) is None}
    share["runs_per_gpu"] = runs_per_gpu
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=share)})


def check_data(plan: SubmissionPlan) -> None:
    """Refuse what has no data.

    Raises:
        SweepError: data sets have not been prepared.
    """
    configs = [config for batch in plan.batches for config in batch.configs]
    absent: dict[str, Path] = {}
    for dataset, data_dir in sorted({(config.dataset, config.runtime.data_path) for config in configs}):
        for split in ("train", "val"):
            path = data_dir / dataset / f"{split}.beton"
            if not path.is_file():
                absent.setdefault(dataset, path)
    if absent:
        paths = ", ".join(map(str, absent.values()))
        commands = ", ".join(f"`vitpa prep {dataset}`" for dataset in absent)
        what, it = ("file", "it is") if len(absent) == 1 else ("files", "they are")
        raise SweepError(f"{paths}: no such {what}; run {commands} first, or say where {it} with --data-dir")


def submit(
    sweep: str, plan: SubmissionPlan, root: Path, scheduler: Scheduler, code: Path | None = None
) -> tuple[list[AttemptDir], dict[str, str]]:
    """Claim the runs of `plan` for the sweep of that name and start jobs for them, from the code in `code` if given.

    Returns:
        The attempts that are ours, and for each run that cannot be submitted (its label) the reason.

    Raises:
        RefusedError: SLURM does not take any of the runs; nothing of them is left.
        SweepError: the jobs could not be started; the claims are taken up by the next submission.
    """
    claimed: list[AttemptDir] = []
    refused: dict[str, str] = {}
    for batch in plan.batches:
        try:
            ours, reasons = _submit_batch(
                sweep, replace(batch, how={**batch.how, "place": plan.place.model_dump()}), root, scheduler, code
            )
        except RefusedError as error:  # what needs other resources may be taken
            if len(plan.batches) == 1:
                raise
            ours, reasons = [], {state.run.label: str(error) for state in batch.chosen}
        claimed += ours
        refused |= reasons
    return claimed, refused


def _submit_batch(
    sweep: str, batch: Batch, root: Path, scheduler: Scheduler, code: Path | None
) -> tuple[list[AttemptDir], dict[str, str]]:
    batch, directories, refused = _record_configs(batch)
    if not directories:
        return [], refused
    token = secrets.token_hex(4)
    submission = SubmissionDir(SweepDir(root, sweep).submissions / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{token}")
    make_folders(submission.path)
    write_json(submission.intent_json, _intent(sweep, batch, token))
    common: dict[str, Any] = {
        "token": token,
        "executor": batch.how["executor"],
        "submission": str(submission.path.relative_to(root)),
        "sweep": sweep,
        "process": ProcessId.mine().model_dump(),
        "utc": utc_now(),
        **{key: batch.how[key] for key in ("cluster", "slurm_conf") if key in batch.how},
    }

    task_of = {index: task for task, indices in enumerate(batch.tasks) for index in indices}

    def claim(index: int) -> AttemptDir | None:
        config = to_yaml(batch.configs[index].model_dump(mode="json"))
        return _claim(batch.chosen[index], directories[index], {**common, "index": task_of[index]}, config)

    with ThreadPoolExecutor(WRITERS) as pool:
        attempts = list(pool.map(claim, range(len(directories))))
    tasks = sorted({task_of[index] for index, attempt in enumerate(attempts) if attempt is not None})
    if not tasks:
        close(submission, "nothing_claimed")
        return [], refused
    exit_code = _run_helper(submission, root, tasks, code)
    if not submission.receipt_json.exists():
        reason = _why_not_started(submission, exit_code)
        if batch.how["executor"] == "local":
            raise SweepError(f"{reason}; then submit again")
        if not adopt(root, submission, token, scheduler):  # SLURM has nothing of ours: the runs are free again
            for attempt in filter(None, attempts):
                withdraw(attempt, "interrupted", reason)
            close(submission, "refused")
            raise RefusedError(reason)
    return [attempt for attempt in attempts if attempt is not None], refused


def _record_configs(batch: Batch) -> tuple[Batch, list[RunDir], dict[str, str]]:
    """Make the directories of the runs; what is left of `batch`, its directories, and why the others are left out."""

    def record(config: RunConfig) -> RunDir | ConfigError:
        try:
            return record_config(config)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(WRITERS) as pool:
        answers = list(pool.map(record, batch.configs))
    kept, directories, refused = [], [], {}
    for index, answer in enumerate(answers):
        if isinstance(answer, RunDir):
            directories.append(answer)
            kept.append(index)
        else:
            hint = "restore it, or move the run's directory away"
            refused[batch.chosen[index].run.label] = str(answer) + ("" if hint in str(answer) else f"; {hint}")
    return _part(batch, kept), directories, refused


def _intent(sweep: str, batch: Batch, token: str) -> dict[str, Any]:
    return {
        "token": token,
        "sweep": sweep,
        "host": socket.gethostname(),
        "launcher": ProcessId.mine().model_dump(),
        "utc": utc_now(),
        "code_version": code_version(),
        **batch.how,
        "runs": [{"signature": state.run.signature, "attempt": state.attempts + 1} for state in batch.chosen],
        "tasks": batch.tasks,
    }


def _claim(state: RunState, directory: RunDir, claim: dict[str, Any], config: str) -> AttemptDir | None:
    last = state.attempt
    if last is not None and not last.start_json.exists():
        how = state.state if state.state == "failed" else "interrupted"
        withdrawn = withdraw(last, how, state.reason if ENDED_EARLY in state.reason else NEVER_STARTED)
        if not withdrawn:
            return None  # started after all
    return directory.claim_attempt(state.attempts + 1, claim, config)


def _run_helper(submission: SubmissionDir, root: Path, tasks: list[int], code: Path | None) -> int:
    """Start jobs for these tasks from a helper that belongs to no terminal; its exit code. 0: it has written the receipt."""
    command = [
        sys.executable,
        "-m",
        "jobs.submit.launch",
        str(root),
        str(submission.path.relative_to(root)),
        json.dumps(tasks),
    ]
    environment = scheduler_environment(child_environment(code))
    with append_regular(submission.launch_log) as log:
        helper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return helper.wait()


def _why_not_started(submission: SubmissionDir, exit_code: int) -> str:
    """Why the helper could not start the jobs: SLURM's own words, if it has said any."""
    lines = lines_at_end(submission.launch_log)
    said = [re.sub(r"^sbatch: ((error|fatal): )?", "", line) for line in lines if line.startswith("sbatch: ")]
    if said:
        return "SLURM refused the jobs: " + "; ".join(dict.fromkeys(said))
    last = (lines or ["it said nothing"])[-1]
    return f"the jobs could not be started (exit code {exit_code}: {last}): see {submission.launch_log}"
