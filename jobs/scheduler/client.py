"""What is asked of SLURM and told to it: squeue, sacct, scontrol, scancel, sbatch. Nothing else here starts those programs.

They run in an environment of ours, in which nothing of the user's shell changes what they see or do but where the cluster
is. What is cancelled, requeued or changed is a `SlurmJob`, which SLURM itself has called ours (own_jobs.py), never a number.
`--all` is for partitions with Hidden=YES, whose jobs squeue does not show otherwise, not even to their user.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jobs.errors import SweepError
from jobs.scheduler import own_jobs
from jobs.scheduler.options import seconds_of
from jobs.scheduler.own_jobs import SlurmJob, Snapshot
from vitpa.child_process import run_program

TIMEOUT_S = 60
IN_FLIGHT_S = 2.0  # from the end of an sbatch until the queue shows its jobs, at most
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # where it is, and the password
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", *OF_THE_CLUSTER)


class SchedulerError(SweepError):
    """SLURM does not answer, or refuses: one line with its own words."""

    exit_code = 3


@dataclass
class Scheduler:
    """The cluster, through its command-line programs, as a shell with that environment reaches it.

    A method that does not say what it does then raises SchedulerError where SLURM does not answer, or refuses.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def snapshot(self) -> Snapshot:
        """All our jobs, also those that ended a few minutes ago (SLURM's MinJobAge)."""
        try:
            return Snapshot(self._queue())
        except SchedulerError as error:
            return Snapshot({}, str(error))

    def job(self, identity: str, token: str) -> SlurmJob | None:
        """The job with this id, if it is one of the submission with that token; one that SLURM does not know is an error."""
        return next((job for (found, _), job in self._queue(f"--jobs={identity}").items() if found == token), None)

    def _queue(self, *which: str) -> dict[tuple[str, int], SlurmJob]:
        form = ("--all", "--noheader", "--array", "--states=all", f"--format={own_jobs.QUEUE_COLUMNS}")
        return own_jobs.in_queue(self.ask("squeue", *form, f"--user={os.getuid()}", *which), os.getuid())

    def submit(self, script: str, token: str) -> SlurmJob:
        """Submit a job script that carries a token. Which job that has made is asked of SLURM, not read in its words."""
        said = " ".join(self.ask("sbatch", script).split())
        deadline = time.monotonic() + IN_FLIGHT_S
        while True:
            for (found, _), job in self._queue().items():
                if found == token:
                    return job
            if time.monotonic() > deadline:
                raise SchedulerError(f"sbatch: SLURM has no job of ours, although it said: {said}")
            time.sleep(0.2)

    def accounted(self, ids: Iterable[str]) -> dict[tuple[str, int], SlurmJob]:
        """What accounting knows of jobs with these ids, as far as they are ours, by (token, index of the task).

        Empty where there is no accounting.
        """
        numbers = sorted({number for identity in ids if (number := identity.partition("_")[0]).isdecimal()})
        if not numbers:
            return {}
        words = ["--noheader", "--parsable2", f"--delimiter={own_jobs.COLUMN}", "--allocations", "--duplicates"]
        words += [f"--user={os.getuid()}", f"--jobs={','.join(numbers)}"]
        for columns in ((*own_jobs.ACCOUNT_COLUMNS, own_jobs.SUBMIT_LINE), own_jobs.ACCOUNT_COLUMNS):
            try:
                return own_jobs.in_accounting(self.ask("sacct", *words, f"--format={','.join(columns)}"), os.getuid())
            except SchedulerError as error:
                if own_jobs.SUBMIT_LINE not in str(error):  # "Invalid field requested", from a SLURM before 21.08
                    break
        return {}

    def cancel(self, jobs: Iterable[SlurmJob]) -> None:
        """End jobs of ours. Those that have ended already are passed over, as are ids that are others' by now.

        scancel itself cannot be told whose jobs it is to end: with --name it ends all waiting tasks of an array.
        """
        wanted = list(jobs)
        ours = {job.id for job in self._queue().values()} if wanted else set()
        arrays: dict[str, list[int]] = {}
        for number, _, index in (job.id.partition("_") for job in wanted if job.id in ours):
            arrays.setdefault(number, []).extend([int(index)] if index else [])
        words = [f"{number}_[{ranges(indices)}]" if indices else number for number, indices in arrays.items()]
        for start in range(0, len(words), 100):  # a command line has its limits
            self.ask("scancel", *words[start : start + 100])

    def requeue(self, job: SlurmJob) -> None:
        """Put a running job of ours back into the queue; it is ended for that."""
        self.ask("scontrol", "requeue", job.id)

    def leave_out(self, job: SlurmJob, nodes: Iterable[str]) -> None:
        """Have a job of ours that waits in the queue run anywhere but on these nodes."""
        self.ask("scontrol", "update", f"JobId={job.id}", f"ExcNodeList={','.join(nodes)}")

    def time_left_s(self, identity: str) -> float | None:
        """Seconds until the time limit of a running job; None without a limit, or where SLURM does not say."""
        try:
            return seconds_of(self.ask("squeue", "--all", "--noheader", f"--jobs={identity}", "--format=%L").strip())
        except SchedulerError:
            return None

    def waited_s(self, identity: str) -> float | None:
        """Seconds that a job which has started waited, since it was submitted or requeued; None where SLURM does not say."""
        try:
            times = self.ask("squeue", "--all", "--noheader", f"--jobs={identity}", "--format=%V %S")
            submitted, started = times.split()
            return max(0.0, (datetime.fromisoformat(started) - datetime.fromisoformat(submitted)).total_seconds())
        except (SchedulerError, ValueError):
            return None

    def configuration(self) -> dict[str, str]:
        """The cluster's configuration, as `scontrol show config` names it."""
        pairs = (line.partition("=") for line in self.ask("scontrol", "show", "config").splitlines())
        return {key.strip(): value.strip() for key, equals, value in pairs if equals}

    def cluster(self) -> str:
        """The name of the cluster that answers (ClusterName in slurm.conf)."""
        return self.configuration().get("ClusterName", "")

    def nodes(self) -> set[str]:
        """The names of the cluster's nodes, those of hidden partitions, too."""
        return set(self.ask("sinfo", "--noheader", "--all", "--Node", "--format=%N").split())

    def hostnames(self, hostlist: str) -> list[str]:
        """The names that a list such as `gpu[01-08]` stands for."""
        return self.ask("scontrol", "show", "hostnames", hostlist).split()

    def max_array_tasks(self) -> int:
        """The largest job array that SLURM takes."""
        configuration = self.configuration()
        option = re.search(r"max_array_tasks=(\d+)", configuration.get("SchedulerParameters", ""))
        sizes = [int(configuration.get("MaxArraySize", "1001"))] + ([int(option[1])] if option else [])
        return max(1, min(sizes))

    def test_only(self, script: str) -> str:
        """What SLURM says to a job script without submitting it: where and when it would start."""
        return self.ask("sbatch", "--test-only", script, with_stderr=True).strip()

    def ask(self, program: str, *arguments: str, with_stderr: bool = False) -> str:
        """Run one of SLURM's programs and return what it prints."""
        conf = self.environment.get("SLURM_CONF")
        if conf and not Path(conf).is_file():  # its programs would try for a minute
            raise SchedulerError(f"{program}: SLURM_CONF={conf}: no such file; is the cluster up, and visible from here?")
        try:
            which = scheduler_environment if program == "sbatch" else query_environment
            answer = run_program([program, *arguments], env=which(self.environment), timeout_s=TIMEOUT_S)
        except FileNotFoundError:
            raise SchedulerError(f"{program}: not found; is this a login node of the cluster, and SLURM in PATH?") from None
        except subprocess.TimeoutExpired:
            raise SchedulerError(f"{program}: no answer from SLURM in {TIMEOUT_S} s; try again later") from None
        if answer.returncode != 0:
            words = " ".join((answer.stderr or answer.stdout).split()) or f"exit code {answer.returncode}"
            if "establish a configuration source" in words:
                words = "SLURM finds no slurm.conf; is this a login node of the cluster, or is SLURM_CONF to be set?"
            raise SchedulerError(f"{program}: {words}")
        return answer.stdout + (answer.stderr if with_stderr else "")


