"""The set-up of a machine where nothing can be installed says what is missing; where all is there it does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.devcluster import PACKAGES
from tests.support.cluster import require_slurm
from tests.support.repository import ROOT

SCRIPT = ROOT / ".system-packages.sh"


def run_script(path: str, python: str = sys.executable, *words: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, str(SCRIPT), python, *words], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def tools(folder: Path, *names: str) -> str:
    for name in names:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return str(folder)


def test_without_apt_the_missing_packages_are_named(tmp_path: Path) -> None:
    answer = run_script(tools(tmp_path, "cat", "id"))
    assert answer.returncode == 1
    assert "missing here: g++ pkg-config libopencv-dev libturbojpeg0-dev" in answer.stderr
    assert 'see "Without root" in README.md' in answer.stderr


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    answer = run_script(os.environ["PATH"], str(old))
    assert answer.returncode == 1
    assert "needs Python 3.11 or newer" in answer.stderr
    assert "Python 3.9.2" in answer.stderr


def test_where_everything_is_there_it_does_nothing() -> None:
    answer = run_script(os.environ["PATH"], sys.executable)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_where_slurm_cannot_be_had_it_says_so_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"  # as it is, it also looks where daemons are in this system
    script.write_text(SCRIPT.read_text().replace("PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin\n", ""))
    bash = shutil.which("bash")
    assert bash
    answer = subprocess.run(
        [bash, str(script), sys.executable, "slurm"],
        env={"PATH": tools(tmp_path, "id")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (0, "", 1)
    assert answer.stderr.startswith("no SLURM here (munged slurmctld slurmd ")
    assert f"to have it: apt-get install {PACKAGES}\n" in answer.stderr


@pytest.mark.slurm
def test_where_slurm_is_there_it_does_nothing() -> None:
    require_slurm()
    answer = run_script(os.environ["PATH"], sys.executable, "slurm")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
