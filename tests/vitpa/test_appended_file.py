"""A file that grows on a disk that is full for a while; in a process of its own, which alone sees that disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.private_disk import run_on_private_disk
from vitpa.appended_file import AppendedFile

PROGRAM = """
from vitpa.appended_file import AppendedFile
from vitpa.terminal import printable_output
path = folder / "rows"
lines = [b"%04d %s\\n" % (number, b"x" * 1000) for number in range(40)]
with printable_output():
    for new in (True, False):
        before = path.read_bytes() if path.exists() else b""
        file = AppendedFile(path, new=new)
        for line in lines[:10]:
            file.append(line)
        disk.fill()
        for line in lines[10:20]:
            file.append(line)
            whole = path.read_bytes().removeprefix(before)
            assert whole == b"".join(lines[: len(whole) // len(line)]), "a part of a line"
        assert len(whole) < 20 * len(line), "the disk was not full"
        for act in (file.sync, file.close) if not new else (file.sync,):
            try:
                act()
            except OSError as error:
                assert (error.errno, error.filename) == (28, str(path))
            else:
                sys.exit("there was room")
        disk.free()
        if new:
            for line in lines[20:]:
                file.append(line)
            file.sync()
            assert path.read_bytes() == b"".join(lines)
            file.close()
"""


def test_nothing_is_lost_torn_or_out_of_order(tmp_path: Path) -> None:
    done = run_on_private_disk(PROGRAM, tmp_path)
    warning = f"warning: {tmp_path}/rows: no space left; what is missing is written once there is some\n"
    assert (done.returncode, done.stderr) == (0, 2 * warning)


def test_other_errors_are_raised_and_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    file = AppendedFile(path)
    with pytest.raises(FileExistsError):
        AppendedFile(path, new=True)
    file.append(b"one\n")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.append(b"two\n")
    assert path.read_bytes() == b"one\n"
