"""What a training takes in energy, by the GPUs' own counters.

NVML, which comes with NVIDIA's driver, counts the energy of a whole GPU since the driver was loaded (Volta and later), but not
that of a part of a GPU (MIG). Without a counter nothing is said.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch

from vitpa.distributed import Group

Counter = Callable[[], float]  # joules since a moment that stays the same
NVML = "libnvidia-ml.so.1"


def gpu_counter(device: torch.device) -> Counter | None:
    """The energy counter of a GPU; None of a CPU, and where there is none."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return None if uuid is None else nvml_counter(f"GPU-{uuid}")


def nvml_counter(uuid: str, nvml: str = NVML) -> Counter | None:
    """The counter of the GPU with that UUID; None where the driver has none."""
    try:
        library = ctypes.CDLL(nvml)
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
        read = library.nvmlDeviceGetTotalEnergyConsumption
    except (OSError, AttributeError):  # no driver, or an old one
        return None

    def joules() -> float:
        return millijoules.value / 1000 if read(handle, ctypes.byref(millijoules)) == 0 else math.nan

    return None if math.isnan(joules()) else joules


class EnergyMeter:
    """The energy that the GPUs of all processes take between two looks."""

    def __init__(self, group: Group, counter: Counter | None) -> None:
        """`counter` is that of this process's GPU."""
        self._group, self._counter = group, counter
        self._before_j = math.nan

    def begin(self) -> None:
        """Count from here on."""
        self._before_j = self._counter() if self._counter is not None else math.nan

    def taken_j(self) -> float | None:
        """Joules since the last look; None if a GPU has no counter, or one was set back. All processes at once."""
        before_j = self._before_j
        self.begin()
        own_j = self._before_j - before_j
        own = torch.tensor([own_j if own_j >= 0 else math.nan], dtype=torch.float64, device=self._group.device)
        total_j = float(self._group.all_reduce_sum(own).item())
        return None if math.isnan(total_j) else total_j