def query_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What SLURM's programs get of `environment`: where they are, where the cluster is and who asks. sbatch needs more.

    A list of what they get, since no list of what changes them is complete: SQUEUE_PARTITION hides jobs, SCANCEL_STATE
    spares them, SLURM_CLUSTERS asks another cluster, and each version of SLURM adds some. PATH and LD_LIBRARY_PATH find
    the programs, HOME and USER are for what a site wraps around them. SLURM_CONF_SERVER is where a host without a slurm.conf
    gets it from, SLURM_JWT is the password of clusters without munge.
    """
    kept = {key: environment[key] for key in KEPT if key in environment}
    return {**kept, "LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}  # indices of an array in full


def scheduler_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would change a new job: for sbatch, which hands the rest of it on to the job.

    That is what sbatch and srun take options from, what SLURM sets in a job, and what torchrun sets, from which a training
    would take that it is one process of several.
    """
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}
    prefixes = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SUBMITIT_", "PMI", "TORCHELASTIC_", "VITPA_")
    return {
        key: value
        for key, value in environment.items()
        if key in OF_THE_CLUSTER or (key not in dropped and not key.startswith(prefixes))
    }


def ranges(indices: Iterable[int]) -> str:
    """Indices of an array as SLURM writes them: [0, 1, 2, 5] is 0-2,5."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
