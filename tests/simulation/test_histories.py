"""Histories of a sweep: users, faults and SLURM in any order. Each seed is one history; hypothesis looks for short ones.

`python -m pytest tests/simulation --histories 20000 -n 2` simulates more, `--history SEED` replays one.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.support.repository import ROOT
from tests.support.simulation.history import EVENTS, LAST_NUMBER, PAUSES_S, new_world, run_history, simulated_disk
from tests.support.simulation.world import World

pytestmark = pytest.mark.slow

PARTS = 8  # of the histories: tests that can run at the same time
STORY = (
    "import sys; from tests.support.simulation.history import *\nwith simulated_disk() as disk: story = run_history(7, disk)\n"
)


@pytest.mark.parametrize("part", range(PARTS))
def test_histories_of_seeds(part: int, pytestconfig: pytest.Config) -> None:
    count, only = pytestconfig.getoption("histories"), pytestconfig.getoption("history")
    seeds = range(part, count, PARTS) if only is None else [only] * (part == 0)
    with simulated_disk() as disk:
        for seed in seeds:
            assert run_history(seed, disk)


class Histories(RuleBasedStateMachine):
    """The same events, chosen by hypothesis, which finds a shortest history in which something does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world: World | None = None

    @initialize(seed=st.integers(0, 2**32 - 1), shape=st.integers(0, LAST_NUMBER))
    def begins(self, seed: int, shape: int) -> None:
        self.world = new_world(seed, self.stack.enter_context(simulated_disk()), shape)
        self.stack.callback(self.world.close)

    @rule(event=st.sampled_from(list(EVENTS)), number=st.integers(0, LAST_NUMBER), pause_s=st.sampled_from(PAUSES_S))
    def happens(self, event: str, number: int, pause_s: float) -> None:
        assert self.world is not None
        EVENTS[event].happens(self.world, number)
        self.world.wait(pause_s)

    def teardown(self) -> None:
        with self.stack:
            if self.world is not None:
                self.world.finish()


def test_histories_of_hypothesis() -> None:
    assert_every_history_holds()


def assert_every_history_holds() -> None:
    """Those that hypothesis makes up; `World.finish` raises where an invariant is broken."""
    run_state_machine_as_test(Histories, settings=settings(stateful_step_count=25))


def test_a_seed_replays_a_history() -> None:
    """In another process, too, whose sets have another order."""
    with simulated_disk() as disk:
        here = run_history(7, disk)
    shown = STORY + "sys.stdout.write('\\n'.join(story))"
    there = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert here == there.splitlines()
    assert len(here) > 10
