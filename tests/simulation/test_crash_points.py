"""Every crash point of a submission, a cancellation and a job, by a kill, a node that goes down and a power loss."""

from __future__ import annotations

import pytest

from tests.support.simulation.crash_points import CRASHES, WHO, Stage
from tests.support.simulation.history import simulated_disk

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("crash", list(CRASHES))
@pytest.mark.parametrize("stage", list(WHO))
def test_every_crash_point(stage: str, crash: str) -> None:
    with simulated_disk() as disk:
        of_stage = Stage(disk, stage)
        points = of_stage.points()
        assert {point.what for point in points} >= {"create", "write", "fsync"}
        assert all(of_stage.crash(CRASHES[crash], point, after) for point in points for after in (False, True))
    print(f"{len(points)} changes")
