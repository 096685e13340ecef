"""A disk that is full when it is told to be; in a process of its own, whose namespaces are not those of these tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.waiting import run_to_end

PROGRAM = """
import os, sys
from pathlib import Path
from vitpa.room import has_room
from slurm.chaos.disk import PrivateDisk
path = Path(sys.argv[1])
try:
    disk = PrivateDisk(path)
except OSError:
    sys.exit(77)
(path / "record").write_text("x" * 10_000)
assert has_room(path)
disk.fill()
assert not has_room(path)
try:
    (path / "record").write_text("y" * 20_000)
except OSError as error:
    assert error.errno == 28, error
else:
    sys.exit("there was room")
assert (path / "record").stat().st_size <= 12_288
disk.free()
assert has_room(path)
disk.leave()
assert os.listdir(path) == []
"""


def test_a_full_disk_is_full_and_nobody_else_sees_it(tmp_path: Path) -> None:
    done = run_to_end([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    if done.returncode == 77:
        pytest.skip("this machine gives no mount namespaces")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
