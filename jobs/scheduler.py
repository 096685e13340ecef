"""What is asked of SLURM and told to it: squeue, sacct, scontrol, scancel, sbatch. Nothing else here starts those programs.

A job of ours carries the token of its submission as its comment; a run is one task of it, by its index. A state that is
not known to be an end counts as live (job_state_string in SLURM's source has the names).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.grid import SweepError

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "CONFIGURING", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
COMMENT = "vitpa:"  # before the token
TIMEOUT_S = 60


class SchedulerError(SweepError):
    """SLURM does not answer, or refuses: one line with its own words."""


@dataclass(frozen=True)
class SlurmJob:
    """A job, or a task of an array, as SLURM sees it."""

    id: str  # 1234, or 1234_5 for task 5 of an array
    state: str
    reason: str = ""  # of waiting
    nodes: str = ""

    @property
    def live(self) -> bool:
        """Whether it is not known to have ended."""
        return self.state not in ENDED

    @property
    def waiting(self) -> bool:
        """Whether it is live without running."""
        return self.state in WAITING


@dataclass(frozen=True)
class Snapshot:
    """The queue at one moment."""

    jobs: Mapping[tuple[str, int], SlurmJob]  # by (token, index of the task)
    error: str = ""  # why it could not be had

    def of(self, token: str, index: int) -> SlurmJob | None:
        """The job that is to execute task `index` of the submission with that token."""
        return self.jobs.get((token, index))

    def ids(self, token: str) -> list[str]:
        """The tasks of a submission."""
        return [job.id for (found, _), job in self.jobs.items() if found == token]


@dataclass
class Scheduler:
    """The cluster, through its command-line programs."""

    environment: Mapping[str, str] = field(default_factory=lambda: scheduler_environment(os.environ))

    def snapshot(self) -> Snapshot:
        """All jobs of this user that carry a token, also those that ended a few minutes ago (SLURM's MinJobAge)."""
        form = "%i|%T|%r|%N|%k"
        try:
            user = str(os.getuid())
            text = self.ask("squeue", "--noheader", "--array", "--states=all", f"--user={user}", f"--format={form}")
        except SchedulerError as error:
            return Snapshot({}, str(error))
        jobs: dict[tuple[str, int], SlurmJob] = {}
        for line in text.splitlines():
            identity, state, reason, nodes, comment = [*line.split("|", 4), "", "", "", ""][:5]
            if not comment.startswith(COMMENT):
                continue
            _, _, index = identity.partition("_")
            job = SlurmJob(identity, state, "" if reason == "None" else reason, nodes)
            key = (comment.removeprefix(COMMENT), int(index) if index.isdecimal() else 0)
            if key not in jobs or job.live:
                jobs[key] = job
        return Snapshot(jobs)

    def ended(self, ids: Iterable[str]) -> dict[str, SlurmJob]:
        """What accounting knows of jobs that are no longer in the queue, by id. Empty where there is no accounting."""
        numbers = sorted({identity.partition("_")[0] for identity in ids})
        if not numbers:
            return {}
        form = "JobID,State,NodeList"
        try:
            text = self.ask(
                "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(numbers)}", f"--format={form}"
            )
        except SchedulerError:
            return {}
        jobs = {}
        for line in text.splitlines():
            identity, state, nodes = [*line.split("|"), "", ""][:3]
            if state:
                jobs[identity] = SlurmJob(identity, state.split()[0], nodes=nodes)  # "CANCELLED by 1000"
        return jobs

    def cancel(self, ids: Iterable[str]) -> None:
        """End jobs. Those that have ended already are passed over.

        Raises:
            SchedulerError: SLURM does not answer.
        """
        arrays: dict[str, list[int]] = {}
        for number, _, index in (identity.partition("_") for identity in ids):
            arrays.setdefault(number, []).extend([int(index)] if index else [])
        words = [f"{number}_[{ranges(indices)}]" if indices else number for number, indices in arrays.items()]
        for start in range(0, len(words), 100):  # a command line has its limits
            self.ask("scancel", *words[start : start + 100])

    def requeue(self, identity: str) -> None:
        """Put a running job back into the queue; it is ended for that.

        Raises:
            SchedulerError: SLURM does not answer, or does not allow it.
        """
        self.ask("scontrol", "requeue", identity)

    def leave_out(self, identity: str, nodes: Iterable[str]) -> None:
        """Have a job that waits in the queue run anywhere but on these nodes.

        Raises:
            SchedulerError: SLURM does not answer, or the job does not wait.
        """
        self.ask("scontrol", "update", f"JobId={identity}", f"ExcNodeList={','.join(nodes)}")

    def time_left_s(self, identity: str) -> float | None:
        """Seconds until the time limit of a running job; None without a limit, or where SLURM does not say."""
        try:
            text = self.ask("squeue", "--noheader", f"--jobs={identity}", "--format=%L").strip()
        except SchedulerError:
            return None
        match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
        if match is None:
            return None
        days, hours, mins, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + mins) * 60 + seconds)

    def configuration(self) -> dict[str, str]:
        """The cluster's configuration, as `scontrol show config` names it.

        Raises:
            SchedulerError: SLURM does not answer.
        """
        pairs = (line.partition("=") for line in self.ask("scontrol", "show", "config").splitlines())
        return {key.strip(): value.strip() for key, equals, value in pairs if equals}

    def max_array_tasks(self) -> int:
        """The largest job array that SLURM takes.

        Raises:
            SchedulerError: it does not answer.
        """
        configuration = self.configuration()
        option = re.search(r"max_array_tasks=(\d+)", configuration.get("SchedulerParameters", ""))
        sizes = [int(configuration.get("MaxArraySize", "1001"))] + ([int(option[1])] if option else [])
        return max(1, min(sizes))

    def test_only(self, script: str) -> str:
        """What SLURM says to a job script without submitting it: where and when it would start.

        Raises:
            SchedulerError: it would be refused.
        """
        return self.ask("sbatch", "--test-only", script, with_stderr=True).strip()

    def ask(self, program: str, *arguments: str, with_stderr: bool = False) -> str:
        """Run one of SLURM's programs and return what it prints.

        Raises:
            SchedulerError: it is not there, does not answer in time, or fails.
        """
        conf = self.environment.get("SLURM_CONF")
        if conf and not Path(conf).is_file():  # its programs would try for a minute
            raise SchedulerError(f"{program}: SLURM_CONF={conf}: no such file; is the cluster up, and visible from here?")
        try:
            answer = subprocess.run(
                [program, *arguments],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
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


def scheduler_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a job has in its own: sbatch hands it on, and it would change the new job.

    That is what SLURM sets and what torchrun sets, from which a training would take that it is one process of several.
    Variables that say where the cluster is and who asks stay.
    """
    kept = {"SLURM_CONF", "SLURM_JWT", "SLURM_TIME_FORMAT"}
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}
    prefixes = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI", "TORCHELASTIC_", "VITPA_")
    return {
        key: value
        for key, value in environment.items()
        if key in kept or (key not in dropped and not key.startswith(prefixes))
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
