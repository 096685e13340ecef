"""Waiting in tests ends when nothing moves any more: what works slowly is waited for, what hangs is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.devcluster_config import Layout, Settings
from slurm.devcluster_processes import SignsOfLife
from slurm.devcluster_supervisor import FailedError, Supervisor
from tests.support.repository import ROOT
from tests.support.waiting import finish, ours, run_to_end, wait_for

COMPUTES = "import time\nwhile time.process_time() < {}: pass"
LOOKS_AROUND = "import os, time\nwhile True: os.listdir('.'); time.sleep(0.05)"


@pytest.mark.slow
def test_what_computes_is_waited_for_beyond_the_limit() -> None:
    with subprocess.Popen([sys.executable, "-c", COMPUTES.format(3)]) as process:
        wait_for(lambda: process.poll() is not None, poll_s=0.05, idle_s=2)
    assert process.returncode == 0


@pytest.mark.slow
def test_so_is_what_has_left_this_process(tmp_path: Path) -> None:
    """A sweep's workers do."""
    worker = f"{COMPUTES.format(3)}\nopen('ended', 'w')"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
    assert wait_for((tmp_path / "ended").exists, poll_s=0.05, idle_s=2)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["import time; time.sleep(1000)", LOOKS_AROUND])
def test_what_hangs_is_given_up_with_what_there_is(program: str) -> None:
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        expected = (
            rf"^test_waiting\.py:\d+: wait_for\(lambda: process\.poll\(\).*: nothing has moved for 2 s\nlast seen: half\n"
            rf"processes:\n(.*\n)* *{process.pid} S +\d+\.\d "
        )
        with pytest.raises(AssertionError, match=expected):
            wait_for(lambda: process.poll() is not None, seen=lambda: "half", poll_s=0.05, idle_s=2)
        process.kill()


@pytest.mark.slow
def test_a_change_of_what_is_seen_is_a_sign_of_life() -> None:
    began_s = time.monotonic()

    def passed_s() -> float:
        return time.monotonic() - began_s

    assert wait_for(lambda: passed_s() > 4, seen=lambda: passed_s() // 1.3, poll_s=0.05, idle_s=3)


def test_a_program_that_hangs_is_killed_and_what_it_said_is_told() -> None:
    program = "import sys, time; print('begun', flush=True); print('oh', file=sys.stderr, flush=True); time.sleep(1000)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True) as process:
        with pytest.raises(AssertionError, match=r"nothing has moved for 2 s\n(.*\n)*it has printed:\nbegun\n\noh\n"):
            finish(process, idle_s=2)
        assert process.poll() is not None


def test_a_program_runs_to_its_end() -> None:
    done = run_to_end([sys.executable, "-c", "import sys; print('x' * 100_000); print('y', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, len(done.stdout), done.stderr) == (3, 100_001, "y\n")


@pytest.mark.slow
def test_a_process_that_waits_for_a_disk_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """State D: shown here for a process that really sleeps, because no test can make a disk slow."""
    process = subprocess.Popen(["sleep", "100"])
    read = Path.read_text
    slow = Path(f"/proc/{process.pid}/stat")
    monkeypatch.setattr(Path, "read_text", lambda path: read(path).replace(") S ", ") D ") if path == slow else read(path))
    life = SignsOfLife(lambda: [process.pid])
    for _ in range(3):
        time.sleep(1)
        assert life.idle_s() < 1
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_process_that_waits_for_a_cpu_is_alive() -> None:
    """However many others want it: this one gets a CPU only where nobody else wants it, and somebody does."""
    cpu = min(os.sched_getaffinity(0))
    choose = f"import os; os.sched_setaffinity(0, [{cpu}])"
    yielding = f"{choose}; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    forever = "\nwhile True: pass"
    with (
        subprocess.Popen([sys.executable, "-c", choose + forever]) as busy,
        subprocess.Popen([sys.executable, "-c", yielding + forever]) as process,
    ):
        life, begun_s, idle_s = SignsOfLife(lambda: [process.pid]), cpu_s(process.pid), []
        for _ in range(24):
            time.sleep(0.25)
            idle_s.append(life.idle_s())
        taken_s = cpu_s(process.pid) - begun_s
        busy.kill()
        process.kill()
    assert taken_s < 1
    assert max(idle_s) < 3


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has taken."""
    columns = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, columns[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_the_cluster_waits_for_a_daemon_that_gets_on_and_not_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.devcluster_supervisor.STILL_S", 2.0)
    monkeypatch.setattr("slurm.devcluster_processes.reap", dict)  # this process has other children
    supervisor = Supervisor(Layout(tmp_path), -1, Settings(1, 1, 1, 1), {})
    supervisor.bound = False
    with subprocess.Popen([sys.executable, "-c", COMPUTES.format(3)]) as busy:
        supervisor.daemons = {"slurmctld": busy}
        supervisor._wait("the end", lambda: busy.poll() is not None)
    with subprocess.Popen(["sleep", "1000"]) as hangs:
        supervisor.daemons = {"slurmctld": hangs}
        with pytest.raises(FailedError, match="the end did not come, and no daemon has done anything for 2 s; see the logs"):
            supervisor._wait("the end", lambda: hangs.poll() is not None)
        hangs.kill()


@pytest.mark.slow
def test_a_test_has_its_time_from_the_last_sign_of_life(tmp_path: Path) -> None:
    """`timeout` of pytest: one that works twice as long passes, with itself or a process at work; one that hangs ends."""
    file = tmp_path / "test_times.py"
    file.write_text(
        "import subprocess, sys, time\nimport tests.conftest\ntests.conftest.SPIN = 1000\n"
        f"def test_a_child_works():\n    subprocess.run([sys.executable, '-c', {COMPUTES.format(3)!r}])\n"
        "def test_this_works():\n    end = time.process_time() + 3\n    while time.process_time() < end: pass\n"
        "def test_hangs():\n    subprocess.run(['sleep', '1000'])\n"
        "def test_spins():\n    tests.conftest.SPIN = 2\n    while True: pass\n"
    )
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=2", f"--rootdir={tmp_path}"]
    done = run_to_end([sys.executable, "-m", "pytest", *options, "-c", "/dev/null", str(file)], cwd=ROOT)
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "test_hangs: nothing has moved for " in done.stdout
    assert "test_spins: it has moved for " in done.stdout


def test_this_process_is_not_one_of_those_that_are_waited_for() -> None:
    assert os.getpid() not in ours()
