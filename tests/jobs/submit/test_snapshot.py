"""Copies of the code: jobs run what was submitted, by its own name, whatever happens to the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vitpa.code_version
from jobs.errors import SweepError
from jobs.submit import snapshot
from jobs.submit.snapshot import PACKAGES, RECORD, make_snapshot
from tests.support.git import commit, git
from tests.support.repository import ROOT
from tests.support.trainings import arguments, result_of
from vitpa.code_version import code_version

CHILD = (
    "import sys, subprocess; from vitpa.child_process import child_environment as e; "
    "exit(subprocess.call(sys.argv[1:], env=e()))"
)
MAKE = (
    "import sys; from pathlib import Path; from jobs.submit.snapshot import make_snapshot; "
    "print(make_snapshot(Path(sys.argv[1])))"
)


def python(code: Path, *words: str, cwd: Path) -> str:
    """What Python prints when it imports from the folder `code`."""
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    answer = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.mark.slow
def test_a_job_trains_with_the_code_that_was_submitted_and_calls_it_by_its_name(digits: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    git(checkout, "init", "--quiet")
    name = f"g{commit(checkout)}"
    root = checkout / "outputs"  # below the checkout, as by default
    copy = Path(python(checkout, "-c", MAKE, str(root), cwd=checkout))
    assert copy.parent == root / "code"
    assert copy.name.startswith(f"{name}-")

    (checkout / "vitpa" / "train.py").write_text("raise SystemExit('this is the new code')\n")
    (checkout / "vitpa" / "configs" / "digits.yaml").unlink()
    (checkout / "jobs" / "execute" / "die_with_parent.py").unlink()
    commit(checkout)
    words = arguments(digits, tmp_path, "train.epochs=1")
    python(copy, "-c", CHILD, sys.executable, "-m", "vitpa.train", *words, cwd=checkout)
    assert result_of(words).code_version == name
    (record,) = (tmp_path / "runs").glob("*/env.json")
    assert name == f"g{json.loads(record.read_text())['git_commit'][:12]}"

    assert python(copy, "-c", MAKE, str(root), cwd=checkout) == str(copy)  # a copy of the copy is the copy
    assert len(list((root / "code").iterdir())) == 1


def test_a_snapshot_holds_the_code_and_nothing_else_and_is_found_again(tmp_path: Path) -> None:
    copy = make_snapshot(tmp_path)
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert {
        "vitpa/train.py",
        "vitpa/py.typed",
        "vitpa/configs/cifar10.yaml",
        "jobs/execute/die_with_parent.py",
        "jobs/sweeps/demo.yaml",
    } < files
    assert {path.rsplit(".", 1)[1] for path in files - {RECORD}} == {"py", "yaml", "typed"}
    assert copy.name.startswith(f"{code_version()}-")
    python(
        copy, "-c", "import jobs.command, jobs.execute.local, jobs.submit.submit, jobs.profile", cwd=tmp_path
    )  # without slurm/*.yaml
    made = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name in ("train.py", "die_with_parent.py")}
    assert make_snapshot(tmp_path) == copy
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_other_code_is_another_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code_here"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, code / package)
    monkeypatch.setattr(snapshot, "CODE", code)
    first = make_snapshot(tmp_path)
    (code / "jobs" / "worker.py").write_text("other = 1\n")
    assert make_snapshot(tmp_path) != first


def test_many_launchers_at_once_make_one_and_pass_over_what_a_kill_left(tmp_path: Path) -> None:
    name = make_snapshot(tmp_path / "elsewhere").name
    left = tmp_path / "code" / f".{name}.0123"
    (left / "vitpa").mkdir(parents=True)
    with ThreadPoolExecutor(6) as pool:
        made = set(pool.map(make_snapshot, [tmp_path] * 6))
    assert made == {tmp_path / "code" / name}
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == [left.name, name]


def test_lost_and_edited_files_are_put_right_and_a_stray_one_is_told(tmp_path: Path) -> None:
    copy = make_snapshot(tmp_path)
    whole = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    shutil.rmtree(copy / "vitpa" / "configs")  # as a file system does that cleans up old files
    for path in ("jobs/execute/die_with_parent.py", RECORD):
        (copy / path).chmod(0o644)
        (copy / path).write_text("{}")
    assert make_snapshot(tmp_path) == copy
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == whole
    (copy / "vitpa" / "stray.py").write_text("")
    with pytest.raises(SweepError, match=r"stray\.py: is not of the code .*; remove that file"):
        make_snapshot(tmp_path)


@pytest.mark.parametrize("damage", ["", "[]", "[" * 100_000, '{"code_version": 1}', "1" * 100_000])
def test_a_damaged_record_of_the_codes_name_is_put_right_or_passed_over(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_snapshot(tmp_path)
    record = copy / RECORD
    whole = record.read_bytes()
    record.chmod(0o644)
    record.write_text(damage)
    monkeypatch.setattr(vitpa.code_version, "PACKAGE", copy / "vitpa")
    assert code_version().startswith("s")  # of the sources that are there
    os.truncate(record, 1 << 40)
    assert code_version().startswith("s")
    monkeypatch.undo()
    assert make_snapshot(tmp_path) == copy
    assert record.read_bytes() == whole


def test_code_that_changes_while_it_is_copied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = (f"g{number}" for number in range(100))
    monkeypatch.setattr(snapshot, "code_record", lambda: {"code_version": next(versions)})
    with pytest.raises(SweepError, match="the code changes while it is copied; submit again"):
        make_snapshot(tmp_path)


def test_a_folder_that_python_cannot_import_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="cannot lie below a name with ':'; choose another root"):
        make_snapshot(tmp_path / "a:b")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(root)], check=False)
    if mounted.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(SweepError, match=r"cannot be copied there \(No space left on device\); .*--code live"):
            make_snapshot(root)
        assert not any((root / "code").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", str(root)], check=True)
        assert (make_snapshot(root) / "vitpa" / "train.py").is_file()
    finally:
        subprocess.run(["umount", str(root)], check=True)
