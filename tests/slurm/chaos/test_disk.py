"""A disk that is full when it is told to be; in a process of its own, whose namespaces are not those of these tests."""

from __future__ import annotations

from pathlib import Path

from tests.support.private_disk import run_on_private_disk

PROGRAM = """
import os
from vitpa.room import has_room
path = folder
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
    done = run_on_private_disk(PROGRAM, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
