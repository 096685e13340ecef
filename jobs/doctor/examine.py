"""`vitpa doctor`: is this place fit for sweeps, and if not, how to fix it. Nothing it makes is left behind.

Of a cluster: what its configuration says, and what one submitted probe job finds. Of this machine: the same probe, here.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from jobs.doctor.cluster import PROGRAMS, Check, accepted, accounting, configured, of_profile
from jobs.doctor.job import PROBE, ProbeJob, checks_of, remove, script_of
from jobs.plan.sbatch_test import is_silence, only_for_now, test_script
from jobs.profile import LocalProfile, SlurmProfile
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.cluster import ask
from vitpa.child_process import run_program
from vitpa.config import RuntimeConfig

LOCAL_LIMIT_S = 600


class UnreachableError(Exception):
    """There is no SLURM to speak to: what was checked until then."""

    def __init__(self, check: Check) -> None:
        super().__init__(check.found)
        self.check = check


def examine_machine(profile: LocalProfile, root: Path, data_dir: str | None) -> Generator[Check, None, None]:
    """The checks of this machine."""
    root_was_there = root.exists()
    command = [sys.executable, "-P", str(PROBE), json.dumps(_specification(profile, root, data_dir))]
    try:
        answer = run_program(command, timeout_s=LOCAL_LIMIT_S)
        if answer.returncode:
            yield Check("probe", "problem", (answer.stderr.strip().splitlines() or ["no message"])[-1], "see the message")
            return
        yield from checks_of(answer.stdout, gpus_are_optional=True)
        yield from _of_no_data(data_dir)
    except subprocess.TimeoutExpired:
        yield Check("probe", "problem", f"no answer in {LOCAL_LIMIT_S} s", "see whether a disk or a GPU hangs")
    finally:
        remove(root / "doctor" / "none", root_was_there)


def examine_cluster(
    profile: SlurmProfile,
    root: Path,
    data_dir: str | None,
    *,
    scheduler: Scheduler,
    wait_s: float,
    say: Callable[[str], None],
) -> Generator[Check, None, None]:
    """The checks of the cluster.

    Raises:
        UnreachableError: SLURM's programs are missing, or do not answer.
    """
    path = scheduler.environment.get("PATH", "")
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        raise UnreachableError(
            Check("SLURM", "problem", f"not in PATH: {', '.join(missing)}", "log in to the cluster, or load its module")
        )
    try:
        cluster = ask(scheduler)
        version = cluster.configuration.get("SLURM_VERSION", "of an unknown version")
        yield Check("SLURM", "ok", f"{version}, cluster {cluster.configuration.get('ClusterName')}: the controller answers")
        yield accounting(scheduler)
        yield from configured(cluster, profile)
        yield from of_profile(profile, cluster)
        root_was_there = root.exists()
        folder = root / "doctor" / secrets.token_hex(4)
        script = script_of(profile, folder, root, _specification(profile, root, data_dir))
        submission = accepted(profile, cluster, only_for_now(test_script(scheduler, script), profile, cluster))
    except (ValueError, RuntimeError) as error:  # submitit does not take the profile
        yield Check("submission", "problem", str(error), "change the profile")
        return
    except SchedulerError as error:
        hint = "see whether the controller is up: scontrol ping"
        raise UnreachableError(Check("SLURM", "problem", str(error), hint)) from None
    yield submission
    if submission.level == "problem":
        yield Check("probe job", "skipped", "SLURM would refuse it; what is to be seen from inside a job was not checked")
        return
    try:
        folder.mkdir(parents=True)
        with ProbeJob(scheduler, folder, script, say) as job:
            yield from job.checks(wait_s, profile.nodes)
    except OSError as error:
        words = f"{error.filename}: {error.strerror}"
        yield Check("shared folder", "problem", f"cannot be written here: {words}", "choose another --root")
    except SchedulerError as error:
        if is_silence(error):
            raise UnreachableError(Check("SLURM", "problem", str(error), "try again later")) from None
        yield Check("probe job", "problem", str(error), "change the profile")
    finally:
        remove(folder, root_was_there)
    yield from _of_no_data(data_dir)


def _specification(profile: LocalProfile | SlurmProfile, root: Path, data_dir: str | None) -> dict[str, Any]:
    folder = data_folder(data_dir)
    common = {"root": str(root), "data_dir": str(folder), "datasets": data_sets(folder)}
    if isinstance(profile, LocalProfile):
        return {**common, "gpus": None, "cpus": 1, "min_free_gib": 1.0}  # None: all there are
    cpus = profile.cpus_per_node or 1
    return {**common, "gpus": profile.gpus_per_node, "cpus": cpus, "min_free_gib": profile.min_free_gib}


def data_folder(data_dir: str | None) -> Path:
    """The folder of the data sets: as given, or where runs look for it."""
    return Path(os.path.realpath(data_dir or RuntimeConfig().data_path))


def data_sets(folder: Path) -> list[str]:
    """The data sets that `vitpa prep` has made there."""
    return sorted(path.parent.name for path in folder.glob("*/train.beton"))


def _of_no_data(data_dir: str | None) -> Iterator[Check]:
    folder = data_folder(data_dir)
    if not data_sets(folder):
        yield Check(
            "data", "problem" if data_dir else "warning", f"{folder}: no .beton there", "vitpa prep DATASET, or --data-dir"
        )
