"""Sweeps for the tests of `jobs`: making one, submitting it with the stand-in trainer, and looking at what came of it.

`python -m tests.support.jobs_sweeps ROOT WHERE NAME VERB [TERM ...]` is a `vitpa sweep VERB` with the stand-in trainer: a
launcher to kill. WHERE is a number of slots on this machine, or a SLURM profile's file (`slurm_profile`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

import jobs.submit.submit
from jobs.records import Intent
from jobs.scheduler.client import Scheduler
from jobs.scheduler.own_jobs import SlurmJob
from jobs.state import LIVE, RunState, StateReader
from jobs.sweep import Run, Sweep, load_sweep
from tests.support.cluster import BoundCluster
from tests.support.repository import ROOT
from tests.support.waiting import run_to_end, wait_for
from vitpa.arguments import literal_path
from vitpa.cli import main as vitpa
from vitpa.metrics_file import EMA_EVALUATED, EVALUATED, to_line
from vitpa.records import RunError, read_json, write_atomic
from vitpa.rundir import Result

HOLD: dict[str, object] = {"additional_parameters": {"hold": True}}  # of a profile: what is submitted stays in the queue
STAND_IN = [sys.executable, "-S", str(Path(__file__).with_name("stand_in_trainer.py"))]
RECIPE = {"dataset": "digits", "model": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 1}}


def nothing_live(states: list[RunState]) -> bool:
    """Whether no run is in progress or about to be."""
    return not any(state.state in LIVE for state in states)


def make_sweep(
    root: Path,
    *,
    seeds: int = 4,
    steps: int = 4,
    name: str = "small",
    axes: Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Sweep:
    """A sweep of 2 x `seeds` runs, for each point of the axes, of `steps` x 50 ms, as YAML files below `root`."""
    root.mkdir(exist_ok=True)
    recipe = {**RECIPE, "train": {"epochs": steps}, "optim": {"warmup_epochs": 0}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid: dict[str, object] = {
        "name": name,
        "recipes": ["recipe.yaml"],
        "attentions": ["content", "positional"],
        "seeds": list(range(seeds)),
    }
    if axes:
        grid["axes"] = dict(axes)
    if overrides:
        grid["overrides"] = dict(overrides)
    (root / f"{name}.yaml").write_text(yaml.safe_dump(grid))
    for split in ("train", "val"):
        path = root / "data" / "digits" / f"{split}.beton"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return load_sweep(str(root / f"{name}.yaml"), root)


def result_document(run: Run, **values: object) -> dict[str, object]:
    """A valid result.json of `run` as versions without checksums wrote it, with `values` in it."""
    return {
        "signature": run.signature,
        "dataset": run.dataset,
        "attention": run.attention,
        "seed": run.seed,
        "epochs": run.config.train.epochs,
        "steps": 4,
        "val_top1": 0.5,
        "val_top5": 0.9,
        "val_loss": 1.0,
        "train_time_s": 1.0,
        "gpu_hours": 0.25,
        "images_per_s": 100.0,
        "attempts": 1,
        "weights_sha256": "0" * 64,
        "code_version": "g1",
        "beton_sha256": {"train": "0" * 64, "val": "1" * 64},
        "finished_utc": "2026-01-01T00:00:00Z",
        **values,
    }


def evaluation_line(result: Mapping[str, object]) -> str:
    """The row of metrics.jsonl that a run with this result ends with."""
    fields = {name: name.replace("/", "_") for name in (*EVALUATED, *EMA_EVALUATED)}
    evaluated = {name: result[field] for name, field in fields.items() if field in result}
    return to_line({"step": result["steps"], "epoch": result["epochs"], **evaluated})


def environment_document(result: Mapping[str, object]) -> dict[str, object]:
    """The env.json of a run with this result."""
    return {
        "code_version": str(result["code_version"]).rpartition(", ")[2],
        "beton_sha256": result["beton_sha256"],
        "steps_total": result["steps"],
    }


def write_result(root: Path, run: Run, **values: object) -> None:
    """Put a valid result.json where the run's would be, and what it is compared with."""
    directory = run.directory(root)
    directory.path.mkdir(parents=True, exist_ok=True)
    document = result_document(run, **values)
    directory.result_json.write_text(json.dumps(document))
    directory.metrics_jsonl.write_text(evaluation_line(document))
    directory.env_json.write_text(json.dumps(environment_document(document)))


