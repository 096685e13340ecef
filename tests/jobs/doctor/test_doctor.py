"""`vitpa doctor`: what it says of a machine, of a real SLURM, of broken ones; and that it leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.doctor import examine
from jobs.doctor.cluster import PROGRAMS, Check, configured
from jobs.doctor.examine import examine_cluster
from jobs.doctor.job import _read, checks_of
from jobs.doctor.probe import try_import
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler
from jobs.scheduler.cluster import Cluster
from tests.support.cluster import BoundCluster
from vitpa.cli import main
from vitpa.installation import NO_BYTECODE
from vitpa.records import RunError

PROFILE = {"executor": "slurm", "gpus_per_node": 0, "cpus_per_task": 1, "time": "10", "partition": "main"}


class Doctor:
    """Types `vitpa doctor --json`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.capsys, self.monkeypatch = root, capsys, monkeypatch

    def on(self, cluster: BoundCluster) -> None:
        for key in ("SLURM_CONF", "PATH"):
            self.monkeypatch.setenv(key, cluster.environment[key])

    def __call__(self, *more: str, **profile: Any) -> tuple[int, dict[str, list[dict[str, str]]]]:
        path = self.root / "profile.yaml"
        path.write_text(yaml.safe_dump({**PROFILE, **profile}))
        code = main(["doctor", "--json", "--profile", str(path), "--root", str(self.root / "shared"), *more])
        checks: dict[str, list[dict[str, str]]] = {}
        for check in json.loads(self.capsys.readouterr().out)["checks"]:
            checks.setdefault(check["name"], []).append(check)
        return code, checks


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    return Doctor(tmp_path, capsys, monkeypatch)


def queue(cluster: BoundCluster) -> str:
    form = ["squeue", "--noheader", "--name=vitpa-doctor", "--format=%i %T"]
    return subprocess.run(form, env=cluster.environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slurm
@pytest.mark.slow
def test_a_cluster_in_good_health(cluster: BoundCluster, doctor: Doctor, digits: Path) -> None:
    doctor.on(cluster)
    code, checks = doctor("--data-dir", str(digits))
    assert code == 0
    assert {check["level"] for found in checks.values() for check in found} == {"ok"}
    assert {"SLURM", "accounting", "submission", "probe job", "shared folder", "clock", "python"} < checks.keys()
    assert {"vitpa", "torch", "ffcv", "cpus", "disk", "data digits", "preemption", "requeue"} < checks.keys()
    assert "came back (restart 1)" in checks["requeue"][0]["found"]
    assert len(checks["data digits"]) == 2
    assert not (doctor.root / "shared").exists()
    assert queue(cluster) == ""


@pytest.mark.slurm
def test_a_root_that_the_job_cannot_write(cluster: BoundCluster, doctor: Doctor) -> None:
    doctor.on(cluster)
    code, checks = doctor(setup=["ulimit -f 0"])  # no file may grow
    assert code == 1
    (check,) = checks["shared folder"]
    assert check["level"] == "problem"
    assert check["found"].startswith("the probe job on 127.0.0.")
    assert " says: " in check["found"]
    assert "File too large" in check["found"]
    assert str(doctor.root / "shared") in check["found"]
    assert "--root has to be a folder that every node can see and write to" in check["hint"]
    assert not (doctor.root / "shared").exists()


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"setup": ["exit 7"]}, "setup ended the job with exit code 7: exit 7"),
        ({"srun_args": ["--of-2030"]}, "srun: unrecognized option"),
    ],
)
def test_a_job_that_ends_before_the_probe(cluster: BoundCluster, doctor: Doctor, values: dict[str, Any], said: str) -> None:
    doctor.on(cluster)
    code, checks = doctor(**values)
    assert code == 1
    (check,) = checks["probe job"]
    assert check["level"] == "problem"
    assert f"before the probe began: {said}" in check["found"]
    assert check["hint"] == "fix `setup`, `srun_args` or additional_parameters in the profile"


