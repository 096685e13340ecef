"""`vitpa bench start`: how long a training takes from its command to its first optimiser step, and in what.

Three starts of `vitpa train`, each a process of its own, in a folder that is removed at the end: `cold`, when nothing was
compiled before; `warm`, the same training once more from its beginning; `requeue`, which goes on from a checkpoint. The files
of Python's packages are in memory or not, as they are on this machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitpa.arguments import literal_path, path_argument
from vitpa.child_process import child_environment
from vitpa.config import RunConfig
from vitpa.installation import KEEP_BYTECODE, NO_BYTECODE, has_bytecode
from vitpa.records import RunError, made_with, read_record, write_json
from vitpa.rundir import RunDir
from vitpa.seconds import PARTS, Seconds
from vitpa.step.compiler_cache import VARIABLE
from vitpa.train_command import configs_of, seed_list

HELP = "from the command of a training to its first step, cold, warm and after a requeue"
EXAMPLE = "vitpa bench start cifar10 --seeds 0,1,2,3,4 --json start.json"
STARTS = ("cold", "warm", "requeue")
POLL_S = 0.02


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only this benchmark has."""
    parser.add_argument("config", type=path_argument, help="a YAML file, or the name of a shipped recipe such as cifar10")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the configuration")
    parser.add_argument("--seeds", type=seed_list, metavar="S,S,...", help="train these seeds together")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and write the file."""
    with tempfile.TemporaryDirectory(prefix="vitpa-start-") as folder:
        root = Path(folder)
        own = [f"runtime.root={root}", "runtime.checkpoint_every_s=1e9"]
        words = [*options.overrides, *own, *([f"--seeds={','.join(map(str, options.seeds))}"] if options.seeds else [])]
        configs = configs_of([options.config], [*options.overrides, *own], options.seeds)
        command = [sys.executable, "-m", "vitpa.cli", "train", literal_path(options.config), *words]
        starts: dict[str, Seconds] = {}
        for name in STARTS:
            if name == "warm":
                shutil.rmtree(root / "runs")
            starts[name] = measure(command, configs, root / "log.txt")
            print(f"{name}: {starts[name].first_step_s:.1f} s", file=sys.stderr, flush=True)
        if not has_bytecode("torch"):
            print(f"torch: {NO_BYTECODE}; {KEEP_BYTECODE}", file=sys.stderr)
        facts = made_with(configs[0].run_dir.env_json)
    print(table(starts))
    if options.json:
        made = {key: facts.get(key) for key in ("gpu", "cuda", "code_version", "versions")}
        shown = {name: document(seconds) for name, seconds in starts.items()}
        write_json(options.json, {"name": "start", **made, "runs": [each.experiment() for each in configs], "starts": shown})
    return 0


def measure(command: Sequence[str], configs: Sequence[RunConfig], log: Path) -> Seconds:
    """Start a training, have it stop after its first step, with a checkpoint, and return where its time went until then.

    Raises:
        RunError: it has failed.
    """
    environment = {key: value for key, value in child_environment().items() if key not in (VARIABLE, "TRITON_CACHE_DIR")}
    runs = [config.run_dir for config in configs]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    before = len(runs[0].attempts())
    try:
        while (seconds := first_step_of(runs[0], before)) is None:
            if process.poll() is not None:
                raise RunError(f"the training has ended before its first step: {last_line(log)}")
            time.sleep(POLL_S)
        for each in runs:
            each.stop.touch()
        if process.wait():
            raise RunError(f"the training has failed: {last_line(log)}")
    finally:
        process.kill()
        process.wait()
    return seconds


def first_step_of(run: RunDir, before: int) -> Seconds | None:
    """Where the time until the first step of the attempt after the first `before` ones went; None before that."""
    attempts = run.attempts()[before:]
    seconds = read_record(Seconds, attempts[0].seconds_json) if attempts else None
    return None if seconds is None or seconds.first_step_s is None else seconds


def last_line(log: Path) -> str:
    """What a training has printed last."""
    return (log.read_text(errors="replace").strip().splitlines() or ["it has said nothing"])[-1]


def document(seconds: Seconds) -> dict[str, float | int | None]:
    """A start as plain data."""
    graphs = {"graphs_compiled": seconds.graphs_compiled, "graphs_reused": seconds.graphs_reused}
    return {"first_step_s": seconds.first_step_s, **seconds.by_part(), **graphs}


def table(starts: Mapping[str, Seconds]) -> str:
    """A row for each start: seconds by part, and graphs."""
    parts = [part for part in PARTS if part not in ("evaluations", "checkpoints")]
    names = {"set_up": "set-up", "steps": "first step"}
    header = ["start", "in all [s]", *(names.get(part, part) for part in parts), "graphs compiled", "reused"]
    rows = []
    for name, its in starts.items():
        seconds = [its.first_step_s or 0.0, *(its.by_part()[f"{part}_s"] for part in parts)]
        rows.append([name, *(f"{each:.2f}" for each in seconds), str(its.graphs_compiled), str(its.graphs_reused)])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