def slurm_profile(root: Path, name: str = "slurm", /, **values: object) -> Path:
    """A profile for the development cluster: a run takes a CPU and 256 MiB, and no pre-flight is made."""
    document = {
        "executor": "slurm",
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "mem": "256M",
        "time": "10:00",
        "signal_delay_s": 60,
        "preflight": False,
        "runtime": {"device": "cpu", "data_dir": literal_path(f"{root}/data")},
        **values,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def command(root: Path, where: int | Path, verb: str, *terms: str, name: str = "small") -> list[str]:
    """The command line of a launcher."""
    return [sys.executable, "-m", "tests.support.jobs_sweeps", str(root), str(where), name, verb, *terms]


def launch(
    root: Path,
    where: int | Path,
    verb: str = "submit",
    *terms: str,
    name: str = "small",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    line = command(root, where, verb, *terms, name=name)
    return run_to_end(line, cwd=ROOT, env=environment)


def start_launcher(
    root: Path, where: int | Path, name: str = "small", *, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a launcher of `submit` and return at once."""
    line = command(root, where, "submit", name=name)
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(root: str, where: str, name: str, verb: str, *terms: str) -> int:
    """A `vitpa sweep` whose runs are trained by the stand-in."""
    vars(jobs.submit.submit)["training_command"] = lambda processes: STAND_IN
    profile = Path(where)
    if where.isdecimal():
        profile = Path(root) / f"slots-{where}.yaml"
        text = f"slots: {where}\nruntime: {{device: cpu, data_dir: {root}/data}}\n"
        write_atomic(profile, text)  # others that start at the same time read and write it, too
    options = ["--profile", literal_path(profile)] if verb in ("submit", "retry", "plan") else []
    return vitpa(["sweep", verb, literal_path(f"{root}/{name}.yaml"), "--root", literal_path(root), *options, *terms])


def settle(root: Path, sweep: Sweep) -> list[RunState]:
    """Wait until nothing is in progress; the states then."""
    wait_for(lambda: nothing_live(StateReader(root).states(sweep.runs)), poll_s=0.1)
    return StateReader(root).states(sweep.runs)


def results(root: Path, sweep: Sweep) -> list[Result]:
    """The results of all runs, which must be there."""
    found = [run.directory(root).result() for run in sweep.runs]
    assert all(found)
    return [result for result in found if result is not None]


def exits(root: Path, sweep: Sweep) -> list[list[str]]:
    """For each run, how its attempts ended, oldest first."""
    ends = [[read_json(attempt.exit_json) for attempt in run.directory(root).attempts()] for run in sweep.runs]
    return [[end["state"] if end else "" for end in run] for run in ends]


def finished_trainings(root: Path) -> list[str]:
    """Signatures of the runs that a training process has brought to an end, once for each time."""
    return sorted(path.name.split("-")[0] for path in (root / "trace").iterdir() if json.loads(path.read_text())[1])


def most_at_a_time(root: Path) -> int:
    """The largest number of training processes that were alive at the same moment (killed ones left out)."""
    spans = [json.loads(path.read_text()) for path in (root / "trace").iterdir()]
    events = sorted([(began, 1) for began, ended in spans if ended] + [(ended, -1) for began, ended in spans if ended])
    alive = most = 0
    for _, change in events:
        alive += change
        most = max(most, alive)
    return most


def processes_of(root: Path) -> list[str]:
    """Command lines of the live processes that work below `root`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(root) in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def assert_no_process_left(root: Path) -> None:
    """Every process that worked below `root` ends by itself."""
    wait_for(lambda: not processes_of(root), poll_s=0.1)


class Field:
    """A sweep of 2 x `seeds` runs of the stand-in on a cluster."""

    def __init__(self, root: Path, cluster: BoundCluster, *, seeds: int = 1, steps: int = 4) -> None:
        self.root = root
        self.cluster = cluster
        self.environment = cluster.environment
        self.sweep = make_sweep(root, seeds=seeds, steps=steps)
        self.profile = slurm_profile(root, **HOLD)

    @property
    def scheduler(self) -> Scheduler:
        return Scheduler(self.environment)

    def vitpa(self, verb: str, *terms: str, profile: Path | None = None) -> subprocess.CompletedProcess[str]:
        return launch(self.root, profile or self.profile, verb, *terms, environment=self.environment)

    def slurm(self, *words: str) -> str:
        done = run_to_end(words, env=self.environment)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def states(self) -> list[RunState]:
        return StateReader(self.root, self.scheduler).states(self.sweep.runs)

    def jobs(self) -> dict[str, list[SlurmJob]]:
        """The live jobs of each run, by its signature."""
        found: dict[str, list[SlurmJob]] = {run.signature: [] for run in self.sweep.runs}
        snapshot = self.scheduler.snapshot()
        assert not snapshot.error
        for path in self.root.glob("sweeps/*/submissions/*/intent.json"):
            try:
                intent = Intent.of(path.parent)
            except RunError:  # a test has damaged it
                continue
            for task in range(len(intent.groups)):
                job = snapshot.of(path.parent.name.partition("-")[2], task)
                if job is not None and job.live:
                    for signature in intent.signatures(task):
                        found[signature].append(job)
        return found

    def live(self) -> int:
        return sum(len(jobs) for jobs in self.jobs().values())

    def assert_one_job_each(self) -> None:
        assert {signature: len(jobs) for signature, jobs in self.jobs().items()} == dict.fromkeys(self.jobs(), 1)

    def release(self) -> None:
        self.slurm(
            "scontrol", "release", ",".join({job.id.partition("_")[0] for jobs in self.jobs().values() for job in jobs})
        )

    def assert_each_done_once(self) -> None:
        wait_for(lambda: all(state.state == "done" for state in self.states()), poll_s=0.3)
        assert finished_trainings(self.root) == sorted(run.signature for run in self.sweep.runs)
        wait_for(lambda: self.live() == 0, poll_s=0.3)

    def files(self, name: str) -> list[Path]:
        return list(self.root.glob(f"sweeps/*/submissions/*/{name}"))

    def helper(self) -> int:
        """The process that starts the jobs."""
        (path,) = self.files("launch.json")
        return int((read_json(path) or {})["process"]["pid"])

    def slow_sbatch(self, before_s: float, after_s: float) -> None:
        """From now on sbatch takes that long before and after it submits."""
        folder = self.root / "bin"
        called, submitted = f"touch {folder}/called; sleep {before_s}", f"touch {folder}/submitted; sleep {after_s}"
        self.replace_program("sbatch", called, f'{self.real("sbatch")} "$@"; code=$?', submitted, "exit $code")

    def replace_program(self, name: str, *lines: str) -> None:
        """From now on SLURM's program of that name is a shell script; sbatch's test before a submission stays as it is."""
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        if name == "sbatch":
            lines = (f'[[ " $* " == *" --test-only "* ]] && exec {self.real(name)} "$@"', *lines)
        path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        path.chmod(0o755)
        self.environment = {**self.cluster.environment, "PATH": f"{path.parent}:{self.cluster.environment['PATH']}"}

    def real(self, name: str) -> str | None:
        """Where SLURM's program of that name is."""
        return shutil.which(name, path=self.cluster.environment["PATH"])

    def usual_slurm(self) -> None:
        """No replaced programs any more."""
        self.environment = self.cluster.environment

    def clear(self) -> None:
        """Leave nothing in the queue."""
        self.usual_slurm()
        self.scheduler.cancel([job for jobs in self.jobs().values() for job in jobs])
        wait_for(lambda: self.live() == 0, poll_s=0.2)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
