"""A model of `python -m vitpa.train`: it keeps the contract of the run directory with the real code, but learns nothing.

Its weights are a hash of the configuration that it has read and of the steps it has taken, so that a result says what made
it. Logs, checkpoints' files, env.json and result.json are written by the code that the trainer has for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.simulation.processes import Process
from vitpa.attempt import check_unedited, record_left
from vitpa.checkpoint import Progress, weights_sha256
from vitpa.checkpoint_file import CheckpointError, files_by_step, read_archive, write_archive
from vitpa.config import RunConfig
from vitpa.config_file import load_config
from vitpa.logs import Logs
from vitpa.records import with_checksum, write_json
from vitpa.replica import Replica
from vitpa.rundir import RunDir

STEP_S = 3.0
KEPT = 2  # checkpoints
BETON_SHA256 = {"train": "0" * 64, "val": "1" * 64}
CODE = "gsimulated"


class Weights:
    """What a model is to a replica."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weights": torch.from_numpy(np.frombuffer(self.digest, np.uint8).copy())}

    def step(self, signature: str, number: int) -> None:
        self.digest = hashlib.sha256(self.digest + f"{signature} {number}".encode()).digest()


def expected_sha256(config: RunConfig) -> str:
    """The hash of the weights that a run of that configuration ends with."""
    weights = Weights(b"\0" * 32)
    for number in range(config.train.epochs):
        weights.step(config.signature, number)
    return weights_sha256(weights.state_dict())


@dataclass
class Watch:
    """What the world wants to know of trainings."""

    begins: Callable[[Process, RunConfig, int], None]
    steps: Callable[[Process, RunConfig, int], None]
    is_done: Callable[[Process, RunConfig], None]
    ends: Callable[[Process, RunConfig], None]


def train(process: Process, paths: Sequence[str], watch: Watch, fails: Callable[[RunConfig], str], step_s: float) -> int:
    """Train the runs of these configuration files together; the exit code."""
    configs = [config for path in paths if (config := _load(Path(path))).run_dir.result() is None]
    if not configs:
        return 0
    with ExitStack() as stack:
        group = _resume(configs)
        for replica in group:
            watch.begins(process, replica.config, replica.progress.step)
            stack.callback(watch.ends, process, replica.config)
        _record_environment(group)
        for replica in group:
            replica.logs = stack.enter_context(
                Logs(
                    replica.run,
                    restored_step=replica.progress.step,
                    restored_rows=replica.rows,
                    not_before_s=0.0,
                    tensorboard=False,
                )
            )
        code = 0
        while group and group[0].progress.step < configs[0].last_epoch:
            process.wait_until(process.park.now_s + step_s)
            for replica in group:
                _step(process, replica, watch)
            failed = [replica for replica in group if fails(replica.config)]
            if failed and len(group) == 1:
                raise RuntimeError(fails(group[0].config))
            code = code or int(bool(failed))
            _drop(process, group, failed, "failed", watch)
            for replica in group:
                _save(replica)
            stopped = _stopped(group)
            if 0 < len(stopped) < len(group):  # all may be meant
                process.wait_until(process.park.now_s + 0.5)
                stopped = _stopped(group)
            if len(stopped) == len(group):
                return code
            _drop(process, group, stopped, "stopped", watch)
        for replica in group:
            if replica.progress.step == replica.config.train.epochs:
                replica.record_result(BETON_SHA256)
                watch.is_done(process, replica.config)
            else:
                replica.record_pause(1)
        return code


def _load(path: Path) -> RunConfig:
    config = load_config(path)
    check_unedited(path, config)
    return config


def _stopped(group: Sequence[Replica]) -> list[Replica]:
    return [replica for replica in group if replica.run.stop.exists()]


def _drop(process: Process, group: list[Replica], leaving: Sequence[Replica], state: str, watch: Watch) -> None:
    """The others of the group go on without these."""
    for replica in leaving:
        group.remove(replica)
        watch.ends(process, replica.config)
        record_left(replica.run, state, f"{state} at step {replica.progress.step}")


def _step(process: Process, replica: Replica, watch: Watch) -> None:
    progress, config = replica.progress, replica.config
    replica.model.step(config.signature, progress.step)
    progress.step += 1
    progress.train_time_s += STEP_S
    progress.val = {"val/top1": 0.5, "val/top5": 0.9, "val/loss": 1.0}
    assert replica.logs is not None
    replica.logs.row(progress.step, progress.step, progress.val)
    watch.steps(process, config, progress.step)


def _save(replica: Replica) -> None:
    assert replica.logs is not None
    replica.logs.flush()
    state = {"progress": replica.progress.model_dump(), "weights": replica.model.digest.hex(), "rows": replica.logs.rows}
    folder, step = replica.run.checkpoints, replica.progress.step
    write_archive(folder, json.dumps(state).encode(), replica.run.signature, step)
    found = files_by_step(folder)
    for other in sorted(each for each in found if each <= step)[:-KEPT] + [each for each in found if each > step]:
        found[other].unlink()


def _resume(configs: Sequence[RunConfig]) -> list[Replica]:
    """The runs that go on together, from their newest common checkpoint; the others leave."""
    found = {config.signature: _checkpoints(config.run_dir) for config in configs}
    common = set.intersection(*(set(each) for each in found.values()))
    first = found[configs[0].signature]
    step = max(common) if common else max(first, default=0)
    group = []
    for config in configs:
        run, states = config.run_dir, found[config.signature]
        if (step not in states) if step else states:
            record_left(run, "apart", f"the others go on from step {step}")
            continue
        replica = Replica(config, run, Weights(b"\0" * 32))
        if step:
            state = states[step]
            replica.progress, replica.rows = Progress(**state["progress"]), state["rows"]
            replica.model = Weights(bytes.fromhex(state["weights"]))
        group.append(replica)
    return group


def _checkpoints(run: RunDir) -> dict[int, dict[str, Any]]:
    """The checkpoints that are as they were written, by their steps; the others are set aside."""
    states = {}
    for step, path in files_by_step(run.checkpoints).items():
        try:
            archive, _ = read_archive(path, run.signature, 1 << 20)
            states[step] = json.loads(archive)
        except CheckpointError:
            path.rename(path.with_name(f"passed_over_{path.name}"))
    return states


def _record_environment(group: Sequence[Replica]) -> None:
    for replica in group:
        if CODE not in replica.progress.code_versions:
            replica.progress.code_versions.append(CODE)
        document = with_checksum(
            {
                "code_version": CODE,
                "beton_sha256": BETON_SHA256,
                "steps_total": replica.config.train.epochs,
                "resumed_at_step": replica.progress.step,
            }
        )
        write_json(replica.run.env_json, document)
        for attempt in replica.run.attempts()[-1:]:
            write_json(attempt.env_json, document)
