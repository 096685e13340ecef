"""Slots: how many runs are in training at a time on a host, whatever the number of submissions and launchers.

A worker takes a slot before its first run and keeps it until it ends; nothing has to be given back, because a slot whose
holder is dead is free. Every unit of a slot (a GPU, a share of one, a CPU) has a directory
`<root>/slots/<host>/<unit>/` of numbered records; the last one names the holder. Whoever finds the holder dead creates the
next number, exclusively: of several exactly one succeeds. Profiles used at the same time on one host should agree.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from jobs.profile import Slot
from vitpa.config import ProcessId, RunError, create_exclusive, read_json, to_json, utc_now

POLL_S = 1.0


def take_slot(root: Path, slots: list[Slot], wanted: Callable[[], bool]) -> Slot | None:
    """Wait for a free slot and take it for this process; None once `wanted` says that there is no use for it any more.

    A slot of several units is taken in the order of their names, and held while waiting for the rest: with one order for
    everybody nobody waits for somebody who waits for him.
    """
    while wanted():
        for slot in slots:
            first, *others = sorted(slot.units)
            if not _take_unit(root, first):
                continue
            for unit in others:
                while not _take_unit(root, unit):
                    if not wanted():
                        return None
                    time.sleep(POLL_S)
            return slot
        time.sleep(POLL_S)
    return None


def _held(record: Path) -> bool:
    """Whether the holder may be alive. A record that does not name one, damaged or edited, holds nothing."""
    try:
        holder = ProcessId.model_validate((read_json(record) or {}).get("process"))
    except RunError as error:
        return isinstance(error.__cause__, OSError)  # it cannot be read at the moment: not known to be free
    except ValidationError:
        return False
    return holder.alive() is not False


def _take_unit(root: Path, unit: str) -> bool:
    directory = root / "slots" / socket.gethostname() / unit
    directory.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(path.stem) for path in directory.glob("*.json") if path.stem.isdecimal())
    last = numbers[-1] if numbers else 0
    if last and _held(directory / f"{last:06d}.json"):
        return False
    record = {"process": ProcessId.mine().model_dump(), "utc": utc_now()}
    return create_exclusive(directory / f"{last + 1:06d}.json", to_json(record))
