"""What `vitpa doctor` runs where the training would run: inside a SLURM job, or on this machine.

    python -P probe.py SPECIFICATION [FOLDER]

With FOLDER, shared with the launcher, it is a job: it leaves its report there, and asks SLURM to requeue it. Without, it
prints the report. It needs the standard library only; what it imports for trial is imported by child processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # it is started by its path

from vitpa.child_process import child_environment, run_program
from vitpa.installation import has_bytecode

IMPORTS = {"vitpa": "vitpa.config, submitit, vitpa", "torch": "torch", "ffcv": "ffcv"}  # the last one's version is shown
LIMIT_S = 150
PING_LIMIT_S = 60
POLL_S = 0.1


def main(arguments: list[str]) -> int:
    """Look around and report."""
    specification = json.loads(arguments[0])
    if len(arguments) == 1:
        print(json.dumps(look(specification)))
        return 0
    folder, node = Path(arguments[1]), int(os.environ.get("SLURM_NODEID", "0"))
    try:
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
            if node == 0:
                write(folder / "restarted.json", {"restart": int(os.environ["SLURM_RESTART_COUNT"])})
            return 0
        write(folder / f"hello.{node}.json", {"host": socket.gethostname(), "utc_s": time.time()})
        if node == 0:
            answer_ping(folder)
        write(folder / f"report.{node}.json", look(specification))
        if node == 0:
            requeue(folder, int(os.environ.get("SLURM_JOB_NUM_NODES", "1")))
    except OSError as error:
        print(f"{socket.gethostname()}: {error.filename or folder}: {error.strerror}")
        return 1
    return 0


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file that is whole as soon as it is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(path)


def answer_ping(folder: Path) -> None:
    """Answer a file of the launcher's with one of ours: how long that takes is how long each waits for the other's files."""
    deadline = time.monotonic() + PING_LIMIT_S
    while not (folder / "ping").exists():
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_S)
    write(folder / "pong.json", {"utc_s": time.time()})


def requeue(folder: Path, nodes: int) -> None:
    """When every node has reported, ask SLURM to put this job back into the queue."""
    deadline = time.monotonic() + LIMIT_S
    while len(list(folder.glob("report.*.json"))) < nodes and time.monotonic() < deadline:
        time.sleep(POLL_S)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM ends what it requeues
    write(folder / "requeue.json", {"error": ""})
    error = words_of(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])[1]
    if error:
        write(folder / "requeue.json", {"error": error})
    else:
        time.sleep(LIMIT_S)


def look(specification: dict[str, Any]) -> dict[str, Any]:
    """What there is: Python, packages, GPUs, and what the pre-flight says for each data set."""
    shown, error = words_of(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    gpus = [] if error else shown.splitlines()
    wanted = len(gpus) if specification["gpus"] is None else specification["gpus"]
    with ThreadPoolExecutor() as pool:
        imports = {name: pool.submit(try_import, names) for name, names in IMPORTS.items()}
        checks = pool.submit(preflights, specification, wanted)
    return {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "imports": {name: found.result() for name, found in imports.items()},
        "checks": checks.result(),
    }


def try_import(names: str) -> dict[str, Any]:
    """Import modules in a process of their own; the version of the last one, and whether that is kept compiled.

    vitpa itself has too few files for that to matter.
    """
    package = names.rpartition(", ")[2]
    program = f"import {names}, importlib.metadata; print(importlib.metadata.version({package!r}))"
    output, error = words_of([sys.executable, "-W", "ignore", "-c", program])
    return {"ok": not error, "detail": error or output, "compiled": bool(error) or package == "vitpa" or has_bytecode(package)}


def preflights(specification: dict[str, Any], gpus: int) -> list[dict[str, Any]]:
    """The checks of `python -m vitpa.preflight`: all for the first data set, the files only for the others."""
    datasets = specification["datasets"] or [""]
    found: list[dict[str, Any]] = []
    for index, dataset in enumerate(datasets):
        count = gpus if index == 0 else 0
        command = [sys.executable, "-m", "vitpa.preflight", "cifar10", f"dataset={dataset or 'cifar10'}"]
        command += [f"runtime.{key}={json.dumps(specification[key].replace('$', '$$'))}" for key in ("root", "data_dir")]
        command += [f"--gpus={count}", f"--cpus={specification['cpus']}", f"--min-free-gib={specification['min_free_gib']}"]
        output, error = words_of([*command, *([] if count else ["runtime.device=cpu"])])
        if error:
            return [*found, {"name": "preflight", "ok": False, "detail": error}]
        try:
            checks = json.loads(output)["checks"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return [*found, {"name": "preflight", "ok": False, "detail": f"printed no report: {output[:200]}"}]
        for check in checks:
            of_data = check["name"].startswith("data_")
            if of_data and dataset:
                found.append({**check, "name": f"data {dataset}"})
            elif not of_data and index == 0:
                found.append(check)
    return found


def words_of(command: list[str]) -> tuple[str, str]:
    """What a program prints, and what is wrong with it: its last line, if it fails."""
    try:
        answer = run_program(command, env=child_environment(), timeout_s=LIMIT_S)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {LIMIT_S} s"
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    last = ([line.strip() for line in answer.stderr.splitlines() if line.strip()] or [f"exit code {answer.returncode}"])[-1]
    return answer.stdout.strip(), last if answer.returncode else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
