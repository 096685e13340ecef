"""The whole experiment: its set-up, a sweep under faults, the same runs undisturbed, and the certificate."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from slurm.chaos.certificate import Observed, checkpoint_cost_s, numbers
from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.comparison import compare
from slurm.chaos.disk import PrivateDisk
from slurm.chaos.fault_injection import FaultInjection
from slurm.chaos.schedule import KINDS, schedule
from slurm.chaos.sweep import ChaosError, Sweep, document
from slurm.chaos.watch import Life
from slurm.devcluster import check_host_name, check_programs
from vitpa.child_process import run_program

DEVCLUSTER = Path(__file__).parent.parent / "devcluster.yaml"
TIMED_EPOCHS = 3
EVALUATIONS = 100  # of a run: training is what is put to the test
MAX_RUNS = 63  # one more node than runs, and a cluster has 64
SAMPLES_EVERY_STEPS = 10


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        words: SWEEP and KEY=VALUE.
        mttf_s: Of a run in training: the mean time between two faults is this by the number of runs.
        epochs: Of every run; None: as many as take `duration_s` undisturbed.
        keep: Where to put the sweep's root afterwards; None: nowhere.
    """

    words: tuple[str, ...]
    seed: int
    mttf_s: float
    duration_s: float
    checkpoint_every_s: float = 60.0
    epochs: int | None = None
    data_dir: Path | None = None
    keep: Path | None = None