@pytest.mark.slurm
def test_a_wrong_partition_and_no_sacct(cluster: BoundCluster, doctor: Doctor) -> None:
    doctor.on(cluster)
    folder = doctor.root / "bin"
    folder.mkdir()
    for program in (*PROGRAMS, "sdiag", "sacctmgr"):
        (folder / program).symlink_to(str(shutil.which(program)))
    doctor.monkeypatch.setenv("PATH", str(folder))
    code, checks = doctor(partition="nope")
    assert code == 1
    assert checks["accounting"][0]["level"] == "warning"
    assert checks["accounting"][0]["found"].startswith("sacct: not found")
    (check,) = checks["submission"]
    assert check["level"] == "problem"
    assert "invalid partition specified: nope" in check["found"]
    assert "partitions: low, main" in check["hint"]
    assert checks["probe job"][0]["level"] == "skipped"
    assert not (doctor.root / "shared").exists()


@pytest.mark.slurm
def test_a_probe_job_that_does_not_start(cluster: BoundCluster, doctor: Doctor) -> None:
    doctor.on(cluster)
    (doctor.root / "shared/runs").mkdir(parents=True)
    code, checks = doctor("--wait-s", "3", additional_parameters={"hold": True})
    assert code == 0
    (check,) = checks["probe job"]
    assert check["level"] == "warning"
    assert check["found"] == "it did not start in 3 s (JobHeldUser); the other checks are done"
    assert queue(cluster) == ""
    assert [path.name for path in (doctor.root / "shared").iterdir()] == ["runs"]


@pytest.mark.slurm
def test_ctrl_c_takes_the_job_away(cluster: BoundCluster, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        assert "Ctrl-C cancels it" in line
        raise KeyboardInterrupt

    profile = SlurmProfile.model_validate(PROFILE)
    scheduler = Scheduler(cluster.environment)
    path = os.environ["PATH"]
    try:
        os.environ["PATH"] = cluster.environment["PATH"]
        with pytest.raises(KeyboardInterrupt):
            list(examine_cluster(profile, tmp_path / "root", None, scheduler=scheduler, wait_s=60, say=interrupt))
    finally:
        os.environ["PATH"] = path
    assert queue(cluster) == ""
    assert not (tmp_path / "root").exists()


def test_without_slurm(doctor: Doctor) -> None:
    doctor.monkeypatch.setenv("PATH", str(doctor.root))
    code, checks = doctor()
    assert code == 3
    assert checks["SLURM"][0]["found"] == f"not in PATH: {', '.join(PROGRAMS)}"


def test_a_controller_that_does_not_answer(doctor: Doctor) -> None:
    for program in PROGRAMS:
        path = doctor.root / program
        path.write_text("#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2\nexit 1\n")
        path.chmod(0o755)
    doctor.monkeypatch.setenv("PATH", str(doctor.root))
    code, checks = doctor()
    assert code == 3
    assert "Unable to contact slurm controller" in checks["SLURM"][0]["found"]


@pytest.mark.parametrize(
    ("configuration", "name", "level", "words"),
    [
        ({"PreemptType": "preempt/qos", "PreemptMode": "CANCEL"}, "preemption", "warning", "preempted runs end"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, "preemption", "ok", "go on from their checkpoint"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "GANG,SUSPEND"}, "preemption", "warning", "keep their memory"),
        ({"PreemptType": "preempt/none", "PreemptMode": "OFF"}, "preemption", "ok", "not preempted"),
        ({"RequeueExit": "1-3"}, "RequeueExit", "warning", "SLURM starts failed runs again by itself"),
        ({"RequeueExitHold": "1,9"}, "RequeueExitHold", "warning", "SLURM puts the job of a failed run on hold"),
        ({"MinJobAge": "10 sec"}, "MinJobAge", "warning", "so long squeue shows"),
        ({"MinJobAge": "300 sec"}, "MinJobAge", "ok", "so long squeue shows"),
        ({"JobRequeue": "0"}, "JobRequeue", "ok", "jobs of vitpa ask for it"),
    ],
)
def test_what_a_configuration_means(configuration: dict[str, str], name: str, level: str, words: str) -> None:
    checks = {check.name: check for check in configured(Cluster(configuration), SlurmProfile.model_validate(PROFILE))}
    assert checks[name].level == level
    assert words in checks[name].found


