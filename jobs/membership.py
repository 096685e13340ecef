"""Runs and sweeps beyond a sweep's own list: what has left the sweep, what other sweeps have too, who shares a job.

A sweep's list is what its file says; its submissions tell what was started for it. Both are looked at before something is
cancelled, so that nothing goes on unseen and nothing is taken from others without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from jobs.grid import KEYS
from jobs.records import Claim, Exit, Intent, RunsOfSweep, SlurmClaim, Start, WantedRun
from jobs.state import RunState
from jobs.sweep import Run, SweepDir
from vitpa.arguments import ConfigError
from vitpa.config_file import load_config
from vitpa.records import RunError, read_record
from vitpa.rundir import RunDir


def runs_that_left(root: Path, sweep: str, runs: Iterable[Run]) -> list[Run]:
    """The unfinished runs that were last started for a sweep, and are not among `runs`, what it stands for now."""
    runs = list(runs)
    seen = {run.signature for run in runs}
    axes = tuple(axis for axis in runs[0].axes if axis in KEYS) if runs else ()  # a label is not in a configuration
    left = []
    for path in sorted(SweepDir(root, sweep).submissions.glob("*/intent.json")):
        for wanted in _wanted(path):
            if wanted.signature in seen:
                continue
            seen.add(wanted.signature)
            run = _started_for(sweep, RunDir(root, wanted.signature), axes)
            if run is not None:
                left.append(run)
    return left


def _wanted(path: Path) -> list[WantedRun]:
    try:
        intent = read_record(Intent, path)
    except RunError:  # `submit` says so
        return []
    return intent.runs if intent else []


def _started_for(sweep: str, directory: RunDir, axes: tuple[str, ...]) -> Run | None:
    """The run of a directory, if it is unfinished and its last attempt is the sweep's; None if it is not, or damaged."""
    try:
        attempts = directory.attempts()
        if not attempts or directory.result_json.exists():
            return None
        claim = read_record(Claim, attempts[-1].claim_json)
        if claim is None or claim.sweep != sweep:
            return None
        config = load_config(directory.config_yaml)
    except (RunError, ConfigError):
        return None
    return Run(config, str(directory.config_yaml), directory.signature, axes)


def sweeps_with(root: Path, signatures: Collection[str], besides: str) -> dict[str, set[str]]:
    """Other sweeps that have one of these runs: their names, each with the signatures."""
    found = {}
    for path in sorted(root.glob("sweeps/*/runs.json")):
        if path.parent.name == besides:
            continue
        try:
            recorded = read_record(RunsOfSweep, path)
        except RunError:  # that sweep's own commands say so
            continue
        theirs = {run.signature for run in recorded.runs} if recorded else set()
        if shared := theirs & set(signatures):
            found[path.parent.name] = shared
    return found


def jobs_needed_by_others(root: Path, states: Iterable[RunState]) -> set[str]:
    """Which of the SLURM jobs of these runs have still a run to train that is none of them: their ids.

    A job that cannot be told because a record has been edited counts as needed: it ends by itself if it is not.
    """
    states = list(states)
    theirs = {state.run.signature for state in states}
    intents: dict[str, Intent | None] = {}
    needed = set()
    for state in states:
        if state.job is None or state.attempt is None:
            continue
        path = state.attempt.claim_json
        try:
            claim = read_record(SlurmClaim, path)
            if claim is None:
                raise RunError(f"{path} is missing")
            if claim.submission not in intents:
                intents[claim.submission] = read_record(Intent, root / claim.submission / "intent.json")
            intent = intents[claim.submission]
            group = intent.signatures(claim.index) if intent else []
            others = [RunDir(root, signature) for signature in group if signature not in theirs]
            if any(_waits_for_job(directory, claim.token, again=state.job.waiting) for directory in others):
                needed.add(state.job.id)
        except RunError:
            needed.add(state.job.id)
    return needed


def _waits_for_job(directory: RunDir, token: str, *, again: bool) -> bool:
    """Whether the last attempt of a run belongs to a submission and is not over, or its job waits to be started `again`."""
    attempts = directory.attempts()
    if not attempts or directory.result_json.exists():
        return False
    claim, start = read_record(SlurmClaim, attempts[-1].claim_json), read_record(Start, attempts[-1].start_json)
    if claim is None or claim.token != token or (start is not None and start.withdrawn is not None):
        return False
    ended = read_record(Exit, attempts[-1].exit_json)
    return ended is None or ended.may_go_on or (again and ended.goes_on_if_started)
