"""The command line of `vitpa devcluster`: start, stop, status, and chaos, which is a room of its own."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import slurm.chaos.command
from slurm.devcluster import DevCluster, default_root, stop_cluster
from slurm.devcluster_config import Layout, Settings, resolved
from slurm.devcluster_folder import AlreadyRunningError
from slurm.devcluster_status import as_text, status_of
from vitpa.arguments import IntermixedParser, in_shell, path_argument, whole_number
from vitpa.errors import run_command

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

OK, ERROR = 0, 1
DEFAULTS = Settings()
DESCRIPTION = """A real SLURM on this machine, for rehearsals: munged, mariadbd, slurmdbd, slurmctld and a slurmd per node, as
you, in one private folder, listening on loopback only. CPUs and GPUs of the nodes are pretended: jobs see
CUDA_VISIBLE_DEVICES, but no hardware. Partitions: main, and low, whose jobs main preempts (requeue)."""
VERBS = {
    "start": ("start it and say how to use it", "vitpa devcluster start --nodes 2 --gpus 4"),
    "stop": ("cancel its jobs, end it, leave nothing behind", "vitpa devcluster stop"),
    "status": ("nodes, GPUs, partitions, jobs; exit code 0 up, 1 down", "vitpa devcluster status --json"),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add `devcluster` and its verbs to the `vitpa` command."""
    devcluster = subparsers.add_parser(
        "devcluster",
        help="start and stop a real SLURM on this machine, to rehearse sweeps",
        description=DESCRIPTION,
        epilog="example: vitpa devcluster start",
    )
    verbs = devcluster.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=IntermixedParser)
    for verb, (text, example) in VERBS.items():
        parser = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}")
        parser.add_argument(
            "--dir", type=path_argument, default=default_root(), help="its folder, on a local disk (default: %(default)s)"
        )
        if verb == "start":
            parser.add_argument(
                "--nodes", type=whole_number(0, 250), default=DEFAULTS.nodes, help="nodes (default: %(default)s)"
            )
            parser.add_argument(
                "--gpus", type=whole_number(0, 128), default=DEFAULTS.gpus, help="GPUs per node (default: %(default)s)"
            )
        if verb == "stop":
            parser.add_argument("--keep-logs", action="store_true", help="keep DIR/log; the next start or stop removes it")
        if verb == "status":
            parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=_run)
    slurm.chaos.command.add_parser(verbs)


def _run(options: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {"start": _start, "stop": _stop, "status": _status}
    return run_command("vitpa devcluster", lambda: actions[options.verb](options))


def _start(options: argparse.Namespace) -> int:
    cluster = DevCluster(options.dir, nodes=options.nodes, gpus=options.gpus)
    try:
        cluster.start()
    except AlreadyRunningError as error:
        print(f"{error} already\n{_use(cluster.root)}")
        return OK
    print(f"{options.nodes} nodes with {options.gpus} GPUs each, started in {cluster.start_time_s:.1f} s: {cluster.root}")
    print(_use(cluster.root), flush=True)
    cluster.stay()
    return OK


def _use(root: Path) -> str:
    default = "" if root == default_root() else f" --dir {in_shell(root)}"
    return f"""
export SLURM_CONF={shlex.quote(str(Layout(root).slurm_conf))}
vitpa sweep submit demo --profile devcluster --wait
vitpa devcluster stop{default}"""


def _stop(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    root = resolved(options.dir)
    if stop_cluster(root, keep_logs=options.keep_logs):
        kept = f"; its logs are in {root}/log" if options.keep_logs else ""
        print(f"stopped in {time.monotonic() - begin:.1f} s{kept}")
    else:
        print(f"no cluster runs in {root}")
    return OK


def _status(options: argparse.Namespace) -> int:
    facts = status_of(options.dir)
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return OK if facts["up"] else ERROR
