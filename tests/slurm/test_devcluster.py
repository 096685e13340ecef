"""The development cluster, for real: jobs run, are preempted and requeued, and whatever is killed, nothing is left."""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import slurm.devcluster
import slurm.devcluster_config
import vitpa.cli
from slurm.devcluster import check_host_name, stop_cluster
from slurm.devcluster_config import Layout, free_ports
from slurm.devcluster_folder import AlreadyRunningError, DevClusterError, is_running
from slurm.devcluster_processes import descendants
from slurm.devcluster_status import status_of
from slurm.devcluster_supervisor import CLIENT_TIMEOUT_S
from tests.support.at_once import WITHOUT_ITS_FIRST_THREAD
from tests.support.cluster import BoundCluster, FaultyCluster, guardian_pid, require_slurm, short_folder
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end, wait_for

pytestmark = pytest.mark.slurm
SLEEP = "sleep 98.7654"  # found again in the list of processes


@pytest.fixture
def jobs(cluster: FaultyCluster) -> Iterator[FaultyCluster]:
    """The session's cluster, with an empty queue before and after."""
    yield cluster
    ask(cluster, "scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name)
    wait_for(lambda: not ask(cluster, "squeue", "-h"))
    wait_for(lambda: set(ask(cluster, "sinfo", "-h", "-p", "main", "-o", "%t").split()) == {"idle"})


def ask(cluster: BoundCluster, *command: str) -> str:
    answer = run_to_end(command, env=cluster.environment, cwd=cluster.root)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def submit(cluster: BoundCluster, script: str, *options: str) -> str:
    return ask(cluster, "sbatch", "--parsable", "--output=log/job-%j.out", *options, "--wrap", script)


def printed(cluster: BoundCluster, job: str) -> str:
    path = cluster.root / f"log/job-{job}.out"
    return path.read_text() if path.exists() else ""


def state(cluster: BoundCluster, job: str) -> str:
    return ask(cluster, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def runs(cluster: BoundCluster, job: str) -> bool:
    return state(cluster, job) == "RUNNING"


def processes_of(root: Path) -> list[int]:
    """Everything that mentions the cluster's folder in its command, environment or open files."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
                texts += [bytes(link.readlink()) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            if any(bytes(root) in text for text in texts):
                found.append(int(entry.name))
    return found


# --- what jobs see


def test_jobs_and_arrays_run_and_sacct_knows_them(jobs: BoundCluster) -> None:
    job = submit(jobs, "hostname; exit 3")
    array = submit(jobs, "echo task $SLURM_ARRAY_TASK_ID", "--array=0-2")
    wait_for(lambda: state(jobs, job) == "FAILED" and state(jobs, array).split() == ["COMPLETED"] * 3)
    assert printed(jobs, job).strip() == socket.gethostname()
    columns = ("sacct", "-n", "-X", "-P", "-o", "JobID,State,ExitCode", "-j", f"{job},{array}")
    expected = {f"{job}|FAILED|3:0", *(f"{array}_{task}|COMPLETED|0:0" for task in range(3))}
    wait_for(lambda: set(ask(jobs, *columns).splitlines()) == expected)


def test_two_jobs_on_a_node_have_different_gpus_and_a_third_waits(jobs: BoundCluster) -> None:
    options = ("--gpus-per-node=1", f"--nodelist={jobs.node_names[1]}")
    first, second, third = (submit(jobs, "echo gpu $CUDA_VISIBLE_DEVICES; sleep 60", *options) for _ in range(3))
    wait_for(lambda: "gpu" in printed(jobs, first) and "gpu" in printed(jobs, second))
    assert {printed(jobs, first), printed(jobs, second)} == {"gpu 0\n", "gpu 1\n"}
    assert state(jobs, third) == "PENDING"
    facts = status_of(jobs.root)
    assert facts["up"] and facts["jobs"] == {"running": 2, "pending": 1}
    assert [node["gpus_used"] for node in facts["nodes"]] == [0, 2, 0, 0]


def test_a_step_runs_on_all_nodes(jobs: BoundCluster) -> None:
    job = submit(jobs, "srun sh -c 'echo $SLURMD_NODENAME'", "--nodes=4")
    wait_for(lambda: state(jobs, job) == "COMPLETED")
    assert sorted(printed(jobs, job).split()) == jobs.node_names


def test_main_preempts_low_whose_job_starts_again(jobs: BoundCluster) -> None:
    low = submit(jobs, "echo start $SLURM_RESTART_COUNT; sleep 60", "--partition=low", "--nodes=4", "--gpus-per-node=2")
    wait_for(lambda: "start" in printed(jobs, low))
    main = submit(jobs, "true", "--nodes=1", "--gpus-per-node=1")
    wait_for(lambda: state(jobs, main) == "COMPLETED")
    wait_for(lambda: "start 1" in printed(jobs, low))
    assert (state(jobs, low), state(jobs, main)) == ("RUNNING", "COMPLETED")


def test_a_requeued_job_starts_again(jobs: BoundCluster) -> None:
    job = submit(jobs, "echo start $SLURM_RESTART_COUNT; sleep 60", "--open-mode=append")
    wait_for(lambda: "start" in printed(jobs, job))
    ask(jobs, "scontrol", "requeue", job)
    wait_for(lambda: "start 1" in printed(jobs, job))
    starts = [line.strip() for line in printed(jobs, job).splitlines() if line.startswith("start")]
    assert starts == ["start", "start 1"]


def test_an_array_index_beyond_the_limit_is_refused(jobs: BoundCluster) -> None:
    with pytest.raises(AssertionError, match="Invalid job array"):
        submit(jobs, "true", f"--array=0-{jobs.settings.max_array_size}")


# --- faults


def test_a_job_outlives_a_restart_of_the_controller_and_of_accounting(jobs: FaultyCluster) -> None:
    job = submit(jobs, "sleep 4; echo done")
    wait_for(lambda: runs(jobs, job))
    jobs.stop_accounting()
    with pytest.raises(AssertionError, match="Connection refused"):
        ask(jobs, "sacct")
    jobs.restart_controller()
    jobs.start_accounting()
    wait_for(lambda: state(jobs, job) == "COMPLETED")
    assert printed(jobs, job) == "done\n"
    wait_for(lambda: "COMPLETED" in ask(jobs, "sacct", "-n", "-X", "-j", job))


def test_a_killed_node_loses_its_processes_only_and_comes_back(jobs: FaultyCluster) -> None:
    lost, other = jobs.node_names[2:]
    job = submit(jobs, "echo here; sleep 600 & sleep 600", f"--nodelist={lost}")
    neighbour = submit(jobs, "echo here; sleep 600", f"--nodelist={other}")
    wait_for(lambda: printed(jobs, job) and printed(jobs, neighbour))
    before = processes_of(jobs.root / f"spool/{lost}/job{int(job):05d}")
    assert before
    jobs.kill_node(lost)
    wait_for(lambda: not processes_of(jobs.root / f"spool/{lost}/job{int(job):05d}"))
    assert processes_of(jobs.root / f"spool/{other}/job{int(neighbour):05d}")
    with pytest.raises(DevClusterError, match=f"slurmd.{lost} does not run"):
        jobs.kill_node(lost)
    jobs.start_node(lost)
    after = submit(jobs, "echo back", f"--nodelist={lost}")
    wait_for(lambda: state(jobs, after) == "COMPLETED")


# --- nobody else hears or sees it


def listening(pids: list[int]) -> dict[str, set[str]]:
    """Addresses on which processes listen: from /proc/net/tcp and tcp6, where they are words of 32 bits in host order."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink()) if link.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                address, port = words[1].split(":")
                packed = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                found.setdefault(str(ipaddress.ip_address(packed)), set()).add(str(int(port, 16)))
    return found


def test_it_listens_on_loopback_only(jobs: BoundCluster) -> None:
    job = submit(jobs, "srun sh -c 'echo here; sleep 60'", "--nodes=2")
    wait_for(lambda: printed(jobs, job).count("here") == 2)
    addresses = listening(descendants([guardian_pid(jobs)]))
    assert sum(len(ports) for ports in addresses.values()) >= 6  # slurmctld, slurmdbd, four slurmd; srun has its own
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
    assert jobs.root.stat().st_mode & 0o777 == 0o700


def test_two_clusters_at_the_same_time_do_not_know_each_other(jobs: BoundCluster) -> None:
    first = submit(jobs, SLEEP)
    with BoundCluster(short_folder(), nodes=1, gpus=0) as other:
        job = submit(other, "true")
        wait_for(lambda: state(other, job) == "COMPLETED")
        assert ask(other, "squeue", "-h") == ""
    wait_for(lambda: runs(jobs, first))
    assert not processes_of(other.root)
    assert not other.root.exists()


# --- whatever is killed

USER_OF_A_CLUSTER = """
import sys, time
from pathlib import Path
from tests.support.cluster import BoundCluster
with BoundCluster(Path(sys.argv[1]), nodes=1, gpus=1) as cluster:
    print(cluster.layout.recorded_pid(), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("victim", ["user", "guardian", "supervisor", "both"])
def test_kill_9_leaves_no_process(victim: str) -> None:
    require_slurm()
    root = short_folder()
    bystander = subprocess.Popen(["sleep", "100"], env={**os.environ, "SLURM_CONF": str(Layout(root).slurm_conf)})
    with subprocess.Popen(
        [sys.executable, "-c", USER_OF_A_CLUSTER, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as user:
        assert user.stdout
        guardian = int(user.stdout.readline())
        (supervisor,) = [pid for pid in descendants([guardian]) if b"devcluster_supervisor" in command_of(pid)]
        cluster = BoundCluster(root)
        job = submit(cluster, f"trap '' TERM; setsid {SLEEP} & srun {SLEEP}")
        wait_for(lambda: len(sleepers(guardian)) == 2)
        everything = [guardian, *descendants([guardian])]
        victims = {"user": [user.pid], "guardian": [guardian], "supervisor": [supervisor], "both": [guardian, supervisor]}
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)
        if victim == "both":  # the daemons end with it; what jobs leave behind is ended by the next start or stop
            wait_for(lambda: not is_running(root))
            assert stop_cluster(root) is False
        wait_for(lambda: not any(is_alive(pid) for pid in everything))
        wait_for(lambda: not is_running(root))
        user.kill()
    assert job
    assert bystander.poll() is None, "a process that only knows SLURM_CONF is not the cluster's"
    bystander.kill()
    bystander.wait()
    assert not processes_of(root)
    assert stop_cluster(root) is False
    assert not root.exists()


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def sleepers(guardian: int) -> list[int]:
    """What the job runs: one process in a session of its own and one in a step."""
    commands = {pid: command_of(pid).split(b"\0") for pid in descendants([guardian])}
    return [pid for pid, words in commands.items() if words[0].endswith(b"sleep") and SLEEP.split()[1].encode() in words]


def is_alive(pid: int) -> bool:
    """Whether a thread of the process is: the first one may have ended before the others."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(stat.rpartition(")")[2].split()[0] not in "ZX" for stat in stats)


def test_nothing_outlives_stop(tmp_path: Path) -> None:
    require_slurm()
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_ITS_FIRST_THREAD)
    with FaultyCluster(short_folder(), nodes=1, gpus=0) as cluster:
        job = submit(cluster, f"setsid {sys.executable} {script} & {SLEEP}")
        everything = [int(wait_for(lambda: printed(cluster, job)))]
        everything += [guardian_pid(cluster), *descendants([guardian_pid(cluster)])]
        assert stop_cluster(cluster.root)
        assert [command_of(pid) for pid in everything if is_alive(pid)] == []


