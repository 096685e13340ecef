"""WHERE runs are executed: a profile's YAML file and the slots it gives on this machine.

A slot is what one run occupies: its GPUs (or share of one), or without a GPU some CPUs. The number of slots bounds how
many runs are in training at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from jobs.grid import SweepError
from vitpa.config import Section, load_model

SHIPPED = Path(__file__).parent.parent / "slurm"


class Profile(Section):
    """A machine: `slurm/local.yaml` explains each key."""

    executor: Literal["local"] = Field("local", description="what starts the jobs")
    slots: int | Literal["auto"] = Field("auto", description="runs at a time; auto: as the GPUs or CPUs allow")
    gpus_per_run: int = Field(1, ge=1, description="GPUs of one run")
    runs_per_gpu: int = Field(1, ge=1, description="small runs that share one GPU")
    cpus_per_slot: int = Field(1, ge=1, description="without a GPU: CPUs of one run")
    runtime: dict[str, Any] = Field({}, description="values of the `runtime` section of every run")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.slots, int) and self.slots < 1:
            raise ValueError(f"slots={self.slots}: at least 1, or auto")
        if self.gpus_per_run > 1 and self.runs_per_gpu > 1:
            raise ValueError(f"gpus_per_run={self.gpus_per_run} and runs_per_gpu={self.runs_per_gpu}: one of them must be 1")
        return self


class Slot(Section):
    """What one run occupies. `units` are the names under which it is claimed."""

    units: list[str]
    gpus: list[str]


def load_profile(spec: str) -> Profile:
    """The profile that `spec` names: a path, or a shipped profile such as `local`.

    Raises:
        SweepError: there is none.
        ConfigError: its file is not valid.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    path = Path(spec) if Path(spec).is_file() else shipped.get(spec)
    if path is None:
        raise SweepError(f"profile {spec!r}: no such file, and none of the shipped ones ({', '.join(shipped)})")
    return load_model(Profile, path)


def slots_of(profile: Profile, device: str) -> list[Slot]:
    """The slots of this machine, for runs on `device` (runtime.device).

    Raises:
        SweepError: more slots or GPUs are asked for than there are.
    """
    gpus = [] if device == "cpu" else visible_gpus()
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


def _gpu_slots(profile: Profile, gpus: list[str]) -> list[Slot]:
    if profile.gpus_per_run > len(gpus):
        raise SweepError(f"the profile asks for gpus_per_run={profile.gpus_per_run}, but {len(gpus)} GPUs are visible")
    groups = [gpus[i : i + profile.gpus_per_run] for i in range(0, len(gpus) - profile.gpus_per_run + 1, profile.gpus_per_run)]
    return [
        Slot(units=[f"gpu{gpu}.{share}" for gpu in group], gpus=group)
        for share in range(profile.runs_per_gpu)
        for group in groups
    ]


def _cpu_slots(profile: Profile) -> list[Slot]:
    fitting = max(1, len(os.sched_getaffinity(0)) // profile.cpus_per_slot)
    count = fitting if profile.slots == "auto" else profile.slots
    return [Slot(units=[f"cpu{index}"], gpus=[]) for index in range(count)]


def threads_per_process(profile: Profile, slots: list[Slot]) -> int:
    """CPUs that each training process may use when all slots are busy."""
    if not slots[0].gpus:
        return profile.cpus_per_slot
    return max(1, len(os.sched_getaffinity(0)) // (len(slots) * profile.gpus_per_run))


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []
