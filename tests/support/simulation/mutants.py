"""Bugs put into the orchestration on purpose, each as a change of a source; the simulation has to find every one.

`python -m tests.support.simulation.mutants` hunts, in the code as it is imported, until something does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import ROOT
from tests.support.simulation.crash_points import CRASHES, WHO, Stage, assert_a_cancellation_survives_a_power_loss
from tests.support.simulation.history import run_history, simulated_disk
from tests.support.simulation.world import BrokenInvariantError

HISTORIES = 600
FOUND = 3  # exit code of a hunt


@dataclass(frozen=True)
class Mutant:
    """A bug: in a file, this text is replaced by that."""

    name: str
    path: str
    text: str
    by: str


MUTANTS = (
    Mutant(
        "the receipt is written before sbatch",
        "jobs/submit/launch.py",
        "    jobs = start(Path(root), submission, indices)\n",
        '    create_exclusive(directory.receipt_json, to_json({"executor": intent.executor, "jobs": [], "utc": utc_now()}))\n'
        "    jobs = start(Path(root), submission, indices)\n",
    ),
    Mutant(
        "records are not synced with their folder",
        "vitpa/records.py",
        "            raise\n        os.fsync(descriptor)\n",
        "            raise\n",
    ),
    Mutant(
        "the content of records is not synced",
        "vitpa/records.py",
        "            file.flush()\n            os.fsync(file.fileno())\n",
        "            file.flush()\n",
    ),
    Mutant(
        "a claim replaces another one",
        "vitpa/rundir.py",
        "            draft.rename(target.path)  #",
        "            shutil.rmtree(target.path, ignore_errors=True)\n            draft.rename(target.path)  #",
    ),
    Mutant(
        "a claim is made whatever has happened since the last look",
        "jobs/submit/submit.py",
        "    return directory.claim_attempt(state.attempts + 1, claim, config)\n",
        "    return directory.claim_attempt(len(directory.attempts()) + 1, claim, config)\n",
    ),
    Mutant(
        "jobs are adopted without a look at the token",
        "jobs/submit/submission.py",
        "for (found, _), job in snapshot.jobs.items() if found == token]",
        "for (found, _), job in snapshot.jobs.items() if found]",
    ),
    Mutant(
        "a job is requeued although it has got no further",
        "jobs/execute/requeue.py",
        "        if self.last_step <= self.first_step:\n",
        "        if self.last_step < self.first_step:\n",
    ),
    Mutant(
        "a state that is not known counts as dead",
        "jobs/scheduler/own_jobs.py",
        "        return self.state not in ENDED\n",
        '        return self.state in WAITING or self.state == "RUNNING"\n',
    ),
    Mutant(
        "a result of another signature is accepted",
        "vitpa/rundir.py",
        "        if result.signature != self.signature:\n",
        "        if not result.signature:\n",
    ),
    Mutant(
        "an edited configuration is trained",
        "vitpa/attempt.py",
        'if attempts == "attempts" and signature != config.signature:',
        "if not config.signature:",
    ),
    Mutant(
        "a cancellation between two executions is forgotten",
        "jobs/execute/slurm.py",
        "        if cancel_requested(run, last):",
        "        if not self.intent.token:",
    ),
    Mutant(
        "the rows that a result relies on are not synced",
        "vitpa/replica.py",
        "            self.logs.sync()\n",
        "            self.logs.flush()\n",
    ),
    Mutant(
        "new folders are not synced",
        "vitpa/records.py",
        "        sync_folder(folder.parent)  #",
        "        assert folder.parent  #",
    ),
    Mutant(
        "the pickles of jobs are not synced",
        "jobs/submit/submission.py",
        "            sync_file(path)\n",
        "            assert path\n",
    ),
    Mutant(
        "the pickle of an adopted job is believed if it is there",
        "jobs/submit/submission.py",
        "            DelayedSubmission.load(path)\n",
        "            path.stat()\n",
    ),
    Mutant(
        "a copy of the code is not synced under its name",
        "jobs/submit/snapshot.py",
        "        sync_folder(target.parent)  #",
        "        assert target.parent  #",
    ),
)


def mutated(mutant: Mutant, folder: Path) -> Path:
    """A copy of the code below `folder`, with the bug in it."""
    for name in ("jobs", "vitpa", "tests", "slurm", "data_prep"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    path = folder / mutant.path
    text = path.read_text()
    assert mutant.text in text, f"{mutant.name}: {mutant.path} has changed"
    path.write_text(text.replace(mutant.text, mutant.by))
    return folder


def finding(mutant: Mutant, folder: Path, histories: int = HISTORIES) -> str:
    """What the simulation says of the bug; empty if it finds nothing."""
    code = mutated(mutant, folder)
    command = [sys.executable, "-m", "tests.support.simulation.mutants", str(histories)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, FOUND), done.stderr
    return done.stdout.strip() if done.returncode else ""


def hunt(histories: int) -> str:
    """The first thing that does not hold; empty if all does."""
    with simulated_disk() as disk:
        try:
            assert_a_cancellation_survives_a_power_loss(disk)
            for seed in range(histories):
                run_history(seed, disk)
            for name in WHO:
                stage = Stage(disk, name)
                for point in stage.points():
                    for crash in CRASHES.values():
                        stage.crash(crash, point, False)
                        stage.crash(crash, point, True)
        except (BrokenInvariantError, json.JSONDecodeError) as error:  # the latter: a record has been cut short
            return str(error).splitlines()[0]
    return ""


if __name__ == "__main__":
    found = hunt(int(sys.argv[1]) if len(sys.argv) > 1 else HISTORIES)
    print(found)
    sys.exit(FOUND if found else 0)
