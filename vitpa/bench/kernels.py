"""What a step's time goes into: the device's kernels, or on the CPU torch's operations, by torch's profiler."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from vitpa.bench.schema import Kernel

STEPS = 20


def kernels_of(run: Callable[[int], object], device: torch.device, count: int) -> tuple[Kernel, ...]:
    """The `count` kernels that take most of the steps that `run` does, in the order of their shares."""
    on_gpu = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, to its developers
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            run(STEPS)
            if on_gpu:
                torch.cuda.synchronize(device)
        all_of_them = found.key_averages()
    if on_gpu:
        times = [
            (each.key, each.self_device_time_total, each.count) for each in all_of_them if each.device_type.name == "CUDA"
        ]
    else:
        times = [(each.key, each.self_cpu_time_total, each.count) for each in all_of_them]
    whole_us = sum(us for _, us, _ in times) or 1.0
    largest = sorted(times, key=lambda each: -each[1])[:count]
    return tuple(
        Kernel(name=name, share=us / whole_us, us_per_step=us / STEPS, calls_per_step=calls / STEPS)
        for name, us, calls in largest
    )
