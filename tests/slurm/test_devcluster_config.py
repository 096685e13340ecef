"""The records of a development cluster: read within bounds, whatever they hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm.devcluster_config import Layout, Settings
from vitpa.documents import DocumentError


@pytest.mark.parametrize("damage", ["", "[" * 100_000, "[]", '{"moons": 3}', "x" * 10_000])
def test_damaged_settings_are_one_line_with_a_hint(damage: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.settings_json.parent.mkdir()
    with pytest.raises(FileNotFoundError):
        layout.recorded_settings()
    layout.settings_json.write_text(Settings(3).to_json())
    assert layout.recorded_settings() == Settings(3)
    layout.settings_json.write_text(damage)
    with pytest.raises(DocumentError, match=r"settings\.json: .*; stop the cluster and start it again$") as raised:
        layout.recorded_settings()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "pid"), [("", 0), ("123\n", 123), ("hello", 0), ("1" * 10_000, 0), ("\0", 0)])
def test_a_lock_names_a_process_or_none(text: str, pid: int, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.lock.write_text(text)
    assert layout.recorded_pid() == pid
    os.truncate(layout.lock, 1 << 40)
    assert layout.recorded_pid() == 0
