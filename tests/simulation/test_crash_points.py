"""Every crash point of a submission, a cancellation and a job, by a kill and by a power loss."""

from __future__ import annotations

import pytest

from tests.support.simulation.crash_points import CRASHES, WHO, Stage, assert_a_cancellation_survives_a_power_loss
from tests.support.simulation.history import simulated_disk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "crash"),
    [*((stage, crash) for stage in WHO for crash in ("kill", "power loss")), ("submit", "power loss and submit")],
)  # a node that goes down is between a kill and a power loss
def test_every_crash_point(stage: str, crash: str) -> None:
    with simulated_disk() as disk:
        of_stage = Stage(disk, stage)
        points = of_stage.points()
        assert {point.what for point in points} >= {"create", "write", "fsync"}
        both = [(point, after) for point in points for after in (False, True)]
        assert [each for each in both if not of_stage.crash(CRASHES[crash], *each)] == []
    print(f"{len(points)} changes")


def test_what_cancel_has_said_holds_after_a_power_loss() -> None:
    with simulated_disk() as disk:
        assert_a_cancellation_survives_a_power_loss(disk)
