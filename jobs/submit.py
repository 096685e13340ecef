"""Submission: which runs are taken, and by whom, written down before and after anything is started.

1. intent.json: the runs wanted, each with the number of its next attempt.
2. Each run is claimed by creating that attempt. If somebody was faster, the claim fails and the run is theirs: the number
   is the one after the last attempt that was looked at, so it cannot be claimed on the strength of an outdated look.
3. A helper in a session of its own starts the jobs (jobs/launch.py) and writes receipt.json. They need no launcher.
4. Each job (jobs/worker.py) takes a slot, works through the claims of its submission, and ends when all are started.

A launcher may be killed anywhere in this. What was not claimed is missing; what was claimed and has nobody left to start it
is `uncertain`. The next submission withdraws such a claim and makes a new one. Withdrawing and starting are the same
exclusive creation (start.json): a job that was only slow to come up, and the withdrawal, cannot both succeed.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.bound import child_environment
from jobs.grid import Run, SweepDir, SweepError
from jobs.profile import Profile, Slot, slots_of, threads_per_process
from jobs.state import RunState, withdraw
from jobs.worker import BOUND
from vitpa.config import (
    AttemptDir,
    ConfigError,
    ProcessId,
    RunConfig,
    RunDir,
    create_exclusive,
    parse_config,
    read_json,
    record_config,
    to_json,
    utc_now,
    write_json,
)


class SubmissionDir:
    """All paths of a submission: `<root>/sweeps/<name>/submissions/<utc>-<token>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.intent_json = path / "intent.json"  # before anything is started
        self.receipt_json = path / "receipt.json"  # after
        self.launch_log = path / "launch.log"
        self.submitit = path / "submitit"  # pickles and output of the jobs


@dataclass(frozen=True)
class Order:
    """What is to be submitted, and where it will run. Nothing has been written yet."""

    chosen: list[RunState]
    configs: list[RunConfig]  # of `chosen`, with the runtime section that they will run with
    slots: list[Slot]
    train_command: list[str]


def training_command(processes: int) -> list[str]:
    """How a run is trained; its config.yaml and overrides are appended."""
    train = [sys.executable, "-m", "vitpa.train"]
    if processes <= 1:
        return train
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--no-python", *BOUND, *train]


def prepare(chosen: list[RunState], profile: Profile, root: Path, overrides: Sequence[str]) -> Order:
    """Everything that can go wrong before something is written: slots, runtime settings, data.

    Raises:
        SweepError: too few GPUs, contradicting devices, or data that has not been prepared.
        ConfigError: a runtime setting that does not exist.
    """
    configs = [_configure(state.run, profile, root, overrides) for state in chosen]
    if not configs:
        return Order([], [], [], [])
    devices = sorted({config.runtime.device for config in configs})
    if len(devices) > 1:
        raise SweepError(f"the recipes ask for different devices ({', '.join(devices)}); add runtime.device={devices[0]}")
    slots = slots_of(profile, devices[0])
    threads = threads_per_process(profile, slots)
    configs = [_with_share(config, threads, profile.runs_per_gpu if slots[0].gpus else 1) for config in configs]
    _check_data(configs)
    return Order(chosen, configs, slots, training_command(len(slots[0].gpus)))


def _configure(run: Run, profile: Profile, root: Path, overrides: Sequence[str]) -> RunConfig:
    document = run.config.model_dump(mode="json")
    document["runtime"].update(profile.runtime)
    config = parse_config(document, run.label, [*overrides, f"runtime.root={json.dumps(str(root))}"])
    assert config.signature == run.signature, "the runtime section must not change the signature"
    data_dir = str(Path(config.runtime.data_dir).resolve())
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"data_dir": data_dir})})


def _with_share(config: RunConfig, threads: int, runs_per_gpu: int) -> RunConfig:
    """`config` with the run's share of the machine, where the user has not fixed it."""
    share: dict[str, int] = {key: threads for key in ("cpu_threads", "workers") if getattr(config.runtime, key) is None}
    share["runs_per_gpu"] = runs_per_gpu
    return config.model_copy(update={"runtime": config.runtime.model_copy(update=share)})


def _check_data(configs: list[RunConfig]) -> None:
    for dataset, data_dir in sorted({(config.dataset, config.runtime.data_dir) for config in configs}):
        for split in ("train", "val"):
            path = Path(data_dir) / dataset / f"{split}.beton"
            if not path.is_file():
                raise SweepError(f"{path}: no such file; run `vitpa prep {dataset}` first, or say where it is with --data-dir")


def submit(sweep: str, order: Order, profile: Profile, root: Path) -> tuple[list[AttemptDir], list[str]]:
    """Claim the runs of `order` for the sweep of that name and start jobs for them.

    Returns:
        The attempts that are ours, and a line for each run whose directory cannot be used.

    Raises:
        SweepError: the jobs could not be started; the claims are taken up by the next submission.
    """
    order, directories, refused = _record_configs(order)
    if not directories:
        return [], refused
    token = secrets.token_hex(4)
    submission = SubmissionDir(SweepDir(root, sweep).submissions / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{token}")
    submission.path.mkdir(parents=True)
    write_json(submission.intent_json, _intent(sweep, order, profile, token))
    claimed = []
    for state, config, directory in zip(order.chosen, order.configs, directories, strict=True):
        claim = {
            "token": token,
            "submission": str(submission.path.relative_to(root)),
            "sweep": sweep,
            "process": ProcessId.mine().model_dump(),
            "runtime": config.model_dump(mode="json")["runtime"],
            "utc": utc_now(),
        }
        attempt = _claim(state, directory, claim)
        if attempt is not None:
            claimed.append(attempt)
    if claimed:
        _start_jobs(submission, root, min(len(order.slots), len(claimed)))
    else:
        create_exclusive(submission.receipt_json, to_json({"jobs": [], "utc": utc_now()}))
    return claimed, refused


def _record_configs(order: Order) -> tuple[Order, list[RunDir], list[str]]:
    """Make the directories of the runs; what is left of `order`, its directories, and a line for each run left out."""
    kept, directories, refused = [], [], []
    for state, config in zip(order.chosen, order.configs, strict=True):
        try:
            directories.append(record_config(config))
            kept.append((state, config))
        except ConfigError as error:
            mend = "restore it, or move the run's directory away"
            refused.append(f"{state.run.label}: {error}" + ("" if mend in str(error) else f"; {mend}"))
    chosen, configs = [state for state, _ in kept], [config for _, config in kept]
    return replace(order, chosen=chosen, configs=configs), directories, refused


def _intent(sweep: str, order: Order, profile: Profile, token: str) -> dict[str, Any]:
    return {
        "token": token,
        "sweep": sweep,
        "executor": profile.executor,
        "host": socket.gethostname(),
        "launcher": ProcessId.mine().model_dump(),
        "utc": utc_now(),
        "slots": [slot.model_dump() for slot in order.slots],
        "train_command": order.train_command,
        "runs": [{"signature": state.run.signature, "attempt": state.attempts + 1} for state in order.chosen],
    }


def _claim(state: RunState, directory: RunDir, claim: dict[str, Any]) -> AttemptDir | None:
    waiting = state.attempt if state.state in ("uncertain", "pending") else None
    if waiting and not withdraw(waiting, "interrupted", "never started: nobody was left to start it"):
        return None  # started after all
    return directory.claim_attempt(state.attempts + 1, claim)


def _start_jobs(submission: SubmissionDir, root: Path, jobs: int) -> None:
    """Start the jobs from a helper that belongs to no terminal, and wait until it has written the receipt."""
    command = [sys.executable, "-m", "jobs.launch", str(root), str(submission.path.relative_to(root)), str(jobs)]
    with submission.launch_log.open("ab") as log:
        helper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=child_environment(), start_new_session=True
        )
    code = helper.wait()
    if code != 0 or read_json(submission.receipt_json) is None:
        raise SweepError(f"the jobs could not be started (exit code {code}): see {submission.launch_log}; then submit again")
