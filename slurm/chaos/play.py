"""A sweep under faults from beginning to end: cluster, sweep, faults, the rest in peace, the same runs undisturbed."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from slurm.chaos.certificate import RESTART, Ending, Observed, checkpoint_cost_s, numbers
from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.disk import PrivateDisk
from slurm.chaos.faults import BLOWS, MissedError, Scene
from slurm.chaos.schedule import KINDS, Fault, schedule
from slurm.chaos.sweep import ChaosError, Sweep, document, values
from slurm.chaos.watch import Life, Strike, outages
from slurm.devcluster import check_host_name, check_programs
from slurm.devcluster_folder import DevClusterError
from vitpa.child_process import run_program

DEVCLUSTER = Path(__file__).parent.parent / "devcluster.yaml"
LOOK_S = 0.25
COUNT_EVERY_S = 1.0  # how many processes train a run
SUBMIT_EVERY_S = 60.0  # as a user's cron job would
ASK_EVERY_S = 15.0  # whether runs are alive, before the first fault
STILL_S = 600.0  # without a new row or attempt after the last fault: what is not done by then is lost
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


Say = Callable[[str], None]


def play(plan: Plan, say: Say) -> dict[str, Any]:
    """Do it; the certificate.

    Raises:
        ChaosError, DevClusterError: it cannot begin.
    """
    check_programs()
    check_host_name(socket.gethostname())
    began_utc = datetime.now(UTC).isoformat(timespec="seconds")
    with _rooms() as room:
        disk, left_out = _disk(room / "disk")
        with contextlib.ExitStack() as stack:
            if disk is not None:
                stack.callback(disk.leave)
            count = len(_sweep(plan, room, "timing", {}).rows("plan"))
            if not 1 <= count <= MAX_RUNS:
                raise ChaosError(
                    f"{count} runs: from 1 to {MAX_RUNS} are possible, each trains on a node of its own; see seed="
                )
            epochs = plan.epochs or _epochs(plan, room, count, say)
            evaluations = {"eval_every_epochs": math.ceil(epochs / EVALUATIONS)}
            sweep = _sweep(plan, room, "disk", evaluations, epochs=epochs)
            # each run has a node of its own, and a node is left over
            with BreakableCluster(room / "slurm", nodes=count + 1, gpus=0, cpus=1) as cluster:
                sweep = Sweep(sweep.words, sweep.root, sweep.profile, sweep.data_dir, _slurm_variables(cluster))
                slurm = run_program(["sinfo", "-V"], env=cluster.environment).stdout.strip()
                acted = _Play(plan, cluster, sweep, disk, tuple(set(KINDS) - set(left_out)), say)
                acted.perform()
            reference = _sweep(plan, room, "reference", evaluations, epochs=epochs)
            say(f"the same {count} runs undisturbed")
            _train_locally(reference, min(count, os.cpu_count() or 1))
            rows = reference.rows()
            endings = [_ending(row["run"], sweep.folder(row["signature"]), reference.folder(row["signature"])) for row in rows]
            parts = [document(path) for path in reference.root.glob("runs/*/attempts/*/seconds.json")]
            if plan.keep is not None:
                shutil.copytree(sweep.root, plan.keep, symlinks=True)
            facts = document(next(iter(reference.root.glob("runs/*/env.json")), Path()))
    return {
        "sweep": " ".join(plan.words),
        "seed": plan.seed,
        "mttf_min": plan.mttf_s / 60,
        "hours": round((acted.ended_s - acted.began_s) / 3600, 3),
        "epochs": epochs,
        **numbers(acted.observed(endings, checkpoint_cost_s(parts, plan.checkpoint_every_s))),
        "left_out": left_out,
        "faults": acted.faults_as_json(),
        "commands": acted.commands_as_json(),
        "began_utc": began_utc,
        "code_version": facts.get("code_version"),
        "machine": {"cpus": os.cpu_count(), "slurm": slurm, "python": platform.python_version()}
        | {"torch": facts.get("versions", {}).get("torch")},
    }


@contextlib.contextmanager
def _rooms() -> Iterator[Path]:
    """A folder with a short path, for the names of unix sockets."""
    with tempfile.TemporaryDirectory(prefix="vitpa-chaos-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _disk(path: Path) -> tuple[PrivateDisk | None, dict[str, str]]:
    """A disk that can be full; where there cannot be one, none, and why that kind of fault is left out."""
    path.mkdir()
    try:
        return PrivateDisk(path), {}
    except OSError as error:
        return None, {"disk full": f"no file system of its own for the sweep ({error.strerror})"}


def _sweep(plan: Plan, room: Path, name: str, runtime: dict[str, Any], epochs: int | None = None) -> Sweep:
    """The sweep with a root of its own: on the cluster below `disk`, else on this machine."""
    always = {"log_every_steps": SAMPLES_EVERY_STEPS, "checkpoint_every_s": plan.checkpoint_every_s, "tensorboard": False}
    shipped = yaml.safe_load(DEVCLUSTER.read_text(encoding="utf-8"))
    runtime = {**shipped["runtime"], **always, **runtime}
    if name == "disk":
        times = {"time": "10-00:00:00", "signal_delay_s": 30, "array_parallelism": None}
        profile = {**shipped, **times, "partition": "low", "runtime": runtime}
    else:
        profile = {"executor": "local", "replicas": 1, "runtime": runtime}
    path = room / f"{name}.yaml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    words = [*plan.words, *([f"train.epochs={epochs}"] if epochs else [])]
    data_dir = None if plan.data_dir is None else Path(os.path.realpath(plan.data_dir))
    return Sweep(words, room / name, path, data_dir)


def _slurm_variables(cluster: BreakableCluster) -> dict[str, str]:
    return {name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")}


def _train_locally(sweep: Sweep, slots: int) -> None:
    profile = yaml.safe_load(sweep.profile.read_text(encoding="utf-8"))
    sweep.profile.write_text(yaml.safe_dump({**profile, "slots": slots}), encoding="utf-8")
    sweep.submit("--wait")


def _epochs(plan: Plan, room: Path, count: int, say: Say) -> int:
    """As many as the fastest run trains in the time under faults, with all runs on this machine at once."""
    sweep = _sweep(plan, room, "timing", {"stop_after_epoch": TIMED_EPOCHS})
    say(f"{count} runs train {TIMED_EPOCHS} epochs, to see how long they take")
    _train_locally(sweep, count)
    speeds: list[float] = []
    for row in sweep.rows():
        life = Life(row["run"], sweep.folder(row["signature"]))
        life.look(0.0)
        if not life.samples:
            raise ChaosError(f"{row['run']} does not train: {row['state']} {row['reason']}")
        speeds.append(life.samples[-1].trained_s / row["epoch"])
    return math.ceil(plan.duration_s / float(min(speeds)))


def _ending(label: str, ours: Path, reference: Path) -> Ending:
    """How a run ended, beside the same run undisturbed."""
    result, other = document(ours / "result.json"), document(reference / "result.json")
    if not other:
        raise ChaosError(f"{label}: the undisturbed run has no result")
    if not result:
        return Ending(label, finished=False)
    ends = [document(path).get("state") for path in ours.glob("attempts/*/exit.json")]
    rows, theirs = values(ours / "metrics.jsonl"), values(reference / "metrics.jsonl")
    twice = len(rows) - len({(row["step"], *sorted(row)) for row in rows})
    doubled = f"{ends.count('done')} attempts finished it" if ends.count("done") > 1 else ""
    doubled = doubled or (f"{twice} rows of metrics.jsonl are there twice" if twice else "")
    measured = ("weights_sha256", "val_top1", "val_top5", "val_loss", "steps")
    unequal = [key for key in measured if result.get(key) != other.get(key)]
    different = ", ".join(unequal) or ("" if rows == theirs else "rows of metrics.jsonl")
    return Ending(label, finished=True, doubled=doubled, different=different)


@dataclass
class _Play:
    """The sweep on the cluster, from its submission to the end of the last run."""

    plan: Plan
    cluster: BreakableCluster
    sweep: Sweep
    disk: PrivateDisk | None
    kinds: tuple[str, ...]
    say: Say
    lives: list[Life] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    missed: list[tuple[float, Fault, str]] = field(default_factory=list)
    by_command: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[float, str, int]] = field(default_factory=list)
    began_s: float = 0.0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self._origin = time.monotonic()
        self._noting = threading.Lock()
        self._counted_s = 0.0
        self._pending: list[Future[None]] = []
        self.scene = Scene(self.cluster, self.sweep, {}, self.disk)

    def now_s(self) -> float:
        """Seconds by the clock of everything that is noted."""
        return time.monotonic() - self._origin

    def perform(self) -> None:
        """Submit, measure a restart, let the faults strike, wait for the end."""
        self.sweep.submit()
        rows = self.sweep.rows()
        self.lives = [Life(row["run"], self.sweep.folder(row["signature"])) for row in rows]
        self.scene.labels.update({row["signature"]: row["run"] for row in rows})
        with ThreadPoolExecutor(max_workers=32) as threads:
            try:
                self._measure_restarts()
                self.began_s = self.now_s()
                self._under_faults(threads)
                self.ended_s = self.now_s()
                self.scene.over.set()
                self._in_peace(threads)
            finally:
                self.scene.over.set()

    def _look(self) -> None:
        now_s = self.now_s()
        for life in self.lives:
            life.look(now_s)
        passed_s = now_s - self._counted_s
        if passed_s > COUNT_EVERY_S:
            self._counted_s = now_s
            labels = {self.scene.labels[each.signature] for each in self.scene.victims() if len(each.trainers) > 1}
            for life in self.lives:
                life.twice_s += passed_s * (life.label in labels)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Look until `condition` holds.

        Raises:
            ChaosError: a run has ended without a result, or nothing has moved for STILL_S.
        """
        looked_s = self.now_s()
        while not condition():
            self._look()
            if self.now_s() > looked_s + ASK_EVERY_S:
                looked_s = self.now_s()
                for row in self.sweep.rows():
                    if row["state"] not in ("running", "pending", "done"):
                        raise ChaosError(f"{what}: {row['run']} is {row['state']}: {row['reason']}")
            if self._still_s() > STILL_S:
                raise ChaosError(f"{what}: nothing has moved for {STILL_S:.0f} s")
            time.sleep(LOOK_S)

    def _still_s(self) -> float:
        """Seconds since anything of a run was new."""
        moments = [each.at_s for life in self.lives for each in life.samples[-1:]]
        moments += [each.at_s for life in self.lives for each in life.starts[-1:]]
        return self.now_s() - max(moments, default=0.0)

    def _measure_restarts(self) -> None:
        """Requeue runs once all train, one after the other: what a restart takes when nothing else happens."""
        self._wait(lambda: all(life.samples or life.done_s is not None for life in self.lives), "the runs do not start")
        times = min(3, len(self.lives), max(1, int(self.plan.duration_s / 600)))
        for life in self.lives[:times]:
            victim = next((each for each in self.scene.victims() if self.scene.labels[each.signature] == life.label), None)
            if victim is None:
                continue
            self.scene.ask("scontrol", "requeue", victim.job)
            self.strikes.append(Strike(self.now_s(), RESTART, (life.label,), ""))
            self._wait(partial(_is_back, life), f"{life.label} does not come back")
        self.say(f"all {len(self.lives)} runs train; faults from now on, for {self.plan.duration_s / 3600:.3g} h")

    def _under_faults(self, threads: ThreadPoolExecutor) -> None:
        plan = self.plan
        faults = schedule(
            plan.seed,
            mean_s=plan.mttf_s / len(self.lives),
            duration_s=plan.duration_s,
            kinds=[k for k in KINDS if k in self.kinds],
        )
        futures: list[Future[None]] = []
        again: Future[None] | None = None
        submit_s = self.began_s + SUBMIT_EVERY_S
        while self.now_s() < self.began_s + plan.duration_s and not all(life.done_s is not None for life in self.lives):
            self._look()
            while faults and self.now_s() >= self.began_s + faults[0].at_s:
                futures.append(threads.submit(self._strike, faults.pop(0)))
            if self.now_s() >= submit_s and (again is None or again.done()):
                again, submit_s = threads.submit(self._submit_again), self.now_s() + SUBMIT_EVERY_S
                futures.append(again)
            for future in [future for future in futures if future.done()]:
                future.result()
                futures.remove(future)
            time.sleep(LOOK_S)
        self._pending = futures

    def _in_peace(self, threads: ThreadPoolExecutor) -> None:
        """Until all runs are done, or nothing moves any more."""
        self.say(f"no more faults; {sum(life.done_s is None for life in self.lives)} runs to end")
        again: Future[None] | None = None
        submit_s = self.now_s()
        while not all(life.done_s is not None for life in self.lives) and self._still_s() < STILL_S:
            self._look()
            if self.now_s() >= submit_s and (again is None or again.done()):
                again, submit_s = threads.submit(self._submit_again), self.now_s() + SUBMIT_EVERY_S
                self._pending.append(again)
            time.sleep(LOOK_S)
        for future in self._pending:
            future.result()

    def _strike(self, fault: Fault) -> None:
        try:
            blow = BLOWS[fault.kind](self.scene, fault)
        except (MissedError, DevClusterError) as error:
            with self._noting:
                self.missed.append((self.now_s(), fault, str(error)))
            self._tell(f"{fault.kind}: struck nobody ({error})")
            return
        labels = tuple(self.scene.labels[victim.signature] for victim in blow.victims)
        with self._noting:
            self.strikes.append(Strike(self.now_s(), fault.kind, labels, blow.what))
        self._tell(f"{fault.kind}: {', '.join(labels) or 'nobody'}: {blow.what}")
        with contextlib.suppress(MissedError):
            blow.after()

    def _submit_again(self) -> None:
        """What a cron job does, and what a person does about failed runs."""
        with self.scene.submitting, contextlib.suppress(ChaosError):
            self._command("submit")
            if any(row["state"] in ("failed", "broken", "cancelled") for row in self.sweep.rows()):
                self._command("retry")

    def _command(self, verb: str) -> None:
        before = set(self.sweep.submissions())
        answer = self.sweep.run(verb)
        new = [each for each in self.sweep.submissions() if each not in before]
        with self._noting:
            self.by_command |= dict.fromkeys(new, verb)
            if "submitted" in answer.stdout:
                self.commands.append((self.now_s(), verb, answer.returncode))
                said = [line for line in answer.stdout.splitlines() if line.startswith("submitted")]
                self._tell(f"{verb} again: {said[0]}")

    def _tell(self, text: str) -> None:
        minutes, seconds = divmod(int(self.now_s() - self.began_s), 60)
        self.say(f"{minutes:>3}:{seconds:02} {text}")

    def observed(self, endings: list[Ending], checkpoint_s: float) -> Observed:
        """All that was seen."""
        return Observed(
            self.began_s,
            self.ended_s,
            self.lives,
            self.strikes,
            endings,
            self.by_command,
            self.plan.checkpoint_every_s,
            checkpoint_s,
        )

    def faults_as_json(self) -> list[dict[str, Any]]:
        """The faults that were tried, in order of time, seconds after the first moment at which they might strike."""
        struck = [(each.at_s, each.kind, list(each.runs), each.what) for each in self.strikes if each.kind != RESTART]
        missed = [(at_s, fault.kind, list[str](), f"struck nobody: {why}") for at_s, fault, why in self.missed]
        keys = ("at_s", "kind", "runs", "what")
        return [
            dict(zip(keys, (round(at_s - self.began_s, 1), *rest), strict=True)) for at_s, *rest in sorted(struck + missed)
        ]

    def commands_as_json(self) -> list[dict[str, Any]]:
        """The commands that started runs again."""
        return [{"at_s": round(at_s - self.began_s, 1), "verb": verb, "exit_code": code} for at_s, verb, code in self.commands]


def _is_back(life: Life) -> bool:
    found = outages(life)
    return life.done_s is not None or (bool(found) and found[-1].lost_s is not None)
