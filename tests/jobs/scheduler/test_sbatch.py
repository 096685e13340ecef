"""The lines of a job script around a profile's setup, run by bash: what failed in it is known afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs.execute.slurm import NOT_ENDED
from jobs.scheduler.job_output import SETUP_FAILED
from jobs.scheduler.sbatch import AFTER_SETUP, BEFORE_SETUP, PYTHON, STEP

MODULE = "module() { if true; then grep -q x /dev/null; fi; eval 'return 3'; }"


def run_script(tmp_path: Path, *setup: str) -> tuple[str, str]:
    """What is known of lines that have failed after `setup`, and what was said on stderr."""
    script = tmp_path / "job.sh"
    script.write_text(
        "\n".join(["#!/bin/bash", *BEFORE_SETUP, *setup, AFTER_SETUP, f"printenv {SETUP_FAILED}; false", "true"])
    )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("setup", "failed"),
    [
        (["true", "export X=1", "if false; then true; fi", "false || true", "! true"], ""),
        (["cd /nowhere"], "`cd /nowhere` failed with status 1"),
        (["nosuch --x 'a b'", "true"], "`nosuch --x 'a b'` failed with status 127"),
        ([MODULE, "module load cuda"], "`module load cuda` failed with status 3"),
        (["source job.env"], "`source job.env` failed with status 4"),
        (["for i in 1 2; do", "  test $i = 1", "done"], "`  test $i = 1` failed with status 1"),
        (
            ["set -u", "echo \"`false`$(echo '$x')\" | grep -q y"],
            "`echo \"`false`$(echo '$x')\" | grep -q y` failed with status 1",
        ),
        (["false", "(exit 5)"], "`false` failed with status 1, `(exit 5)` failed with status 5"),
    ],
)
def test_lines_that_fail_are_known_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: list[str], failed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.env").write_text("false\n(exit 4)\n")
    known, said = run_script(tmp_path, *setup)
    assert known == failed
    assert [line for line in said.splitlines() if line.startswith("setup: ")] == [
        f"setup: {each}" for each in failed.split(", ") if each
    ]


def test_what_is_said_of_failed_lines_is_bounded(tmp_path: Path) -> None:
    known, _ = run_script(tmp_path, "for i in {1..1000}; do", f"test {'x' * 1000} = y", "done")
    assert 200 < len(known) < 1000


def test_a_setup_that_ends_the_job_says_so(tmp_path: Path) -> None:
    known, said = run_script(tmp_path, "set -e", "cd /nowhere")
    assert (known, said.splitlines()[-1]) == ("", "setup ended the job with exit code 1: cd /nowhere")


UP = "touch up; exit 1"  # slurmctld is up again
NEVER, KILLED, FAILED, FINE = "exit 1", 'sh -c "$*"; exit 137', 'sh -c "$*"; exit 1', 'sh -c "$*"'  # of srun, in turn
NO_MEMORY = 'sh -c "$*"; exit 253'  # the kernel has killed the job's process
NO_MEMORY_TO_TRAIN = f'sh -c "$*"; rm "${NOT_ENDED}"; exit 253'  # a training, and the job's process has ended by itself


@pytest.mark.parametrize(
    ("sruns", "nodes", "expected"),
    [
        ([FINE], 1, (1, 0)),
        ([UP, UP, FINE], 1, (0, 1)),  # a wrong option of srun
        ([UP, FINE], 1, (1, 0)),
        ([NEVER, NEVER, FINE], 1, (1, 0)),  # slurmctld was away
        ([KILLED, FINE], 1, (2, 0)),
        ([KILLED, NEVER, KILLED, FAILED], 1, (3, 1)),
        ([FAILED, FINE], 1, (1, 1)),  # it has ended by itself, and knows why
        ([NO_MEMORY, KILLED, FINE], 1, (3, 0)),
        ([NO_MEMORY, NO_MEMORY_TO_TRAIN, FINE], 1, (2, 253)),
        ([NO_MEMORY, FINE], 2, (1, 253)),
        ([KILLED, FINE], 2, (1, 137)),  # the other node has joined the training that was
        ([NEVER, FINE], 2, (1, 0)),
    ],
)
def test_the_job_s_process_is_started_again_where_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sruns: list[str], nodes: int, expected: tuple[int, int]
) -> None:
    programs, marks = tmp_path / "bin", tmp_path / "marks"
    programs.mkdir()
    marks.mkdir()
    for number, lines in enumerate(sruns):
        (tmp_path / f"srun{number}").write_text(lines)
    turn = f"n=$(cat {tmp_path}/turn 2> /dev/null || echo 0); echo $((n + 1)) > {tmp_path}/turn; . {tmp_path}/srun$n"
    ping = '[ ! -e up ] || echo "Slurmctld(primary) at x is UP"'
    for name, lines in {"srun": turn, "sleep": "true", "scontrol": ping}.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    begin = PYTHON.partition("exec")[0].partition("-c '")[2] + "echo started"
    (tmp_path / "task").write_text(begin)
    script = tmp_path / "job.sh"
    script.write_text("\n".join(["#!/bin/bash", "set -eu", STEP, f"srun . {tmp_path}/task"]))
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("TMPDIR", str(marks))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.count("started"), done.returncode) == expected, done.stderr
    assert list(marks.iterdir()) == []
