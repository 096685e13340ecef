"""Joules of a run: shared by replicas, summed over attempts, absent where a part of them was not counted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.trainings import arguments, config_of
from vitpa.config import RunConfig
from vitpa.config_file import record_config
from vitpa.distributed import Group
from vitpa.energy import nvml_counter
from vitpa.train import train

NVML = """
#include <cstring>
extern "C" int nvmlInit_v2() { return 0; }
extern "C" int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = (void *)0x7f00000000123456;
    return std::strcmp(uuid, "GPU-0123") == 0 ? 0 : 6;
}
extern "C" int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    static unsigned long long total = 20000000000;
    *millijoules = total += 1500;
    return handle == (void *)0x7f00000000123456 ? 0 : 1;
}
"""


class Counter:
    """A counter that has moved by 8 J whenever it is read."""

    def __init__(self, start_j: float) -> None:
        self.first_j = self.last_j = start_j
        self.reads = 0

    def __call__(self) -> float:
        self.last_j += 8.0
        self.reads += 1
        if self.reads == 1:
            self.first_j = self.last_j
        return self.last_j

    @property
    def counted_j(self) -> float:
        return self.last_j - self.first_j


def group() -> Group:
    return Group(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def configs(digits: Path, tmp_path: Path) -> list[RunConfig]:
    small = ["train.global_batch_size=512", "optim.warmup_epochs=0", "runtime.cpu_threads=1", "runtime.step=eager"]
    words = arguments(digits, tmp_path, "train.epochs=2", *small)
    found = [config_of([*words, f"seed={seed}"]) for seed in (0, 1)]
    for config in found:
        record_config(config)
    return found


def paused(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"stop_after_epoch": 1})})


def energies(configs: list[RunConfig]) -> list[float | None]:
    results = [config.run_dir.result() for config in configs]
    return [result.energy_j for result in results if result is not None]


def test_replicas_have_equal_shares_which_attempts_add_to(configs: list[RunConfig]) -> None:
    first, second = Counter(1e9), Counter(50.0)  # another GPU, another zero
    assert not train([paused(config) for config in configs], group(), first)
    assert train(configs, group(), second)
    assert first.counted_j > 0
    assert second.counted_j > 0
    assert energies(configs) == [(first.counted_j + second.counted_j) / 2] * 2


def test_a_run_of_which_a_part_was_not_counted_says_nothing(configs: list[RunConfig]) -> None:
    assert not train([paused(configs[0])], group(), None)
    assert train(configs[:1], group(), Counter(0.0))
    assert energies(configs[:1]) == [None]
    assert "energy_j" not in json.loads(configs[0].run_dir.result_json.read_text())


def test_nvml_is_asked_for_the_gpu_by_its_uuid(tmp_path: Path) -> None:
    (tmp_path / "nvml.cpp").write_text(NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.cpp")], check=True)
    counter = nvml_counter("GPU-0123", str(library))
    assert counter is not None
    assert counter() + 1.5 == pytest.approx(counter())
    assert nvml_counter("GPU-4567", str(library)) is None
    assert nvml_counter("GPU-0123", str(tmp_path / "no driver")) is None