def test_start_works_on_the_remains_of_a_killed_one() -> None:
    require_slurm()
    with BoundCluster(short_folder(), nodes=1, gpus=1) as cluster:
        submit(cluster, SLEEP)
        below = descendants([guardian_pid(cluster)])
        for pid in [guardian_pid(cluster), *(pid for pid in below if b"devcluster_supervisor" in command_of(pid))]:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_running(cluster.root))
        with BoundCluster(cluster.root, nodes=1, gpus=1) as second:
            assert ask(second, "squeue", "-h") == ""
            assert len(set(below) & set(descendants([os.getpid()]))) == 0
    assert not cluster.root.exists()


# --- other systems


def test_it_starts_where_no_cgroups_are_mounted() -> None:
    """As in a chroot of Debian 13, whose slurmd 24.11 looks for them; 22.05 does so, too."""
    require_slurm()
    if os.geteuid() != 0:
        pytest.skip("only root can unmount them, in a mount namespace of its own")
    root = short_folder()
    script = """
        set -e
        mount --make-rprivate / 2>/dev/null && umount --recursive /sys/fs/cgroup 2>/dev/null || true
        ! grep --quiet /sys/fs/cgroup /proc/mounts || exit 77
        trap '"$1" -m vitpa.cli devcluster stop --dir "$2"' EXIT
        "$1" -m vitpa.cli devcluster start --nodes 1 --gpus 0 --dir "$2"
        SLURM_CONF="$2/etc/slurm.conf" srun echo here
    """
    answer = subprocess.run(
        ["unshare", "--mount", "--propagation=unchanged", "sh", "-c", script, "sh", sys.executable, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode == 77 or "unshare" in answer.stderr:
        pytest.skip(f"cgroups cannot be unmounted here: {answer.stderr}")
    assert (answer.returncode, "\nhere\n" in answer.stdout) == (0, True), answer.stderr
    assert not root.exists()


def test_the_database_is_there_before_slurmdbd_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MariaDB's client library 11.8.9 is of no use to a slurmdbd that has to make it."""
    require_slurm()
    real = shutil.which("slurmdbd", path=f"{os.environ['PATH']}:{':'.join(slurm.devcluster.SYSTEM_FOLDERS)}")
    (tmp_path / "slurmdbd").write_text(f'#!/bin/sh\nls db >log/databases\nexec {real} "$@"\n')
    (tmp_path / "slurmdbd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with BoundCluster(short_folder(), nodes=1, gpus=0) as cluster:
        assert "slurm_acct_db" in (cluster.root / "log/databases").read_text().split()


# --- the command line


def devcluster(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = vitpa.cli.main(["devcluster", *words])
    answer = capsys.readouterr()
    return code, answer.out, answer.err


def test_start_twice_status_stop_twice(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    root = short_folder()
    there = ("--dir", str(root))
    code, out, _ = devcluster(capsys, "start", *there, "--nodes", "2", "--gpus", "1")
    assert code == 0
    assert "2 nodes with 1 GPUs each, started in" in out
    assert f"\nexport SLURM_CONF={root}/etc/slurm.conf\n" in out
    code, again, _ = devcluster(capsys, "start", *there)
    assert (code, again.splitlines()[0]) == (0, f"a cluster runs in {root} already")
    assert again.splitlines()[1:] == out.splitlines()[1:]
    with pytest.raises(AlreadyRunningError):
        BoundCluster(root).start()
    assert devcluster(capsys, "status", *there)[:2][0] == 0
    code, out, _ = devcluster(capsys, "status", *there, "--json")
    facts = json.loads(out)
    assert (facts["up"], len(facts["nodes"]), facts["nodes"][0]["gpus"], facts["jobs"]) == (True, 2, 1, {})
    assert {part["name"]: part["state"] for part in facts["partitions"]} == {"main": "up", "low": "up"}
    submit(BoundCluster(root), SLEEP)
    code, out, _ = devcluster(capsys, "stop", *there, "--keep-logs")
    assert code == 0 and out.startswith("stopped in ")
    assert sorted(path.name for path in root.iterdir()) == ["devcluster.lock", "log"]
    assert devcluster(capsys, "stop", *there) == (0, f"no cluster runs in {root}\n", "")
    assert devcluster(capsys, "status", *there) == (1, f"no cluster runs in {root}\n", "")
    assert not root.exists()
    assert not processes_of(root)


def can_run(command: list[str]) -> bool:
    return subprocess.run([*command, "--help"], capture_output=True, check=False, cwd="/tmp").returncode == 0


def test_an_ordinary_user_has_one_too() -> None:
    require_slurm()
    runuser = shutil.which("runuser", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if os.geteuid() != 0 or runuser is None:
        pytest.skip("only root can become another user")
    prefix = [runuser, "-u", "nobody", "--", "env", "PATH=/usr/bin:/bin", "HOME=/tmp", f"PYTHONPATH={ROOT}"]
    pythons = [
        python for python in (sys.executable, "/usr/bin/python3") if can_run([*prefix, python, "-P", "-m", "vitpa.cli"])
    ]
    if not pythons:
        pytest.skip("another user cannot read this checkout, or run any Python from 3.11 on")
    as_nobody = [*prefix, pythons[0], "-P", "-m", "vitpa.cli"]
    root = short_folder()
    root.chmod(0o755)
    shutil.chown(root, "nobody")
    there = ["--dir", str(root)]
    started = subprocess.run(
        [*as_nobody, "devcluster", "start", *there], capture_output=True, text=True, check=False, cwd="/tmp"
    )
    try:
        assert started.returncode == 0, started.stderr
        print(started.stdout)
        environment = ["env", f"SLURM_CONF={root}/etc/slurm.conf"]
        job = [runuser, "-u", "nobody", "--", *environment, "srun", "--gpus-per-node=1", "sh", "-c"]
        answer = subprocess.run(
            [*job, "id -un; echo $CUDA_VISIBLE_DEVICES"], capture_output=True, text=True, check=False, cwd="/tmp"
        )
        assert answer.stdout.split() == ["nobody", "0"], answer.stderr
        addresses = listening(processes_of(root))
        assert len(addresses) == 1 and all(ipaddress.ip_address(address).is_loopback for address in addresses)
    finally:
        stopped = subprocess.run(
            [*as_nobody, "devcluster", "stop", *there], capture_output=True, text=True, check=False, cwd="/tmp"
        )
    assert stopped.stdout.startswith("stopped in "), stopped.stderr
    print(stopped.stdout)
    assert not processes_of(root)
    assert not root.exists()


# --- errors: one line that says what, where and how to fix it


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code, out, error = devcluster(capsys, "start", *words)
    assert (code, out, error.count("\n"), error[:18]) == (1, "", 1, "vitpa devcluster: ")
    return error


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slurm.devcluster, "SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(capsys)
    assert "not installed: munged, mariadbd, " in error
    assert "apt-get install munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core" in error


def test_a_folder_too_deep_for_sockets_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    require_slurm()
    deep = tmp_path / ("d" * 90)
    error = refused(capsys, "--dir", str(deep))
    assert "characters too long for the sockets below it; choose a folder with at most 61 characters" in error
    assert not deep.exists()


def test_folders_that_are_not_its_own_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    root = short_folder()
    precious = root / "etc"
    precious.mkdir()
    assert f"{root} holds other things; choose an empty or new folder" in refused(capsys, "--dir", str(root))
    assert devcluster(capsys, "stop", "--dir", str(root))[1] == f"no cluster runs in {root}\n"
    precious.rmdir()
    file = root / "file"
    file.touch()
    assert f"{file}/below: Not a directory; choose another folder" in refused(capsys, "--dir", str(file / "below"))
    assert "SLURM cannot hold a path with other characters" in refused(capsys, "--dir", f"{root}/a b")
    file.unlink()
    root.rmdir()


def strange_folders(root: Path) -> list[Path]:
    """Somebody's work, in folders that are called like a cluster's."""
    files = [root / name / "work" for name in ("db", "dev", "log", "etc", "state")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("years of it")
    return files


def test_a_link_that_leads_elsewhere_when_it_ends_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    base = short_folder()
    real, other, link = base / "real", base / "other", base / "link"
    real.mkdir(mode=0o700)
    files = strange_folders(other)
    link.symlink_to(real)
    code, out, _ = devcluster(capsys, "start", "--dir", str(link), "--nodes", "1", "--gpus", "0")
    assert code == 0 and f"export SLURM_CONF={real}/etc/slurm.conf" in out
    (real / "notes").write_text("mine")  # beside what the cluster has made
    link.unlink()
    link.symlink_to(other)
    assert devcluster(capsys, "stop", "--dir", str(link)) == (0, f"no cluster runs in {other}\n", "")
    assert is_running(real)
    # the folder itself gets another name, and another one its name
    moved = base / "moved"
    real.rename(moved)
    other.rename(real)
    supervisor = int((moved / "devcluster.lock").read_text())
    os.kill(supervisor, signal.SIGTERM)
    begin_s = time.monotonic()
    wait_for(lambda: not is_running(moved))
    assert time.monotonic() - begin_s < 2 * CLIENT_TIMEOUT_S  # no client of SLURM's waits for what is not there: four would
    wait_for(lambda: [path.name for path in moved.iterdir()] == ["notes"])
    assert [(real / file.relative_to(other)).read_text() for file in files] == ["years of it"] * len(files)
    shutil.rmtree(base)


def test_folders_that_it_has_not_made_stay(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    root = short_folder()
    (root / "devcluster.lock").touch()  # as after `stop --keep-logs`
    files = strange_folders(root)
    assert f"{root}/db is not of a cluster; remove it, or choose another folder" in refused(capsys, "--dir", str(root))
    assert devcluster(capsys, "stop", "--dir", str(root)) == (0, f"no cluster runs in {root}\n", "")
    assert [file.read_text() for file in files] == ["years of it"] * len(files)
    shutil.rmtree(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_what_is_somebody_elses_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    root = short_folder()
    for verb in ("start", "stop", "status"):
        root.chmod(0o700)
        os.chown(root, 65534, 65534)
        code, out, error = devcluster(capsys, verb, "--dir", str(root))
        assert (code, out) == (1, "")
        assert error == f"vitpa devcluster: {root} belongs to user nobody; choose another folder with --dir\n"
        os.chown(root, 0, 0)
        root.chmod(0o777)
        code, out, error = devcluster(capsys, verb, "--dir", str(root))
        assert (code, out, error) == (
            1,
            "",
            f"vitpa devcluster: {root} can be written to by others (mode 777); chmod 700 {root}\n",
        )
    root.rmdir()


@pytest.mark.timeout(60)
def test_a_lock_that_is_none_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    root = short_folder()
    precious, lock = root / "precious", root / "devcluster.lock"
    precious.write_text("12345")
    for what in ("link", "pipe", "folder"):
        if what == "link":
            lock.symlink_to(precious)
        elif what == "pipe":
            os.mkfifo(lock)
        else:
            lock.mkdir()
        for verb in ("start", "stop", "status"):
            code, out, error = devcluster(capsys, verb, "--dir", str(root))
            assert (code, out) == (1, "") and "not the lock of a cluster; remove it" in error and error.count("\n") == 1
        lock.rmdir() if what == "folder" else lock.unlink()
    assert precious.read_text() == "12345"
    shutil.rmtree(root)


def test_sizes_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    require_slurm()
    assert "99 nodes: from 1 to 64 are possible" in refused(capsys, "--nodes", "99")
    assert "99 GPUs per node: from 0 to 16 are possible" in refused(capsys, "--gpus", "99")


def test_a_host_name_that_leads_to_the_network_is_refused() -> None:
    with pytest.raises(DevClusterError, match=r"'10\.1\.2\.3' resolves to 10\.1\.2\.3, so SLURM would listen to the net"):
        check_host_name("10.1.2.3")
    with pytest.raises(
        DevClusterError, match=r"'no-such\.invalid' does not resolve .*add the line '127\.0\.0\.1 no-such\.invalid'"
    ):
        check_host_name("no-such.invalid")
    check_host_name("localhost")


def test_a_daemon_that_ends_at_the_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_slurm()
    (tmp_path / "slurmctld").write_text("#!/bin/sh\necho 'fatal: no luck today' >&2\nexit 7\n")
    (tmp_path / "slurmctld").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    root = short_folder()
    words = rf"slurmctld ended \(exit code 7\); the last line of {root}/log/slurmctld.out: fatal: no luck today"
    with pytest.raises(DevClusterError, match=words):
        BoundCluster(root, nodes=1).start()
    assert sorted(path.name for path in root.iterdir()) == ["devcluster.lock", "log"]
    assert not processes_of(root)
    stop_cluster(root)
    assert not root.exists()


def test_ports_that_are_taken_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(slurm.devcluster_config, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match="fewer than 1 free ports"):
            free_ports(1)
