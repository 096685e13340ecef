"""Every crash point: each change on the disk in a submission, and in claiming, training and finishing a run.

A calm history is run once to count the changes; then once for each of them with a crash before it, and once after it. What
follows is the usual recovery: SLURM starts again what it starts again, and a user submits again. Nothing may be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.simulation.disk import Disk
from tests.support.simulation.processes import Process
from tests.support.simulation.world import BrokenInvariantError, World


@dataclass(frozen=True)
class Point:
    """A change on the disk: by whom, which one of theirs, what it does."""

    number: int
    what: str
    path: str


def _kill(world: World, process: Process) -> None:
    world.tell(f"kill -9 of {process.name}")
    world.park.kill(process)


def _node_down(world: World, process: Process) -> None:
    host = process.host
    if host in world.nodes:
        world.park.at(world.park.now_s, lambda: world.node_down(world.nodes.index(host)))
    else:
        world.park.at(world.park.now_s, lambda: world.login_node_down(world.hosts.index(host)))
    world.park.kill(process)


def _power_loss(world: World, process: Process) -> None:
    world.park.at(world.park.now_s, world.power_loss)
    world.park.kill(process)


def _power_loss_and_submit(world: World, process: Process) -> None:
    """The user submits again before the jobs start that SLURM has by then."""

    def submit() -> None:
        world.command("submit")

    world.park.at(world.park.now_s + 0.1, submit)
    _power_loss(world, process)


CRASHES: dict[str, Callable[[World, Process], None]] = {
    "kill": _kill,
    "node down": _node_down,
    "power loss": _power_loss,
    "power loss and submit": _power_loss_and_submit,
}
WHO: dict[str, Callable[[Process], bool]] = {
    "submit": lambda process: "vitpa sweep submit" in process.name,  # the launcher and its helper
    "job": lambda process: process.name.partition(" of ")[2].endswith("_0") or process.name.endswith("_0"),
    "cancel": lambda process: "vitpa sweep cancel" in process.name,
}
WHO["cancelled job"] = WHO["job"]  # from the end of `cancel` on


def _check_cancelled(world: World) -> None:
    """Raise BrokenInvariantError if `submit` would start a run again that was cancelled; it may be done, or have failed."""
    states = world.states()
    if not {state.state for state in states} <= {"cancelled", "done", "failed"}:
        said = ", ".join(f"{state.run.signature} {state.state} ({state.reason})" for state in states)
        raise BrokenInvariantError("\n".join([f"all was cancelled, and now: {said}", *world.story]))


SEED = 1  # after 6 s one run is in training, and will take a step after the end of `cancel`; the other one waits


@dataclass(frozen=True)
class Stage:
    """A sweep of two runs is submitted and trained, or cancelled meanwhile, and comes to its end; whose changes count."""

    disk: Disk
    name: str

    def run(self, at: Callable[[World, Process, Point, bool], None]) -> None:
        """Run it from its beginning to its end; `at` is called before (False) and after (True) each change."""
        world = World(SEED, self.disk, calm=True)
        number = 0

        def look(process: Process, what: str, path: str, done: bool) -> None:
            nonlocal number
            if WHO[self.name](process) and (self.name != "cancelled job" or world.resting_since_s is not None):
                number += not done
                at(world, process, Point(number, what, path.replace(self.disk.root, "")), done)

        self.disk.faults.watch = look
        try:
            world.command("submit")
            if self.name.startswith("cancel"):
                world.wait(6.0)
                world.command("cancel")
                world.wait(30.0)
            world.rest()
            self.disk.faults.watch = None
            if world.resting_since_s is not None:
                _check_cancelled(world)
            world.finish()
        finally:
            world.close()

    def points(self) -> list[Point]:
        """All its changes."""
        found: list[Point] = []
        self.run(lambda world, process, point, done: None if done else found.append(point))
        return found

    def crash(self, crash: Callable[[World, Process], None], point: Point, after: bool) -> bool:
        """Run it with a crash at a change; whether it has come to that."""
        struck = False

        def strike(world: World, process: Process, found: Point, done: bool) -> None:
            nonlocal struck
            if not struck and (found.number, done) == (point.number, after):
                struck = True
                crash(world, process)

        try:
            self.run(strike)
        except BrokenInvariantError as error:
            where = f"{'after' if after else 'before'} change {point.number} ({point.what} {point.path})"
            raise BrokenInvariantError(f"a crash {where}: {error}") from None
        return struck


def assert_a_cancellation_survives_a_power_loss(disk: Disk) -> None:
    """What `cancel` has said holds, also if the power is lost in the next moment.

    Raises:
        BrokenInvariantError: it does not.
    """
    world = World(0, disk, calm=True)
    try:
        world.command("submit")
        world.park.run(until=lambda: not world.commands)
        assert not world.training, "none is in training"
        world.command("cancel")
        world.park.run(until=lambda: not world.commands)
        world.power_loss()
        world.rest()  # a job that has just begun finds the request
        _check_cancelled(world)
        world.finish()
    finally:
        world.close()
