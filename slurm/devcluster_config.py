"""What the development cluster's folder holds: its paths, ports and configuration files.

Configuration after slurm.conf(5), gres.conf(5), cgroup.conf(5), slurmdbd.conf(5) of SLURM 22.05 and 24.11. Starts nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import random
import re
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from vitpa.arguments import parse_integer
from vitpa.documents import DocumentError, read_bytes

RUN_TIME_FOLDERS = ("etc", "run", "db", "spool", "state", "dev")  # all that goes at the end; log goes unless it is wanted
LOG = "log"
MARK = ".devcluster"  # a file in each folder that the cluster has made; what others have put beside those is not removed
SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un.sun_path, less the final zero; see unix(7)
DATABASE = "slurm_acct_db"
RECORD_BYTES = 4096  # more than any of its own records has
PORTS = range(20_000, 32_000)  # below Linux's ephemeral ports, which outgoing connections take


@dataclass(frozen=True)
class Settings:
    """What may be chosen about a cluster."""

    nodes: int = 4
    gpus: int = 2  # per node, pretended
    cpus: int = 8  # per node, pretended
    max_array_size: int = 1001

    @property
    def node_names(self) -> list[str]:
        """Loopback addresses: names that every program resolves, torchrun's rendezvous included."""
        return [f"127.0.0.{index}" for index in range(1, self.nodes + 1)]