def run_experiment(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Do what is planned; the certificate.

    Raises:
        ChaosError, DevClusterError: it cannot begin.
    """
    check_programs()
    check_host_name(socket.gethostname())
    began_utc = datetime.now(UTC).isoformat(timespec="seconds")
    # a short path, for the names of unix sockets
    with (
        tempfile.TemporaryDirectory(prefix="vitpa-chaos-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        room = Path(folder)
        disk, left_out = _disk(room / "disk")
        if disk is not None:
            stack.callback(disk.leave)
        count = len(_local_sweep(plan, room / "timing", {}).rows("plan"))
        if not 1 <= count <= MAX_RUNS:
            raise ChaosError(f"{count} runs: from 1 to {MAX_RUNS} are possible, each trains on a node of its own; see seed=")
        epochs = plan.epochs or _time_epochs(plan, room / "timing", count, say)
        evaluations = {"eval_every_epochs": math.ceil(epochs / EVALUATIONS)}
        sweep = _cluster_sweep(plan, room / "disk", evaluations, epochs)
        kinds = [kind for kind in KINDS if kind not in left_out]
        faults = schedule(plan.seed, mean_s=plan.mttf_s / count, duration_s=plan.duration_s, kinds=kinds)
        # each run has a node of its own, and a node is left over
        with BreakableCluster(room / "slurm", nodes=count + 1, gpus=0, cpus=1) as cluster:
            sweep = replace(sweep, cluster={name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")})
            slurm = run_program(["sinfo", "-V"], env=cluster.environment).stdout.strip()
            injection = FaultInjection(cluster, sweep, disk, faults, plan.duration_s, say)
            injection.perform()
        say(f"the same {count} runs undisturbed")
        slots = min(count, os.cpu_count() or 1)
        undisturbed = _local_sweep(plan, room / "reference", evaluations, epochs, slots)
        undisturbed.submit("--wait")
        seen = _observed(plan, injection, undisturbed)
        if plan.keep is not None:
            shutil.copytree(sweep.root, plan.keep, symlinks=True)
        facts = document(next(iter(undisturbed.root.glob("runs/*/env.json")), Path()))
    return {
        "sweep": " ".join(plan.words),
        "seed": plan.seed,
        "mttf_min": plan.mttf_s / 60,
        "hours": round((seen.ended_s - seen.began_s) / 3600, 3),
        "epochs": epochs,
        **numbers(seen),
        "left_out": left_out,
        "faults": injection.faults_as_json(),
        "commands": injection.commands_as_json(),
        "began_utc": began_utc,
        "code_version": facts.get("code_version"),
        "machine": {"cpus": os.cpu_count(), "slurm": slurm, "python": platform.python_version()}
        | {"torch": facts.get("versions", {}).get("torch")},
    }


def _disk(path: Path) -> tuple[PrivateDisk | None, dict[str, str]]:
    """A disk that can be full; where there cannot be one, none, and why that kind of fault is left out."""
    path.mkdir()
    try:
        return PrivateDisk(path), {}
    except OSError as error:
        return None, {"disk full": f"no file system of its own for the sweep ({error.strerror})"}


def _cluster_sweep(plan: Plan, root: Path, runtime: dict[str, Any], epochs: int) -> Sweep:
    """The sweep on the cluster."""
    times = {"time": "10-00:00:00", "signal_delay_s": 30, "array_parallelism": None}
    return _sweep(plan, root, {**_shipped_profile(), **times, "partition": "low"}, runtime, epochs)


def _local_sweep(
    plan: Plan, root: Path, runtime: dict[str, Any], epochs: int | None = None, slots: int | str = "auto"
) -> Sweep:
    """The sweep on this machine, `slots` runs at a time."""
    return _sweep(plan, root, {"executor": "local", "replicas": 1, "slots": slots}, runtime, epochs)


def _sweep(plan: Plan, root: Path, profile: dict[str, Any], runtime: dict[str, Any], epochs: int | None) -> Sweep:
    """The sweep with a root of its own, and its profile in a file beside that."""
    always = {"log_every_steps": SAMPLES_EVERY_STEPS, "checkpoint_every_s": plan.checkpoint_every_s, "tensorboard": False}
    path = root.with_suffix(".yaml")
    settings = {**_shipped_profile()["runtime"], **always, **runtime}
    path.write_text(yaml.safe_dump({**profile, "runtime": settings}), encoding="utf-8")
    words = [*plan.words, *([f"train.epochs={epochs}"] if epochs else [])]
    data_dir = None if plan.data_dir is None else Path(os.path.realpath(plan.data_dir))
    return Sweep(words, root, path, data_dir)


def _shipped_profile() -> dict[str, Any]:
    profile: dict[str, Any] = yaml.safe_load(DEVCLUSTER.read_text(encoding="utf-8"))
    return profile


def _time_epochs(plan: Plan, root: Path, count: int, say: Callable[[str], None]) -> int:
    """As many as the fastest run trains in the time under faults, with all runs on this machine at once."""
    sweep = _local_sweep(plan, root, {"stop_after_epoch": TIMED_EPOCHS}, slots=count)
    say(f"{count} runs train {TIMED_EPOCHS} epochs, to see how long they take")
    sweep.submit("--wait")
    speeds: list[float] = []
    for row in sweep.rows():
        life = Life(row["run"], sweep.folder(row["signature"]))
        life.look(0.0)
        if not life.samples:
            raise ChaosError(f"{row['run']} does not train: {row['state']} {row['reason']}")
        speeds.append(life.samples[-1].trained_s / row["epoch"])
    return math.ceil(plan.duration_s / float(min(speeds)))


def _observed(plan: Plan, injection: FaultInjection, undisturbed: Sweep) -> Observed:
    """What was seen of the sweep under faults, and how each run ended beside the same run undisturbed."""
    parts = [document(path) for path in undisturbed.root.glob("runs/*/attempts/*/seconds.json")]
    return Observed(
        began_s=injection.began_s,
        ended_s=injection.ended_s,
        lives=injection.lives,
        strikes=injection.strikes,
        endings=[
            compare(row["run"], injection.sweep.folder(row["signature"]), undisturbed.folder(row["signature"]))
            for row in undisturbed.rows()
        ],
        by_command=injection.by_command,
        checkpoint_every_s=plan.checkpoint_every_s,
        checkpoint_s=checkpoint_cost_s(parts, plan.checkpoint_every_s),
    )