def test_a_partition_says_who_is_preempted() -> None:
    partitions = {"low": {"PartitionName": "low", "PreemptMode": "CANCEL", "GraceTime": "60"}}
    configuration = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "KillWait": "30 sec"}
    profile = SlurmProfile.model_validate({**PROFILE, "partition": "low"})
    checks = {check.name: check for check in configured(Cluster(configuration, partitions), profile)}
    assert checks["preemption"].level == "warning"
    assert "KillWait 30 sec, GraceTime of the partition 60 s" in checks["time to stop"].found


def test_of_an_unknown_partition_nothing_is_claimed() -> None:
    configuration = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
    checks = {check.name: check for check in configured(Cluster(configuration), SlurmProfile.model_validate(PROFILE))}
    assert (checks["preemption"].level, checks["preemption"].found[:9]) == ("warning", "not known")
    assert "GraceTime of the partition not known: " in checks["time to stop"].found


def test_a_report_with_problems() -> None:
    report = {
        "host": "n1",
        "python": "3.11.2",
        "cpus": 8,
        "gpus": ["NVIDIA H100, 81559 MiB"],
        "imports": {"vitpa": {"ok": True, "detail": "0.1.0"}, "ffcv": {"ok": False, "detail": "No module named 'ffcv'"}},
        "checks": [
            {"name": "data pets", "ok": False, "detail": "cut short"},
            {"name": "gpu0_product", "ok": False, "detail": "wrong"},
        ],
    }
    lines = [check.line() for check in checks_of(report) if check.level == "problem"]
    assert lines[0].startswith("problem  ffcv             No module named 'ffcv' -> pip install ffcv in the environment")
    assert "cut short -> vitpa prep makes it" in lines[1]
    assert "wrong -> another node may do" in lines[2]
    assert Check("GPUs", "ok", "NVIDIA H100, 81559 MiB") in list(checks_of(report))


def test_a_package_that_every_process_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was built without .pyc files, and is read-only."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    report = {"host": "n1", "python": "3.11.2", "cpus": 8, "gpus": [], "checks": []}
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    _, check, _ = checks_of({**report, "imports": {"torch": try_import("submitit")}}, gpus_are_optional=True)
    assert (check.name, check.level) == ("torch", "warning")
    assert check.found == f"{importlib.metadata.version('submitit')}; {NO_BYTECODE}"
    assert "PYTHONPYCACHEPREFIX" in check.hint
    assert try_import("vitpa")["compiled"] is True, "of our own files it costs nothing"
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    assert try_import("submitit") == {"ok": True, "detail": importlib.metadata.version("submitit"), "compiled": True}
    assert try_import("no_such_package")["compiled"] is True, "there is another problem with it"


@pytest.mark.parametrize("document", ["no report", [], {}, {"host": "n1"}, {"host": 7, "checks": [[]]}, None])
def test_a_report_that_is_none_is_a_problem_not_a_traceback(document: object) -> None:
    (check,) = checks_of(document)
    assert (check.name, check.level) == ("report", "problem")
    assert "what the probe reports is damaged" in check.found


@pytest.mark.parametrize("printed", ["[" * 100_000, "NaN", "hello", '{"host": "n1"}'])
def test_a_probe_that_prints_something_else_is_a_problem(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.py").write_text(f"print({printed!r})")
    monkeypatch.setattr(examine, "PROBE", tmp_path / "probe.py")
    assert main(["doctor", "--root", str(tmp_path / "root")]) == 1
    assert "problem  report           what the probe reports is damaged" in capsys.readouterr().out


def test_a_damaged_file_of_the_probe_job_is_one_line(tmp_path: Path) -> None:
    assert _read(tmp_path / "report.json") is None
    (tmp_path / "report.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"report\.json: nested deeper than 64"):
        _read(tmp_path / "report.json")


@pytest.mark.slow
def test_this_machine(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--root", str(tmp_path / "root"), "--data-dir", str(digits)]) == 0
    text = capsys.readouterr().out
    for words in (
        "ok       python",
        "ok       torch",
        "ok       ffcv             1.",
        "train.beton: 1437 images",
        "problems: 0",
    ):
        assert words in text
    assert not (tmp_path / "root").exists()
