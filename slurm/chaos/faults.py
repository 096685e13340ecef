"""The ten kinds of faults, each done for real to a cluster and a sweep that were started for it.

A function for each kind: it says in words what it did, and may last, so each runs in a thread of its own. Only processes of
that cluster are ended, by their pids.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.disk import PrivateDisk
from slurm.chaos.schedule import Fault
from slurm.chaos.sweep import ChaosError, Sweep
from slurm.devcluster_processes import descendants, kill, with_descendants
from vitpa.child_process import run_program

CLIENT_TIMEOUT_S = 20.0
PATIENCE_S = 120.0  # for slurmctld to be back, a node to be up, a job to be started again
POLL_S = 0.5
STARTS_S = 60.0  # until a job with precedence has its node
STOPPED_S = 30.0  # from a wrapper's end until SLURM knows of it
STATES = {"lost", "interrupted", "uncertain", "missing", "failed", "done"}  # of a run that nobody has started again


class MissedError(Exception):
    """A fault that struck nobody: why."""


@dataclass(frozen=True)
class Victim:
    """A run in training, with its processes.

    Attributes:
        job: Its number in SLURM. Of one task of an array it is that of the whole array.
        task: What SLURM's clients call it so that they mean no other task.
    """

    signature: str
    job: str
    task: str
    node: str
    trainers: tuple[int, ...]
    wrapper: int

    @property
    def script(self) -> str:
        """The end of the path of its job's script, which a shell executes."""
        return f"/job{int(self.job):05}/slurm_script"


@dataclass
class Scene:
    """What the faults are done to."""

    cluster: BreakableCluster
    sweep: Sweep
    labels: dict[str, str]  # of the runs, by signature
    disk: PrivateDisk | None
    over: threading.Event = field(default_factory=threading.Event)  # what is broken is mended at once
    submitting: threading.Lock = field(default_factory=threading.Lock)

    def processes(self, words: str) -> list[int]:
        """Those of the cluster that have these words on their command line."""
        found = []
        for pid in descendants([self.cluster.layout.recorded_pid()]):
            with contextlib.suppress(OSError):
                if words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(pid)
        return found

    def victims(self) -> list[Victim]:
        """The runs that train now, in order of their names."""
        found: dict[str, Victim] = {}
        for pid in descendants([self.cluster.layout.recorded_pid()]):
            with contextlib.suppress(OSError, LookupError):  # it has ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                run = re.search(r"/runs/([0-9a-f]{16})/attempts/", words[3] if words[1:3] == ["-m", "vitpa.train"] else "")
                if run:
                    variables = _environment(pid)
                    others = found[run[1]].trainers if run[1] in found else ()
                    place = variables["SLURM_JOB_ID"], _task(variables), variables["SLURMD_NODENAME"]
                    found[run[1]] = Victim(run[1], *place, (*others, pid), _wrapper_of(pid))
        return sorted(found.values(), key=lambda victim: self.labels.get(victim.signature, ""))

    def victim(self, fault: Fault) -> Victim:
        """The run that a fault strikes.

        Raises:
            MissedError: none trains now, or it is too late.
        """
        victims = [] if self.over.is_set() else self.victims()
        if not victims:
            raise MissedError("no run was in training")
        return victims[int(fault.whom * len(victims))]

    def on(self, node: str) -> list[Victim]:
        """The runs that train on a node."""
        return [victim for victim in self.victims() if victim.node == node]

    def ask(self, *command: str, once: bool = False) -> str:
        """What one of SLURM's clients prints, tried again as long as slurmctld may be away.

        With `once` it is not tried again, and taken for done, where slurmctld may have got it and did not answer in time.

        Raises:
            MissedError: it refuses.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = run_program(command, env=self.cluster.environment, timeout_s=CLIENT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                late = True
            else:
                if answer.returncode == 0:
                    return answer.stdout.strip()
                late = "timed out" in answer.stderr
                if not late and "Unable to contact" not in answer.stderr and "Connection" not in answer.stderr:
                    raise MissedError(answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else f"{command} failed")
            if late and once:
                return ""
            if time.monotonic() > deadline:
                raise MissedError("slurmctld did not answer")
            time.sleep(POLL_S)

    def requeue(self, victim: Victim) -> None:
        """Have SLURM end a job and start it again, but no task that has finished meanwhile.

        Raises:
            MissedError: it refuses.
        """
        self.ask("scontrol", "requeue", "Incomplete", victim.task, once=True)

    def wait(self, seconds: float) -> None:
        """Leave broken what is, until everything is over."""
        self.over.wait(seconds)


@dataclass(frozen=True)
class Blow:
    """A fault that is being done: whom it may interrupt, what it is in words, and what is still to be done to end it."""

    victims: Iterable[Victim]
    what: str
    after: Callable[[], None] = lambda: None


def _environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _task(variables: dict[str, str]) -> str:
    """What SLURM's clients call the job with these environment variables."""
    array, number = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array and number else variables["SLURM_JOB_ID"]


def _wrapper_of(trainer: int) -> int:
    """The process of the job that supervises a training: its nearest ancestor that submitit has started."""
    pid = trainer
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise ProcessLookupError


def trainer_killed(scene: Scene, fault: Fault) -> Blow:
    """The training process is killed."""
    victim = scene.victim(fault)
    kill(victim.trainers)
    return Blow([victim], "SIGKILL to its training process")


def wrapper_killed(scene: Scene, fault: Fault) -> Blow:
    """The job's own process is killed."""
    victim = scene.victim(fault)
    kill([victim.wrapper])
    return Blow([victim], "SIGKILL to the job's own process")


