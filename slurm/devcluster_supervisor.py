"""The process that owns a development cluster: `python -m slurm.devcluster_supervisor ROOT SETTINGS LOCK FOLDER`.

A guardian and, below it, the supervisor, whose children are the daemons. Both adopt orphans, so every process of the
cluster, the jobs' included, is a descendant of both. If the supervisor dies the guardian ends what is left; if the guardian
dies the supervisor does. It takes orders on stdin, one JSON document a line, and answers on stdout; the end of stdin is the
end of the cluster, unless it was told to stay.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm import devcluster_processes as processes
from slurm.devcluster_config import Layout, Settings, user_name, write_configuration
from vitpa.child_process import die_with_parent, run_program

STILL_S = 60.0  # without a sign of life of the daemons, after which something is not waited for any more
CLIENT_TIMEOUT_S = 60
QUEUE_TIMEOUT_S = 8  # for jobs to end; KillWait is 5 s
GRACE_S = 3.0  # without a sign of life, for a daemon to end
POLL_S = 0.02
IDLE_S = 0.25


class FailedError(Exception):
    """An order cannot be carried out; the text is for the user."""


class EndedError(Exception):
    """The cluster is to end: SIGTERM, or nobody holds the other end of stdin."""


class Supervisor:
    """The daemons of one cluster, as children of this process."""

    def __init__(self, layout: Layout, folder: int, settings: Settings, environment: dict[str, str]) -> None:
        self.layout, self.folder = layout, folder  # the descriptor of its root
        self.settings = settings
        self.environment = environment  # of every daemon and client
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.bound = True  # to stdin
        self.terminated = False
        self.failed = False
        self._stdin = select.poll()
        self._stdin.register(0, 0)  # only its end

    # --- life

    def run(self) -> None:
        """Start everything, carry out orders, stop."""
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._order({"do": "start"})
            while True:
                self._tick()
                if self.bound and select.select([0], [], [], IDLE_S)[0]:
                    line = sys.stdin.readline()
                    if line:
                        self._order(json.loads(line))
                elif not self.bound:
                    time.sleep(IDLE_S)
        except EndedError:
            pass
        if self.terminated:
            self.stop()

    def _terminate(self, *_: object) -> None:
        self.terminated = True

    def _order(self, order: dict[str, Any]) -> None:
        what, answer = order.pop("do"), {}
        try:
            getattr(self, what)(**order)
        except FailedError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
        if answer and what == "start":
            self.failed = True
            raise EndedError

    def _tick(self) -> None:
        """Take in what has ended; raise if the cluster is to end."""
        ended = processes.reap()
        for process in self.daemons.values():
            if process.pid in ended:
                process.returncode = ended[process.pid]
        if self.terminated or (self.bound and self._stdin.poll(0)):
            raise EndedError

    def _wait(self, what: str, condition: Callable[[], bool], daemon: str = "") -> None:
        """Wait as long as the daemons, or what they have started, get on: a busy machine may take minutes."""
        life = processes.SignsOfLife(lambda: processes.with_descendants(each.pid for each in self.daemons.values()))
        while not condition():
            self._tick()
            if daemon and self.daemons[daemon].returncode is not None:
                raise FailedError(self._obituary(daemon))
            if life.idle_s() > STILL_S:
                raise FailedError(
                    f"{what} did not come, and no daemon has done anything for {STILL_S:.0f} s; see the logs in "
                    f"{self.layout.root}/log"
                )
            time.sleep(POLL_S)

    def _obituary(self, name: str) -> str:
        path, line = self.layout.last_words(name)
        return f"{name} ended (exit code {self.daemons[name].returncode}); the last line of {path}: {line}"

    # --- start

    def start(self) -> None:
        """Everything, in the order in which one needs the other."""
        write_configuration(self.layout, self.settings, slurmd_version=self._ask("slurmd", "-V"), folder=self.folder)
        root, etc = self.layout.root, self.layout.root / "etc"
        self._spawn(
            "munged",
            "--foreground",
            "--force",  # although the folder is private
            f"--key-file={etc}/munge.key",
            f"--socket={self.layout.munge_socket}",
            f"--pid-file={root}/run/munged.pid",
            f"--seed-file={root}/run/munged.seed",
        )
        self._spawn(
            "mariadb-install-db",
            "--no-defaults",
            f"--user={user_name()}",
            f"--datadir={root}/db",
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )
        install = self.daemons["mariadb-install-db"]
        self._wait("mariadb-install-db", lambda: install.returncode is not None)
        if install.returncode != 0:
            raise FailedError(self._obituary("mariadb-install-db"))
        del self.daemons["mariadb-install-db"]
        self._spawn("mariadbd", f"--defaults-file={etc}/my.cnf")
        self._wait("mariadbd's answer", lambda: answers(self.layout.database_socket), "mariadbd")
        self._wait("munged's answer", self.layout.munge_socket.exists, "munged")
        self.start_accounting()
        self._start_controller()
        for name in self.settings.node_names:
            self._spawn(f"slurmd.{name}", "-D", "-N", name)
        self._wait("idle nodes", self._all_idle)
        self._wait("accounting's answer", lambda: bool(self._ask("sacctmgr", "-n", "list", "cluster").strip()))

    def _spawn(self, name: str, *arguments: str) -> None:
        """Start a daemon in the foreground, bound to this process's life; `slurmd.NODE` is slurmd."""
        program = name.partition(".")[0]
        with self.layout.output(name).open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments],
                cwd=self.layout.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=processes.bound_to_this_process(),  # noqa: PLW1509 - there are no threads here
            )

    def _start_controller(self) -> None:
        self._spawn("slurmctld", "-D")
        self._wait("slurmctld's answer", lambda: "UP" in self._ask("scontrol", "ping"), daemon="slurmctld")

    def _all_idle(self) -> bool:
        for name, process in self.daemons.items():
            if process.returncode is not None:
                raise FailedError(self._obituary(name))
        return self._ask("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * self.settings.nodes

    def _ask(self, *command: str) -> str:
        """What a client prints, nothing if it fails."""
        try:
            answer = run_program(command, env=self.environment, timeout_s=CLIENT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return ""
        return answer.stdout if answer.returncode == 0 else ""

    # --- orders

    def stay(self) -> None:
        """Live on when whoever gives orders ends."""
        self.bound = False

    def start_accounting(self) -> None:
        """Start slurmdbd and wait until it says so."""
        log = self.layout.log("slurmdbd")
        said = log.read_text(encoding="utf-8").count(" started") if log.exists() else 0
        self._spawn("slurmdbd", "-D")
        self._wait(
            "slurmdbd's start", lambda: log.exists() and log.read_text(encoding="utf-8").count(" started") > said, "slurmdbd"
        )

    # --- stop

    def stop(self) -> None:
        """Cancel the jobs, wait for an empty queue, end the daemons that need others before the others."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].returncode is None and self._is_in_place():
            self._empty_queue()
        slurmds = [name for name in self.daemons if name.startswith("slurmd.")]
        for names in (slurmds, ["slurmctld"], ["slurmdbd"], ["mariadbd"], ["munged"]):
            self._end_all([name for name in names if name in self.daemons], signal.SIGTERM)

    def _is_in_place(self) -> bool:
        """Whether the cluster's folder still has its name; without slurm.conf each of SLURM's clients waits for a minute."""
        try:
            return os.path.samestat(os.fstat(self.folder), self.layout.root.stat())
        except OSError:
            return False

    def _empty_queue(self) -> None:
        for options in ([], ["-f", "-s", "KILL"]):
            jobs = self._ask("squeue", "-h", "-o", "%A").split()
            deadline = time.monotonic() + QUEUE_TIMEOUT_S
            if jobs:
                self._ask("scancel", *options, *sorted(set(jobs)))
            while self._ask("squeue", "-h", "-o", "%A").strip() and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def _end_all(self, names: list[str], signal_number: int) -> None:
        """End daemons side by side: by a signal, after a grace by SIGKILL."""
        living = [self.daemons[name] for name in names if self.daemons[name].returncode is None]
        processes.kill([process.pid for process in living], signal_number)
        life = processes.SignsOfLife(lambda: processes.with_descendants(process.pid for process in living))
        while living:
            ended = processes.reap()
            for process in self.daemons.values():
                process.returncode = ended.get(process.pid, process.returncode)
            living = [process for process in living if process.returncode is None]
            if life.idle_s() > GRACE_S:
                processes.kill([process.pid for process in living])
            time.sleep(POLL_S / 4)


def answers(path: Path) -> bool:
    """Whether a server greets on a unix socket, as mariadbd does when it is ready."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
            return bool(client.recv(1))
        except OSError:
            return False


def supervise(layout: Layout, folder: int, settings: Settings, kind: type[Supervisor]) -> bool:
    """Own the cluster until its end; whether something failed, so that its logs are worth keeping."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TZ") if key in os.environ}
    environment |= {"SLURM_CONF": str(layout.slurm_conf), "MYSQL_UNIX_PORT": str(layout.database_socket)}
    supervisor = kind(layout, folder, settings, environment)
    try:
        supervisor.run()
    except Exception:
        traceback.print_exc()  # into the supervisor's log
        supervisor.failed = True
    processes.kill_descendants()
    return supervisor.failed


def main(arguments: list[str], kind: type[Supervisor] = Supervisor) -> None:
    """Be the guardian: start the supervisor, wait for its end, leave nothing."""
    root, settings_json = arguments[:2]
    lock, folder = map(int, arguments[2:])  # descriptors: of the lock, and of ROOT, whose name may come to mean another folder
    layout, settings = Layout(Path(root)), Settings(**json.loads(settings_json))
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    processes.adopt_orphans()
    guardian = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        die_with_parent(guardian, signal.SIGTERM)
        processes.adopt_orphans()
        failed = supervise(layout, folder, settings, kind)
        if os.getppid() != guardian:
            layout.remove(folder, keep_logs=True)
        os._exit(int(failed))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(supervisor, signal.SIGTERM))
    os.close(0)
    os.close(1)
    pid = status = 0
    while pid != supervisor:
        pid, status = os.waitpid(-1, 0)
    processes.kill_descendants()
    layout.remove(folder, keep_logs=status != 0 or layout.keep_logs.exists())
    os.close(lock)


if __name__ == "__main__":
    main(sys.argv[1:])
