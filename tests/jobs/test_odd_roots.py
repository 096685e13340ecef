"""Folders whose names a shell, or our own reading of paths, would take for something else: from submit to the last hint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import BoundCluster
from tests.support.jobs_sweeps import STAND_IN, Field, make_sweep, slurm_profile
from tests.support.repository import ROOT
from vitpa.arguments import in_shell

NAMES = ["L$y", "~me", "-x", "a b", 'it\'s "so"', "~a $HOME b'c\"d"]
PROGRAM = f"""import sys, jobs.submit.submit
vars(jobs.submit.submit)["training_command"] = lambda processes: {STAND_IN}
from vitpa.cli import main
sys.exit(main(sys.argv[1:]))
"""


def in_a_shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Type a command there, where `vitpa` trains with the stand-in."""
    (folder / "vitpa.py").write_text(PROGRAM)
    script = f'vitpa() {{ PYTHONPATH={ROOT} {sys.executable} -P {folder}/vitpa.py "$@"; }}\n{command}\n'
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_suggested_works(tmp_path: Path, name: str) -> None:
    """The root as the user types it, relative to the folder where he is; the commands as they are printed."""
    make_sweep(tmp_path / name, seeds=1, steps=1)
    (tmp_path / "one.yaml").write_text("slots: 1\nruntime: {device: cpu}\n")
    where = f"--root {in_shell(name)} --data-dir {in_shell(f'{name}/data')} --profile one.yaml"
    done = in_a_shell(tmp_path, f"vitpa sweep submit {in_shell(f'{name}/small.yaml')} {where} --wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert "small: 2 of 2 done" in done.stdout
    suggested = [line.strip() for line in done.stdout.partition("next:\n")[2].splitlines()]
    assert [line.split()[:3] for line in suggested[:2]] == [["vitpa", "sweep", "status"], ["vitpa", "sweep", "collect"]]
    for line in suggested[:2]:
        done = in_a_shell(tmp_path, line)
        assert (done.returncode, done.stderr) == (0, "")
    done = in_a_shell(tmp_path, f"{suggested[2]} --no-serve")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_hints_of_other_verbs_work_too(tmp_path: Path) -> None:
    name = "~a $HOME b'c\"d"
    runs = make_sweep(tmp_path / name, seeds=1, steps=1).runs
    (tmp_path / name / "fail").mkdir()
    for run in runs:
        (tmp_path / name / "fail" / run.signature).touch()
    profile = f"one $PROFILE{name}.yaml"
    (tmp_path / profile).write_text("slots: 1\nruntime: {device: cpu}\n")
    where = f"--root {in_shell(name)} --data-dir {in_shell(f'{name}/data')} --profile {in_shell(profile)}"
    done = in_a_shell(tmp_path, f"vitpa sweep submit {in_shell(f'{name}/small.yaml')} {where} --wait")
    (again,) = re.findall(r"to run again: (vitpa sweep retry .*)", done.stdout)
    (tmp_path / name / "fail").rename(tmp_path / name / "failed")
    assert "submitted 2 of 2 runs" in in_a_shell(tmp_path, f"{again} --wait").stdout


@pytest.mark.slurm
@pytest.mark.slow
def test_on_slurm(tmp_path: Path, cluster: BoundCluster) -> None:
    field = Field(tmp_path / "~a $HOME b'c\"d", cluster, steps=1)
    field.profile = slurm_profile(field.root)
    done = field.vitpa("submit", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    field.assert_each_done_once()
