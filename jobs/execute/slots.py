"""Slots: how many runs are in training at a time on this machine, whatever the number of submissions and launchers.

A slot is what one run, or group of replicas, occupies: its GPUs (or share of one), or without a GPU some CPUs.

A worker takes a slot before its first run and keeps it until it ends; nothing has to be given back, because a slot whose
holder is dead is free. Every unit of a slot (a GPU, a share of one, a CPU) has a directory
`<root>/slots/<host>/<unit>/` of numbered claims. Profiles used at the same time on one host should agree.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from jobs.errors import SweepError
from jobs.profile import LocalProfile
from vitpa.child_process import run_program
from vitpa.config import Section
from vitpa.records import Holder, ProcessId, RunError, create_exclusive, next_claim, read_record, to_json, utc_now

POLL_S = 1.0


class Slot(Section):
    """What one run occupies. `units` are the names under which it is claimed."""

    units: list[str]
    gpus: list[str]


def slots_of(profile: LocalProfile, device: str, gpus: list[str] | None = None) -> list[Slot]:
    """The slots of this machine, or of one with these GPUs, for runs on `device` (runtime.device).

    Raises:
        SweepError: more slots or GPUs are asked for than there are.
    """
    gpus = [] if device == "cpu" else visible_gpus() if gpus is None else gpus
    if not gpus and device == "cuda":
        raise SweepError("runtime.device=cuda, but no GPU is visible (nvidia-smi lists none); use runtime.device=cpu or auto")
    slots = _gpu_slots(profile, gpus) if gpus else _cpu_slots(profile)
    if profile.slots == "auto":
        return slots
    if gpus and profile.slots > len(slots):
        raise SweepError(
            f"the profile asks for {profile.slots} slots, but {len(gpus)} GPUs give {len(slots)}; see runs_per_gpu"
        )
    return slots[: profile.slots]


def _gpu_slots(profile: LocalProfile, gpus: list[str]) -> list[Slot]:
    if profile.gpus_per_run > len(gpus):
        raise SweepError(f"the profile asks for gpus_per_run={profile.gpus_per_run}, but {len(gpus)} GPUs are visible")
    groups = [gpus[i : i + profile.gpus_per_run] for i in range(0, len(gpus) - profile.gpus_per_run + 1, profile.gpus_per_run)]
    return [
        Slot(units=[f"gpu{gpu}.{share}" for gpu in group], gpus=group)
        for share in range(profile.runs_per_gpu)
        for group in groups
    ]


def _cpu_slots(profile: LocalProfile) -> list[Slot]:
    fitting = max(1, len(os.sched_getaffinity(0)) // profile.cpus_per_slot)
    count = fitting if profile.slots == "auto" else profile.slots
    return [Slot(units=[f"cpu{index}"], gpus=[]) for index in range(count)]


def threads_per_process(profile: LocalProfile, slots: list[Slot]) -> int:
    """CPUs that each training process may use when all slots are busy."""
    if not slots[0].gpus:
        return profile.cpus_per_slot
    return max(1, len(os.sched_getaffinity(0)) // (len(slots) * profile.gpus_per_run))


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    return _ask_nvidia_smi("index")


def gpu_memory_gib() -> float | None:
    """The memory of the smallest GPU of this machine; None if nvidia-smi does not say."""
    sizes = [int(number) for number in _ask_nvidia_smi("memory.total") if number.isdecimal()]  # MiB
    return min(sizes) / 1024 if sizes else None


def _ask_nvidia_smi(what: str) -> list[str]:
    """A fact of each GPU; none where nvidia-smi is not there, or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    answer = run_program(query)
    return answer.stdout.split() if answer.returncode == 0 else []


def take_slot(root: Path, slots: list[Slot], wanted: Callable[[], bool]) -> Slot | None:
    """Wait for a free slot and take it for this process; None once `wanted` says that there is no use for it any more.

    A slot of several units is taken in the order of their names, and held while waiting for the rest: with one order for
    all processes none waits for one that waits for it.
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
        holder = read_record(Holder, record)
    except RunError as error:
        return isinstance(error.__cause__, OSError)  # it cannot be read at the moment: not known to be free
    return holder is not None and holder.process.alive() is not False


def _take_unit(root: Path, unit: str) -> bool:
    directory = root / "slots" / socket.gethostname() / unit
    directory.mkdir(parents=True, exist_ok=True)
    number = next_claim((path.stem for path in directory.glob("*.json")), lambda last: _held(directory / f"{last:06d}.json"))
    record = {"process": ProcessId.mine().model_dump(), "utc": utc_now()}
    return number > 0 and create_exclusive(directory / f"{number:06d}.json", to_json(record))
