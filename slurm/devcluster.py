"""A real SLURM on this machine, in one private folder, for rehearsals and tests; nothing of it is left afterwards.

`DevCluster` starts one, whose life is bound to this process's until it is told to stay. The daemons belong to
`slurm.devcluster_supervisor`, the folder is held as `slurm.devcluster_folder` says.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from slurm import devcluster_processes as processes
from slurm.devcluster_config import SOCKET_PATH_LIMIT, Layout, Settings, resolved
from slurm.devcluster_folder import DevClusterError, claim, clear, is_running

PACKAGES = "munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core"
PROGRAMS = (
    *("munged", "mariadbd", "mariadb-install-db", "my_print_defaults", "slurmdbd", "slurmctld", "slurmd"),
    *("sinfo", "squeue", "scancel", "scontrol", "sacctmgr", "sacct", "sbatch", "srun"),
)
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where daemons are; not in an ordinary user's PATH
STOP_STILL_S = 60  # without a sign of life, after which the cluster is not waited for any more but killed
CLIENT_VARIABLES = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SINFO|SQUEUE|SACCT|SCANCEL|SCONTROL)_")


class DaemonError(DevClusterError):
    """A daemon has ended, or an order cannot be carried out."""


def default_root() -> Path:
    """A folder with a short path on a local disk, the same from every folder and shell."""
    return Path(f"/tmp/vitpa-devcluster-{os.geteuid()}")


def client_environment(root: Path) -> dict[str, str]:
    """This process's environment with the cluster in `root` as its SLURM, free of what another one or a job has set."""
    kept = {key: value for key, value in os.environ.items() if not CLIENT_VARIABLES.match(key)}
    return {**kept, "SLURM_CONF": str(Layout(root).slurm_conf), "PATH": _path()}


def _path() -> str:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join([*folders, *(folder for folder in SYSTEM_FOLDERS if folder not in folders)])


class DevCluster:
    """A cluster in the folder `root`; `sizes` are fields of `Settings`, such as `nodes` and `gpus` of each, pretended.

    Names of the nodes are loopback addresses. Partitions: `main` (the default) and `low`, whose jobs are requeued when one
    of `main` needs their place.
    """

    supervisor = "slurm.devcluster_supervisor"  # the module that is started to own the daemons

    def __init__(self, root: Path, **sizes: int) -> None:
        self.root = resolved(root)  # once: a link may lead elsewhere when the cluster ends
        self.layout = Layout(self.root)
        self.settings = Settings(**sizes)
        self.start_time_s = 0.0
        self._supervisor: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For the clients of this cluster: sbatch, squeue, submitit."""
        return client_environment(self.root)

    def start(self) -> None:
        """Start everything and wait until jobs can be submitted. What an earlier, killed cluster left here goes first.

        Raises:
            AlreadyRunningError: there is one.
            DevClusterError: something is missing, or a daemon ended.
        """
        begin = time.monotonic()
        check_programs()
        check_user()
        check_host_name(socket.gethostname())
        check_root(self.root, self.settings)
        try:
            self._start_daemons()
        except DaemonError:  # a port may have been taken between its choice and its use: once more, with others
            self._start_daemons()
        self.start_time_s = time.monotonic() - begin

    def _start_daemons(self) -> None:
        with claim(self.root) as claimed:
            _end_remains(self.layout)
            clear(self.layout, claimed.folder)
            descriptors = [claimed.lock, claimed.folder]
            with self.layout.output("supervisor").open("wb") as output:
                self._supervisor = subprocess.Popen(
                    [
                        *(sys.executable, "-m", self.supervisor),
                        *(str(self.root), json.dumps(asdict(self.settings)), *map(str, descriptors)),
                    ],
                    env={**self.environment, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PYTHONSAFEPATH": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    encoding="utf-8",
                    errors="replace",
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            os.ftruncate(claimed.lock, 0)
            os.pwrite(claimed.lock, str(self._supervisor.pid).encode(), 0)
        try:
            self._read_answer()
        except BaseException:
            self._leave()
            raise

    def stay(self) -> None:
        """Leave the cluster to itself: it lives on after this process, until `stop_cluster`."""
        self._order("stay")
        assert self._supervisor and self._supervisor.stdin and self._supervisor.stdout
        self._supervisor.stdin.close()
        self._supervisor.stdout.close()
        self._supervisor.returncode = 0  # nobody waits for it
        self._supervisor = None

    def _leave(self) -> None:
        """Let go of the supervisor; one that was not told to stay ends the cluster at once."""
        assert self._supervisor
        with contextlib.suppress(BrokenPipeError), self._supervisor:
            pass  # its pipes are closed and its end is waited for
        self._supervisor = None

    def _order(self, what: str, **arguments: str) -> None:
        assert self._supervisor and self._supervisor.stdin, "the cluster is not started"
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._supervisor.stdin.flush()
        self._read_answer()

    def _read_answer(self) -> None:
        assert self._supervisor and self._supervisor.stdout
        line = self._supervisor.stdout.readline()
        if not line:
            path, words = self.layout.last_words("supervisor")
            raise DaemonError(f"the cluster in {self.root} has ended; the last line of {path}: {words}")
        answer = json.loads(line)
        if "error" in answer:
            raise DaemonError(answer["error"])


# --- before the start


def check_programs() -> None:
    """Refuse to start without SLURM."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        raise DevClusterError(f"not installed: {', '.join(missing)}; on Debian or Ubuntu: apt-get install {PACKAGES}")


