"""The sweep on the cluster while faults strike: from its submission, by scheduled faults, to the end of the last run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from slurm.chaos.certificate import RESTART
from slurm.chaos.cluster import BreakableCluster
from slurm.chaos.disk import PrivateDisk
from slurm.chaos.faults import BLOWS, MissedError, Scene
from slurm.chaos.schedule import Fault
from slurm.chaos.sweep import ChaosError, Sweep
from slurm.chaos.watch import Life, Strike, outages
from slurm.devcluster_folder import DevClusterError

LOOK_S = 0.25
COUNT_EVERY_S = 1.0  # how many processes train a run
SUBMIT_EVERY_S = 60.0  # as a user's cron job would
ASK_EVERY_S = 15.0  # whether runs are alive, before the first fault
STILL_S = 600.0  # without a new row or attempt after the last fault: what is not done by then is lost


@dataclass
class FaultInjection:
    """The sweep on the cluster under faults, and what was seen of it, in seconds by a clock of its own.

    Attributes:
        faults: In order of time.
        duration_s: How long faults may strike, from `began_s` to `ended_s`, which is earlier if all runs are done.
        strikes: The faults that struck, and the restarts that were measured before them.
        missed: The faults that struck nobody: when, which, why.
        by_command: Submission -> `submit` or `retry`: those that were not the first.
        commands: Those that started runs again: when, verb, exit code.
    """

    cluster: BreakableCluster
    sweep: Sweep
    disk: PrivateDisk | None
    faults: Sequence[Fault]
    duration_s: float
    say: Callable[[str], None]
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
        times = min(3, len(self.lives), max(1, int(self.duration_s / 600)))
        for life in self.lives[:times]:
            victim = next((each for each in self.scene.victims() if self.scene.labels[each.signature] == life.label), None)
            if victim is None:
                continue
            self.scene.requeue(victim)
            self.strikes.append(Strike(self.now_s(), RESTART, (life.label,), ""))
            self._wait(partial(_is_back, life), f"{life.label} does not come back")
        self.say(f"all {len(self.lives)} runs train; faults from now on, for {self.duration_s / 3600:.3g} h")

    def _under_faults(self, threads: ThreadPoolExecutor) -> None:
        faults = list(self.faults)
        futures: list[Future[None]] = []
        again: Future[None] | None = None
        submit_s = self.began_s + SUBMIT_EVERY_S
        while self.now_s() < self.began_s + self.duration_s and not all(life.done_s is not None for life in self.lives):
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
        try:
            blow.after()
        except (MissedError, DevClusterError) as error:  # what it has broken stays so; the others go on
            self._tell(f"{fault.kind}: it has no end ({error})")

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
