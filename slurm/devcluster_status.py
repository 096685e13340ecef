"""What a development cluster looks like now: nodes, GPUs, partitions, jobs, as its own clients tell it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from slurm.devcluster import client_environment
from slurm.devcluster_config import Layout, resolved
from slurm.devcluster_folder import DevClusterError, is_running
from vitpa.child_process import run_program

CLIENT_TIMEOUT_S = 20


def status_of(root: Path) -> dict[str, Any]:
    """The facts, ready for JSON; `{"up": False, ...}` if no cluster runs there, with `problem` if one runs but is ill."""
    root = resolved(root)
    facts: dict[str, Any] = {"up": False, "dir": str(root), "slurm_conf": str(Layout(root).slurm_conf)}
    if not is_running(root):
        return facts
    if not Layout(root).slurm_conf.exists():
        return {**facts, "problem": "it is being started or stopped"}
    try:
        facts["nodes"] = [_node(line) for line in _ask(root, "sinfo", "-N", "-p", "main", "-O", NODE_COLUMNS)]
        columns = ("name", "state", "nodes")
        facts["partitions"] = [dict(zip(columns, line.split(), strict=True)) for line in _ask(root, "sinfo", "-o", "%R %a %D")]
        facts["jobs"] = dict(Counter(line.lower() for line in _ask(root, "squeue", "-r", "-o", "%T")))
    except OSError as error:
        return {**facts, "problem": f"{error.filename}: {error.strerror}"}
    except DevClusterError as error:
        return {**facts, "problem": str(error)}
    return {**facts, "up": True}


NODE_COLUMNS = "NodeList:40,StateLong:30,CPUsState:30,Gres:60,GresUsed:60"


def _node(line: str) -> dict[str, Any]:
    name, state, cpus, *gpus = line.split()
    used, _, _, total = map(int, cpus.split("/"))  # allocated, idle, other, total
    there, taken = (sum(map(int, re.findall(r"gpu:(?:\(null\):|[^:(]*:)?(\d+)", text))) for text in gpus)
    return {"name": name, "state": state, "cpus": total, "cpus_used": used, "gpus": there, "gpus_used": taken}


def _ask(root: Path, program: str, *options: str) -> list[str]:
    try:
        answer = run_program([program, "-h", *options], env=client_environment(root), timeout_s=CLIENT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DevClusterError(f"{program} does not answer within {CLIENT_TIMEOUT_S} s; see {root}/log/slurmctld.log") from None
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise DevClusterError(f"{said}; see {root}/log/slurmctld.log")
    return [line for line in answer.stdout.splitlines() if line.strip()]


def as_text(facts: dict[str, Any]) -> str:
    """For people."""
    if not facts["up"]:
        return f"no cluster runs in {facts['dir']}" if "problem" not in facts else f"{facts['dir']}: {facts['problem']}"
    nodes, jobs = facts["nodes"], facts["jobs"]
    lines = [f"up: {facts['dir']}"]
    lines += [
        f"{node['name']:<12} {node['state']:<12} {node['gpus_used']}/{node['gpus']} GPUs  "
        f"{node['cpus_used']}/{node['cpus']} CPUs in use"
        for node in nodes
    ]
    lines.append("partitions: " + ", ".join(f"{part['name']} ({part['state']})" for part in facts["partitions"]))
    lines.append("jobs: " + (", ".join(f"{count} {state}" for state, count in sorted(jobs.items())) or "none"))
    return "\n".join([*lines, f"export SLURM_CONF={shlex.quote(facts['slurm_conf'])}"])