def slurmd_killed(scene: Scene, fault: Fault) -> Blow:
    """A node's slurmd is killed alone."""
    node = scene.victim(fault).node
    victims = scene.on(node)
    scene.cluster.kill_slurmd(node)
    return Blow(victims, f"slurmd of {node} away for {fault.lasts_s:.0f} s", lambda: _bring_back(scene, node, fault))


def node_down(scene: Scene, fault: Fault) -> Blow:
    """A node loses its power."""
    node = scene.victim(fault).node
    victims = scene.on(node)
    scene.cluster.kill_node(node)
    return Blow(victims, f"{node} without power for {fault.lasts_s:.0f} s", lambda: _bring_back(scene, node, fault))


def _bring_back(scene: Scene, node: str, fault: Fault) -> None:
    scene.wait(fault.lasts_s)
    scene.cluster.start_slurmd(node)


def requeue(scene: Scene, fault: Fault) -> Blow:
    """SLURM is told to end the job and start it again."""
    victim = scene.victim(fault)
    scene.requeue(victim)
    return Blow([victim], f"scontrol requeue {victim.task}")


def preemption(scene: Scene, fault: Fault) -> Blow:
    """A job with precedence wants the whole node."""
    victim = scene.victim(fault)
    victims, cpus = scene.on(victim.node), scene.cluster.settings.cpus
    options = ["--parsable", "--partition=main", f"--nodelist={victim.node}", f"--cpus-per-task={cpus}", "--output=/dev/null"]
    job = scene.ask("sbatch", *options, "--no-requeue", f"--wrap=exec sleep {fault.lasts_s:.0f}")

    def end() -> None:
        """Where the node fails meanwhile, or another such job has it, this one does not strike others later."""
        deadline = time.monotonic() + fault.lasts_s + STARTS_S
        with contextlib.suppress(MissedError):  # SLURM has forgotten it
            while (
                time.monotonic() < deadline and not scene.over.is_set() and scene.ask("squeue", "--noheader", f"--jobs={job}")
            ):
                scene.wait(2 * POLL_S)
            scene.ask("scancel", job)

    return Blow(victims, f"job {job} of `main` takes {victim.node} for {fault.lasts_s:.0f} s", end)


def time_limit(scene: Scene, fault: Fault) -> Blow:
    """The job's time is nearly up; when SLURM has started it again it has its old limit."""
    victim = scene.victim(fault)
    before = _job(scene, victim.task)
    minutes = int(_seconds(before["RunTime"]) // 60) + 2
    scene.ask("scontrol", "update", f"JobId={victim.task}", f"TimeLimit={minutes}")

    def reset() -> None:
        deadline = time.monotonic() + PATIENCE_S + 60
        while (now := _job(scene, victim.task))["Restarts"] == before["Restarts"] and time.monotonic() < deadline:
            scene.wait(POLL_S)
            if scene.over.is_set() or now["JobState"] not in ("RUNNING", "COMPLETING"):
                break
        scene.ask("scontrol", "update", f"JobId={victim.task}", f"TimeLimit={before['TimeLimit']}")

    return Blow([victim], f"time limit of job {victim.task}: {minutes} minutes", reset)


def _job(scene: Scene, job: str) -> dict[str, str]:
    words = scene.ask("scontrol", "-o", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _seconds(text: str) -> float:
    """SLURM's [days-]hours:minutes:seconds."""
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = map(int, rest.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def controller_restart(scene: Scene, fault: Fault) -> Blow:
    """The controller is away for a while."""
    victims = scene.victims()
    scene.cluster.stop_controller()

    def start() -> None:
        scene.wait(fault.lasts_s)
        scene.cluster.start_controller()

    return Blow(victims, f"slurmctld away for {fault.lasts_s:.0f} s", start)


def launcher_killed(scene: Scene, fault: Fault) -> Blow:
    """A job is killed whole, and the `submit` that is to start its run again is killed, too, with all that it has started."""
    scene.submitting.acquire()
    try:  # now: it may have taken a minute
        victim = scene.victim(fault)
        kill([*scene.processes(victim.script), victim.wrapper])
    except BaseException:
        scene.submitting.release()
        raise

    def submit() -> None:
        try:
            _wait_until_over(scene, victim)
            command = scene.sweep.command("submit")
            null = subprocess.DEVNULL
            launcher = subprocess.Popen(command, env=scene.sweep.environment, stdin=null, stdout=null, stderr=null)
            with launcher:
                time.sleep(fault.lasts_s)
                kill(with_descendants([launcher.pid]))
        finally:
            scene.submitting.release()

    return Blow([victim], f"SIGKILL to its job; to `submit` {fault.lasts_s:.1f} s after its start", submit)


def _wait_until_over(scene: Scene, victim: Victim) -> None:
    """Until the run of a wrapper that was killed is nobody's any more, or goes on by itself."""
    deadline = time.monotonic() + STOPPED_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ChaosError):  # slurmctld is away
            if any(row["signature"] == victim.signature and row["state"] in STATES for row in scene.sweep.rows()):
                return
        scene.wait(2 * POLL_S)


def disk_full(scene: Scene, fault: Fault) -> Blow:
    """No room is left on the disk of the sweep's root."""
    assert scene.disk is not None, "the kind is left out"
    disk = scene.disk
    disk.fill()

    def free() -> None:
        scene.wait(fault.lasts_s)
        disk.free()

    return Blow(scene.victims(), f"no space left for {fault.lasts_s:.0f} s", free)


BLOWS: dict[str, Callable[[Scene, Fault], Blow]] = {
    "trainer killed": trainer_killed,
    "wrapper killed": wrapper_killed,
    "slurmd killed": slurmd_killed,
    "node down": node_down,
    "requeue": requeue,
    "preemption": preemption,
    "time limit": time_limit,
    "controller restart": controller_restart,
    "launcher killed": launcher_killed,
    "disk full": disk_full,
}
