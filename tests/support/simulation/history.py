"""Which events a history has, and one history for each seed."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.simulation.disk import Disk
from tests.support.simulation.seams import installed
from tests.support.simulation.world import BrokenInvariantError, World

LAST_NUMBER = 2**16 - 1


@dataclass(frozen=True)
class Event:
    """Something that happens; a number of at most LAST_NUMBER says to whom, or how."""

    weight: int
    happens: Callable[[World, int], object]


def _submit(world: World, number: int) -> None:
    words = [(), ("attention=content",), ("seed=0",), ("--update",), ("--force",)][number % 5]
    world.command("submit", *words, host=number // 8 % 2)


def _cancel(world: World, number: int) -> None:
    words = [(), (), ("attention=content",), ("--now",), ("--gone",)][number % 5]
    world.command("cancel", *words, host=number // 8 % 2)


def _retry(world: World, number: int) -> None:
    world.command("retry", *[(), ("--force",), ("state=failed",)][number % 3], host=number // 8 % 2)


EVENTS = {
    "submit": Event(8, _submit),
    "cancel": Event(3, _cancel),
    "retry": Event(3, _retry),
    "status": Event(1, lambda world, number: world.command("status", host=number % 2)),
    "kill command": Event(5, World.kill_command),
    "kill in a job": Event(4, World.kill_in_job),
    "node down": Event(4, World.node_down),
    "login node down": Event(2, World.login_node_down),
    "power loss": Event(3, lambda world, number: world.power_loss()),
    "controller down": Event(2, lambda world, number: world.controller_down((3.0, 20.0, 90.0)[number % 3])),
    "sbatch refused": Event(1, lambda world, number: world.sbatch_fails("refused")),
    "sbatch fails after all": Event(2, lambda world, number: world.sbatch_fails("after")),
    "scancel": Event(2, World.scancel),
    "preemption": Event(4, World.preempt),
    "odd state": Event(2, World.odd_state),
    "queue forgets": Event(2, lambda world, number: world.forget()),
    "ids begin anew": Event(1, lambda world, number: world.ids_begin_anew(number % 2 == 0)),
    "touch stop": Event(2, World.touch_stop),
    "a run fails": Event(2, lambda world, number: world.fails(number // 2, ("it is ill", "CUDA out of memory")[number % 2])),
    "runs work again": Event(1, lambda world, number: world.works_again()),
    "sweep changes": Event(1, lambda world, number: world.change_sweep(1 + number % 3)),
    "result copied": Event(1, World.copy_result),
    "configuration edited": Event(1, World.edit_config),
    "time passes": Event(6, lambda world, number: world.wait(number % 100)),
}
PAUSES_S = (0.0, 0.2, 1.0, 3.0, 3.0, 8.0, 15.0)  # after an event


def new_world(seed: int, disk: Disk, shape: int) -> World:
    """The beginning of a history; `shape` says how many runs, whether two train together, and how long a step takes."""
    seeds, rates = ((1, 1), (1, 2), (2, 1), (1, 3))[shape % 4]
    replicas, step_s = 1 + shape // 4 % 2, (3.0, 3.0, 3.0, 15.0)[shape // 8 % 4]
    return World(seed, disk, seeds=seeds, rates=rates, replicas=replicas, step_s=step_s)


def run_history(seed: int, disk: Disk) -> list[str]:
    """The history of a seed: what has happened in it.

    Raises:
        BrokenInvariantError: something does not hold in it; its events are named.
    """
    choose = random.Random(f"history {seed}")
    world = new_world(seed, disk, choose.randint(0, LAST_NUMBER))
    try:
        EVENTS["submit"].happens(world, 0)
        world.wait(choose.choice((0.0, 2.0, 5.0, 15.0)))
        names, weights = list(EVENTS), [event.weight for event in EVENTS.values()]
        for name in choose.choices(names, weights, k=choose.randint(4, 29)):
            EVENTS[name].happens(world, choose.randint(0, LAST_NUMBER))
            world.wait(choose.choice(PAUSES_S))
        world.finish()
    except BrokenInvariantError as error:
        replay = f"python -m pytest tests/simulation --history {seed}"
        raise BrokenInvariantError(f"history {seed}: {error}\n\nto replay it: {replay}") from None
    finally:
        world.close()
    return world.story


@contextmanager
def simulated_disk() -> Iterator[Disk]:
    """A disk in memory, where there is such a place, with all that is simulated around it."""
    with tempfile.TemporaryDirectory(prefix="vitpa", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        disk = Disk(Path(folder) / "root")
        with installed(disk):
            yield disk
