"""CPU time of a command and of what it starts, for limits that a busy machine keeps."""

from __future__ import annotations

import resource

SLACK = 3


def cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
