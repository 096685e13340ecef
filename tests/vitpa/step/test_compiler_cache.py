"""The compiler's folder in /tmp: what another user has put there would be executed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from vitpa.arguments import ConfigError
from vitpa.step.compiler_cache import VARIABLE, check_compiler_cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would put it, in another /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return Path(default_cache_dir())


def test_it_is_made_for_us_alone(folder: Path) -> None:
    for _ in range(2):
        check_compiler_cache()
        assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)  # as torch makes it where groups are private
    check_compiler_cache()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_one_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match=f"^{folder} belongs to user nobody, .* name another folder by {VARIABLE}$"):
        check_compiler_cache()
    monkeypatch.setenv(VARIABLE, str(folder))  # as torch does, when it is imported
    with pytest.raises(ConfigError, match="belongs to user nobody"):
        check_compiler_cache()
    monkeypatch.setenv(VARIABLE, str(folder.with_name("mine")))
    check_compiler_cache()


def test_one_that_anybody_can_write_to_and_a_link_are_refused(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=f"^{folder} can be written to by anybody"):
        check_compiler_cache()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=f"^{folder} is a link"):
        check_compiler_cache()
