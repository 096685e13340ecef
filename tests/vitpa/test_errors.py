"""Errors of the operating system: where, what, how to fix it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vitpa.errors import HINTS, os_error_line


def test_a_real_one_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "none" / "file").write_text("")
    assert os_error_line(caught.value) == f"{tmp_path}/none/file: No such file or directory"


@pytest.mark.parametrize("number", HINTS)
def test_what_can_be_fixed_says_how(number: int) -> None:
    assert os_error_line(OSError(number, os.strerror(number), "/x")) == f"/x: {os.strerror(number)}; {HINTS[number]}"
    assert os_error_line(OSError(number, os.strerror(number))) == f"{os.strerror(number)}; {HINTS[number]}"


def test_words_of_others_stay_as_they_are() -> None:
    assert os_error_line(OSError("no tail of the file")) == "no tail of the file"
    assert errno.ENOENT not in HINTS
