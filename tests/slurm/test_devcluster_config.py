"""The records of a development cluster: read within bounds, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm import devcluster_status
from slurm.devcluster_config import Layout


@pytest.mark.parametrize(
    ("line", "cpus", "gpus"),
    [
        ("127.0.0.1  idle  0/8/0/8  gpu:2  gpu:0", (0, 8), (0, 2)),
        ("127.0.0.1  mixed  3/5/0/8  gpu:2  gpu:(null):1(IDX:0)", (3, 8), (1, 2)),
        ("127.0.0.1  allocated  8/0/0/8  gpu:16(S:0-1)  gpu:16(IDX:0-15)", (8, 8), (16, 16)),
        ("127.0.0.1  down*  0/0/8/8  gpu:a100:2  gpu:a100:0(IDX:N/A)", (0, 8), (0, 2)),
        ("127.0.0.1  idle  0/8/0/8  (null)  gpu:0", (0, 8), (0, 0)),
    ],
)
def test_a_node_is_as_slurm_says(line: str, cpus: tuple[int, int], gpus: tuple[int, int]) -> None:
    node = devcluster_status._node(line)
    assert (node["cpus_used"], node["cpus"]) == cpus
    assert (node["gpus_used"], node["gpus"]) == gpus


@pytest.mark.parametrize(("text", "pid"), [("", 0), ("123\n", 123), ("hello", 0), ("1" * 10_000, 0), ("\0", 0)])
def test_a_lock_names_a_process_or_none(text: str, pid: int, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.lock.write_text(text)
    assert layout.recorded_pid() == pid
    os.truncate(layout.lock, 1 << 40)
    assert layout.recorded_pid() == 0