class Layout:
    """The files of a cluster, all below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = root / "devcluster.lock"  # locked while the supervisor lives, whose pid it holds; marks the folder as ours
        self.keep_logs = root / "log/keep"  # asks for the logs to be kept at the end
        self.slurm_conf = root / "etc/slurm.conf"  # what SLURM_CONF has to name
        self.munge_socket = root / "run/munge.sock"
        self.database_socket = root / "run/my.sock"  # mariadbd has no port

    def recorded_pid(self) -> int:
        """The process that has written itself down in the lock; 0 if none has."""
        try:
            return parse_integer(read_bytes(self.lock, RECORD_BYTES).decode(errors="replace").strip()) or 0
        except DocumentError:  # larger than that
            return 0

    def log(self, name: str) -> Path:
        """What a daemon writes itself."""
        return self.root / "log" / f"{name}.log"

    def output(self, name: str) -> Path:
        """What a daemon prints."""
        return self.root / "log" / f"{name}.out"

    def last_words(self, name: str) -> tuple[Path, str]:
        """The log of a daemon that has something to say, and its last line."""
        for path in (self.log(name), self.output(name)):
            with contextlib.suppress(OSError):
                if text := path.read_text(encoding="utf-8", errors="replace").strip():
                    return path, text.splitlines()[-1].strip()
        return self.output(name), "(empty)"

    def make_folder(self, name: str, folder: int) -> None:
        """Make a folder in `root`, whose descriptor is `folder`, with a mark that it is the cluster's."""
        os.mkdir(name, 0o700, dir_fd=folder)
        os.close(os.open(f"{name}/{MARK}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder))

    def remove_folder(self, name: str, folder: int) -> None:
        """Remove a folder in `root`, whose descriptor is `folder`, if the cluster has made it."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode) and os.lstat(f"{name}/{MARK}", dir_fd=folder):
                shutil.rmtree(name, ignore_errors=True, dir_fd=folder)

    def remove(self, folder: int, *, keep_logs: bool) -> None:
        """Remove what the cluster has made, and `root` if nothing else is in it; logs stay with the lock, as its mark.

        `folder` is the descriptor of `root`: another folder may have got its name meanwhile.
        """
        for name in RUN_TIME_FOLDERS if keep_logs else (*RUN_TIME_FOLDERS, LOG):
            self.remove_folder(name, folder)
        if keep_logs:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.lock.name, dir_fd=folder)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(folder), self.root.lstat()):
                self.root.rmdir()


def resolved(root: Path) -> Path:
    """A cluster's folder without links: asked for once, since a link may lead elsewhere when the cluster ends."""
    return Path(os.path.realpath(root))  # Path.resolve raises RuntimeError for a link to itself, up to Python 3.12


def user_name() -> str:
    """Whose cluster this is."""
    return pwd.getpwuid(os.geteuid()).pw_name


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, at random, so that clusters started at the same time do not choose the same."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} free ports from {PORTS.start} to {PORTS.stop - 1}")


def write_configuration(layout: Layout, settings: Settings, slurmd_version: str, folder: int) -> None:
    """Make the folders and every configuration file, for this user and host, with free ports.

    `slurmd_version` is what `slurmd -V` prints, such as "slurm-wlm 24.11.5"; `folder` the descriptor of the layout's root.

    Raises:
        FileExistsError: there is a folder of such a name, which the cluster has not made.
    """
    for name in RUN_TIME_FOLDERS:
        layout.make_folder(name, folder)
    for index in range(settings.gpus):
        (layout.root / f"dev/gpu{index}").symlink_to("/dev/null")  # plain files, and one file for all, are refused
    user = user_name()
    controller, accounting, *nodes = free_ports(2 + settings.nodes)
    etc = layout.root / "etc"
    _write(etc / "munge.key", os.urandom(128))
    _write(etc / "my.cnf", _my_cnf(layout, user).encode())
    _write(etc / "database.sql", f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n".encode())
    _write(etc / "slurmdbd.conf", _slurmdbd_conf(layout, user, accounting).encode())
    gpus = [f"Name=gpu File={layout.root}/dev/gpu{index}\n" for index in range(settings.gpus)]
    _write(etc / "gres.conf", "".join(gpus).encode())
    _write(etc / "cgroup.conf", _cgroup_conf(slurmd_version).encode())
    _write(layout.slurm_conf, _slurm_conf(layout, settings, user, [controller, accounting, *nodes]).encode())


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


SAME_EVERYWHERE = """# processes: no cgroups, so that it runs in a container and without root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none

# scheduling: quick, and a job of `main` preempts one of `low`
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
KillWait=5
OverTimeLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=1
"""


def _slurm_conf(layout: Layout, settings: Settings, user: str, ports: list[int]) -> str:
    root = layout.root
    controller, accounting, *node_ports = ports
    host = socket.gethostname().split(".")[0]
    gres = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={settings.cpus} RealMemory=64000{gres}"
        for name, port in zip(settings.node_names, node_ports, strict=True)
    )
    return f"""# A cluster for rehearsals, all on this machine.
ClusterName=devcluster_{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={layout.log("slurmctld")}
SlurmdLogFile={layout.log("slurmd.%n")}
MailProg=/bin/true
FirstJobId={random.randint(1000, 33_000)}
MaxArraySize={settings.max_array_size}

# who is who, and who may listen where: loopback only, given a host name that resolves to loopback
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={layout.munge_socket},cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

{SAME_EVERYWHERE}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={layout.munge_socket}

# pretended hardware
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
"""


def _cgroup_conf(slurmd_version: str) -> str:
    """No cgroups. slurmd looks for them even if nothing uses them, and ends where none are mounted, as in a chroot.

    SLURM knows `disabled` since 24.05. Before, the plugin for version 1 touches nothing until something uses it.
    """
    number = re.search(r"(\d+)\.(\d+)", slurmd_version)
    disabled = number is not None and (int(number[1]), int(number[2])) >= (24, 5)
    return f"CgroupPlugin={'disabled' if disabled else 'cgroup/v1'}\n"


def _slurmdbd_conf(layout: Layout, user: str, port: int) -> str:
    return f"""AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
CommunicationParameters=NoInAddrAny
SlurmUser={user}
LogFile={layout.log("slurmdbd")}
PidFile={layout.root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc={DATABASE}
"""


def _my_cnf(layout: Layout, user: str) -> str:
    """The database is there before slurmdbd asks for it.

    slurmdbd would make it: it connects, fails, creates it and connects again with the same handle. MariaDB's client library
    11.8.9 believes of such a handle that a result may have 0 columns, and refuses every answer with error 5027.
    """
    return f"""[mysqld]
datadir={layout.root}/db
socket={layout.database_socket}
pid-file={layout.root}/run/my.pid
log-error={layout.log("mariadbd")}
user={user}
skip-networking
skip-grant-tables
skip-log-bin
init_file={layout.root}/etc/database.sql
innodb_flush_log_at_trx_commit=0
innodb_doublewrite=0
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
performance_schema=OFF
"""
