"""CPU time of a command and of what it starts, for limits that a busy or slow machine keeps."""

from __future__ import annotations

import json
import resource
import time

SLACK = 3
REFERENCE_S = 0.13  # of the processor that `_reference_work` takes where the goals were set: an AMD EPYC, 2 cores, quiet


def cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def assert_within(goal_s: float, cpu_s: float) -> None:
    """Assert that `cpu_s` seconds of the processor are at most SLACK times the goal, on a machine as fast as this one is now.

    A processor's second is worth less where the other half of the core, or another guest of the host, is busy: it is
    measured beside the command, by the same kind of work.
    """
    slower = _reference_s() / REFERENCE_S
    assert cpu_s < SLACK * goal_s * slower, f"{cpu_s:.1f} s, goal {goal_s} s; this machine is {slower:.2f} times slower"


def _reference_s() -> float:
    """The median of several times."""
    taken = []
    for _ in range(5):
        began_s = time.process_time()
        _reference_work()
        taken.append(time.process_time() - began_s)
    return sorted(taken)[2]


def _reference_work() -> None:
    """Write and read JSON, as commands of a large sweep do most of their time."""
    runs = [{"name": f"run{number}", "values": [number / 7] * 20, "tags": {"a": "b" * 10}} for number in range(400)]
    for _ in range(12):
        assert json.loads(json.dumps({"runs": runs}, sort_keys=True, indent=1)) == {"runs": runs}
