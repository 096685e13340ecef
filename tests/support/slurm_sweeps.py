"""Sweeps for the tests on a real SLURM: the real trainer on the digits, or the stand-in for what needs no training.

`python -m tests.support.slurm_sweeps VERB SWEEP [ARGUMENT ...]` is a `vitpa sweep VERB` with the stand-in trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import jobs.submit.submit
from jobs.scheduler.client import Scheduler
from jobs.state import RunState, StateReader
from jobs.sweep import Run, Sweep, load_sweep
from tests.support.cluster import FaultyCluster
from tests.support.jobs_sweeps import STAND_IN, nothing_live
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end, wait_for
from vitpa.child_process import stat_of_living
from vitpa.cli import main as vitpa
from vitpa.records import read_json
from vitpa.rundir import Result, RunDir

MODEL = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 1}
RUNTIME = {"device": "cpu", "cpu_threads": 1, "tensorboard": False, "poll_every_steps": 1, "log_every_steps": 10}
PROFILE = {"executor": "slurm", "partition": "main", "gpus_per_node": 0, "cpus_per_task": 1, "time": "30:00"}


@dataclass
class Cell:
    """A sweep below `root` on a cluster, with what a test does to it."""

    root: Path
    cluster: FaultyCluster
    sweep: Sweep
    profile: dict[str, Any] = field(default_factory=dict)
    stand_in: bool = False

    def vitpa(self, verb: str, *terms: str, profile: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """`vitpa sweep VERB` to its end."""
        words = [verb, str(self.root / f"{self.sweep.name}.yaml"), "--root", str(self.root), *terms]
        if verb in ("submit", "retry"):
            document = {**PROFILE, "preflight": False, **self.profile, **(profile or {})}
            path = self.root / f"profile-{len(list(self.root.glob('profile-*.yaml')))}.yaml"
            path.write_text(yaml.safe_dump(document))
            words += ["--profile", str(path)]
        program = ["tests.support.slurm_sweeps"] if self.stand_in else ["vitpa.cli", "sweep"]
        line = [sys.executable, "-m", *program, *words]
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}
        return run_to_end(line, cwd=ROOT, env=environment)

    def submit(self, *terms: str, **profile: Any) -> None:
        """Submit runs, which has to work."""
        done = self.vitpa("submit", *terms, profile=profile)
        assert "submitted" in done.stdout, done.stdout + done.stderr

    def slurm(self, *command: str) -> str:
        """What one of SLURM's programs prints."""
        answer = run_to_end(command, env=self.cluster.environment)
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
        return answer.stdout.strip()

    def run(self, attention: str, seed: int, dataset: str = "digits") -> Run:
        """The run of a cell of the grid."""
        wanted = (dataset, attention, seed)
        return next(run for run in self.sweep.runs if (run.dataset, run.attention, run.seed) == wanted)

    def directory(self, run: Run) -> RunDir:
        """Where a run is."""
        return run.directory(self.root)

    def job(self, run: Run) -> str:
        """SLURM's id of the job that executes a run."""
        return self.states([run])[0].job_id

    def states(self, runs: list[Run] | None = None) -> list[RunState]:
        """The states of runs, of all by default."""
        scheduler = Scheduler(self.cluster.environment)
        return StateReader(self.root, scheduler).states(self.sweep.runs if runs is None else runs)

    def settle(self, runs: list[Run] | None = None) -> list[RunState]:
        """Wait until nothing is in progress; the states then."""
        wait_for(lambda: nothing_live(self.states(runs)), poll_s=0.5)
        return self.states(runs)

    def wait_until_trained(self, run: Run, step: int = 1) -> None:
        """Wait until a run has a checkpoint of at least `step` steps."""
        wait_for(lambda: self.directory(run).newest_step() >= step, poll_s=0.05)

    def start(self, run: Run, attempt: int = -1) -> dict[str, Any]:
        """The start.json of an attempt, the last one by default."""
        return read_json(self.directory(run).attempts()[attempt].start_json) or {}

    def ends(self, run: Run) -> list[str]:
        """How the attempts of a run ended, oldest first; empty where one was killed."""
        found = [read_json(attempt.exit_json) or {} for attempt in self.directory(run).attempts()]
        return [f"{end['state']}: {end['reason']}".rstrip(": ") if end else "" for end in found]

    def result(self, run: Run) -> Result:
        """The result of a run, which must be there."""
        result = self.directory(run).result()
        assert result is not None, f"{run.label}: {self.ends(run)}"
        return result

    def rows(self, run: Run) -> list[tuple[int, tuple[str, ...]]]:
        """Steps and kinds of the rows of metrics.jsonl."""
        lines = [json.loads(line) for line in self.directory(run).metrics_jsonl.read_text().splitlines()]
        return [(line["step"], tuple(sorted(key for key in line if "/" in key))) for line in lines]

    def values(self, run: Run) -> list[dict[str, float]]:
        """Rows of metrics.jsonl without what the clock says, and without their checksum, which covers that, too."""
        lines = [json.loads(line) for line in self.directory(run).metrics_jsonl.read_text().splitlines()]
        timed = ("perf/", "time", "crc32")
        return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def make_cell(
    root: Path,
    cluster: FaultyCluster,
    recipes: dict[str, dict[str, Any]],
    *,
    seeds: int = 1,
    data: Path | None = None,
    **more: Any,
) -> Cell:
    """A sweep of `recipes` x attentions x seeds as YAML files below `root`; the data is in `data`, or pretended."""
    root.mkdir(parents=True)
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    attentions = more.pop("attentions", ["content", "positional"])
    grid = {
        "name": "life",
        "recipes": [f"{name}.yaml" for name in recipes],
        "attentions": attentions,
        "seeds": list(range(seeds)),
        **more.pop("grid", {}),
    }
    (root / "life.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    if data is None:
        data = root / "data"
        for recipe in recipes.values():
            (data / recipe["dataset"]).mkdir(parents=True)
            for split in ("train", "val"):
                (data / recipe["dataset"] / f"{split}.beton").touch()
    runtime = {**RUNTIME, "data_dir": str(data), **more.pop("runtime", {})}
    return Cell(
        root, cluster, load_sweep(str(root / "life.yaml"), root), {"runtime": runtime, **more.pop("profile", {})}, **more
    )


def started(cell: Cell, run: Run, attempt: int) -> bool:
    """Whether an attempt of a run has been started."""
    attempts = cell.directory(run).attempts()
    return len(attempts) >= attempt and attempts[attempt - 1].start_json.exists()


def processes_below(root: Path, module: str = "") -> list[int]:
    """Living processes whose command line or environment names `root`, and whose command line names `module`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            text = line + (path / "environ").read_bytes()
        except OSError:
            continue
        pid = int(path.name)
        if str(root).encode() in text and module.encode() in line and stat_of_living(pid) is not None and pid != os.getpid():
            found.append(pid)
    return found


def processes_left(cells: list[Cell]) -> list[str]:
    """Command lines of what is still there when everything has had the time to end by itself."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not any(processes_below(cell.root) for cell in cells), poll_s=0.2, idle_s=60)
    pids = [pid for cell in cells for pid in processes_below(cell.root)]
    return [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids]


def variable(pid: int, name: str) -> str:
    """An environment variable of another process; empty if it has none of that name."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        key, _, value = entry.decode().partition("=")
        if key == name:
            return value
    return ""


def trainers(root: Path, run: Run) -> list[int]:
    """The training processes of a run, without what starts them."""
    found = []
    for pid in processes_below(root, "vitpa.train"):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended in the meantime
            continue
        if words[1:3] == ["-m", "vitpa.train"] and run.signature in words[3]:
            found.append(pid)
    return found


def main(words: list[str]) -> int:
    """A `vitpa sweep` whose runs are trained by the stand-in."""
    vars(jobs.submit.submit)["training_command"] = lambda processes: STAND_IN
    return vitpa(["sweep", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