def check_user() -> None:
    """Refuse a user without a name."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise DevClusterError(
            f"user {os.geteuid()} has no entry in /etc/passwd, which SLURM needs; add one (useradd --uid {os.geteuid()} NAME)"
        ) from None


def check_host_name(name: str) -> None:
    """Refuse a host whose name is not a loopback address: SLURM listens on what the name resolves to."""
    hint = f"add the line '127.0.0.1 {name}' to /etc/hosts, before any other with that name"
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError as error:
        raise DevClusterError(f"this host's name {name!r} does not resolve ({error.strerror}); {hint}") from None
    foreign = sorted(address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback)
    if foreign:
        raise DevClusterError(
            f"this host's name {name!r} resolves to {', '.join(foreign)}, so SLURM would listen to the network; {hint}"
        )


def check_root(root: Path, settings: Settings) -> None:
    """Refuse a path that SLURM cannot hold and sizes that make no sense."""
    if not 1 <= settings.nodes <= 64:
        raise DevClusterError(f"{settings.nodes} nodes: from 1 to 64 are possible")
    if not 0 <= settings.gpus <= 16:
        raise DevClusterError(f"{settings.gpus} GPUs per node: from 0 to 16 are possible")
    if re.search(r"[^\w./+-]", str(root), re.ASCII):
        raise DevClusterError(f"{str(root)!r}: SLURM cannot hold a path with other characters than A-Z a-z 0-9 . _ / + -")
    name = settings.node_names[-1]
    longest = f"{root}/spool/{name}/{name}_99999999.4294967295"  # of unix sockets: that of a job step, below slurmd's folder
    excess = len(longest) - SOCKET_PATH_LIMIT
    if excess > 0:
        raise DevClusterError(
            f"{root}: the path is {excess} characters too long for the sockets below it; choose a folder with at most "
            f"{len(str(root)) - excess} characters, such as {default_root()}"
        )


# --- the end


def stop_cluster(root: Path, *, keep_logs: bool = False) -> bool:
    """Stop the cluster in a folder, whoever started it; False if there was none. What a killed one left goes, too."""
    root = resolved(root)
    layout = Layout(root)
    found = is_running(root)
    if found:
        if keep_logs:
            layout.keep_logs.touch()
        _end_supervisor(layout)
    if not keep_logs and layout.lock.exists():  # of a cluster whose supervisor is dead
        with claim(root) as claimed:
            _end_remains(layout)
            layout.remove(claimed.folder, keep_logs=False)
    return found


def _end_supervisor(layout: Layout) -> None:
    """Ask it to stop and wait for its own end, which comes after that of all others; if it cannot, end all below it, too."""
    pid = layout.recorded_pid()
    with _opened(pid) as goes_on:
        command = _command_line(pid)
        ours = str(layout.root) in command and any(word.endswith(".devcluster_supervisor") for word in command)
        if ours:
            processes.kill([pid], signal.SIGTERM)
        life = processes.SignsOfLife(lambda: processes.with_descendants([pid]))
        while is_running(layout.root) or (ours and goes_on()):  # it lets go of the folder before it has ended
            if ours and life.idle_s() > STOP_STILL_S:
                processes.kill([*processes.descendants([pid]), pid])
            time.sleep(0.02)


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[Callable[[], bool]]:
    """Whether the process that has this id now has not ended yet, whoever gets its id later."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it is dead already
        yield lambda: False
        return
    try:
        yield lambda: not select.select([descriptor], [], [], 0)[0]
    finally:
        os.close(descriptor)


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _end_remains(layout: Layout) -> None:
    processes.kill_all(lambda: processes.remains_of(layout.root, layout.slurm_conf))
