"""What sbatch answers to a script that it is not to submit (`sbatch --test-only`), and what that answer is worth."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.plan.limits import Need
from jobs.profile import SlurmProfile
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.scheduler.cluster import Cluster, Finding
from jobs.scheduler.sbatch import slurm_executor
from jobs.submit.submit import Batch

UNAVAILABLE = "Requested node configuration is not available"
WAITS = (  # what sbatch says in its test, and does not refuse (job_allocate in SLURM's job_mgr.c)
    *("Requested nodes are busy", "Required node not available", "Requested reservation not usable now"),
    *("Requested reservation is in use", "Requested partition configuration not available now", "Licenses not available"),
)


def test_only(scheduler: Scheduler, batches: Sequence[Batch], profile: SlurmProfile, root: Path, name: str) -> Finding:
    """What sbatch says to the script that `submit` would send.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    count = max(len(batch.tasks) for batch in batches)
    exclude = batches[0].how["exclude"]
    folder = root / "sweeps" / name / "submissions" / "plan"
    try:
        executor = slurm_executor(
            profile, folder, root=root, name=name, token="plan", exclude=exclude, indices=list(range(count)), count=count
        )
        if count > 1:
            executor.parameters["map_count"] = count
        script = executor._make_submission_file_text("true", "plan")
    except (ValueError, RuntimeError) as error:
        return Finding("problem", "sbatch", f"submitit does not take the profile: {error}")
    return test_script(scheduler, script)


def test_script(scheduler: Scheduler, script: str) -> Finding:
    """What sbatch says to a script.

    Raises:
        SchedulerError: SLURM does not answer.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            answer = scheduler.test_only(file.name)
        except SchedulerError as error:
            if is_silence(error):
                raise
            words = re.sub(r"sbatch: (error: )?|allocation failure: ", "", str(error))
            return Finding("problem", "sbatch", f"SLURM would refuse it: {words}")
    return Finding("info", "sbatch", re.sub(r"sbatch: Job \d+ to start", "SLURM accepts it; a first run could start", answer))


def only_for_now(answer: Finding, profile: SlurmProfile, cluster: Cluster) -> Finding:
    """sbatch's answer, as a warning where it refuses in its test what it would take and let wait.

    Its test knows no nodes that are down, drained or reserved, and no partition that is down. Jobs wait for them.
    """
    if answer.level != "problem":
        return answer
    waits = any(words in answer.text for words in WAITS) or (profile.reservation and "Invalid time" in answer.text)
    if UNAVAILABLE in answer.text and not waits:
        names = [cluster.partition(name) for name in (profile.partition or "").split(",")] if profile.partition else [None]
        waits = any(_is_out_of_service(profile, cluster.partition(name), cluster) for name in names)
    if not waits:
        return answer
    return Finding("warning", answer.about, answer.text.replace("SLURM would refuse it", "SLURM takes it, but it would wait"))


def _is_out_of_service(profile: SlurmProfile, partition: str, cluster: Cluster) -> bool:
    """Whether a partition has the nodes for a run, but they are, or may be, out of service now."""
    need = Need.of(profile)
    fitting = [kind for kind in cluster.nodes.get(partition, []) if need.fits(kind)]
    if sum(kind.count for kind in fitting) < need.nodes:
        return False
    usable = sum(kind.count for kind in fitting if kind.usable)
    chosen = profile.constraint or profile.nodelist or profile.exclude or profile.reservation
    down = cluster.partitions.get(partition, {}).get("State") == "DOWN"
    return down or usable < need.nodes or bool(chosen and usable < sum(kind.count for kind in fitting))


def is_silence(error: SchedulerError) -> bool:
    """Whether SLURM has not answered, rather than refused."""
    silence = ("not found; is this", "no answer from SLURM", "Unable to contact", "Socket timed out", "Connection refused")
    return any(words in str(error) for words in silence)
