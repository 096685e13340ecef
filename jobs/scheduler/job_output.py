"""What a job has printed itself, before or without its runs' own logs, and what that says of a job that ended too early.

sbatch and srun write it to `submitit/` in the submission: `<id>_0_log.err` and `.out`.
"""

from __future__ import annotations

import re
from pathlib import Path

from jobs.records import Claim
from vitpa.documents import lines_at_end
from vitpa.records import RunError, read_record
from vitpa.rundir import AttemptDir

ENDED_EARLY = "before it started the run"
FAILED_LINE = "setup: "  # before a line of the profile's setup that has failed, in what a job prints
SETUP_FAILED = "VITPA_SETUP_FAILED"  # the same lines, in the environment of the job
# ends by the job's own fault: another one would meet them, too
ITS_OWN_FAULT = frozenset({"FAILED", "COMPLETED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"})
_SETUP_ENDED = "setup ended the job"
_OF_SLURM = re.compile(r"(srun|slurmstepd|sbatch|submitit)\b")
_ERROR = re.compile(r"error|exception|not found|no such|cannot|denied|unrecognized|ended the job|CANCELLED", re.IGNORECASE)


def ended_early(identity: str, last_words: str, output: Path) -> tuple[str, str]:
    """State and reason of a run whose job `identity` (empty: it got none) is over without having started it.

    `last_words` is the state in which the job ended, if that is known; `output` the folder of what jobs print.
    """
    if not identity:
        return "uncertain", f"it got no job {ENDED_EARLY}; see {output}"
    state = "failed" if last_words in ITS_OWN_FAULT else "uncertain"
    what = f"ended ({last_words or 'unknown to SLURM'}) {ENDED_EARLY}"
    if cause := _cause(printed(output, identity)):
        return state, f"its job {what}: {cause}; see {output}"  # alike for all jobs that end like this
    if last_words == "FAILED" and not any(output.glob(f"{identity}_*_log.err")):
        said = "its node could not write there (full, gone, read-only?), or could not start it"
        return state, f"its job {what}: {said}; see {output}"
    return state, f"its job {identity} {what}; see {output}"


def worker_ended_early(output: Path) -> tuple[str, str]:
    """The same of runs on this machine whose workers are over, without one of them having started any run."""
    cause = _cause(printed(output, "*"))
    reason = f"its worker ended {ENDED_EARLY}" + (f": {cause}" if cause else "")
    return "failed" if _ERROR.search(cause) else "uncertain", f"{reason}; see {output}"


def output_of(attempt: AttemptDir, identity: str) -> list[Path]:
    """What the job of an attempt has printed, or what all of its submission have where it is not known: errors first."""
    try:
        claim = read_record(Claim, attempt.claim_json)
    except RunError:
        return []
    return printed(attempt.path.parents[3] / str(claim and claim.submission) / "submitit", identity or "*")


def printed(output: Path, identity: str) -> list[Path]:
    """The files in which a job has printed something: errors first."""
    files = [*sorted(output.glob(f"{identity}_*_log.err")), *sorted(output.glob(f"{identity}_*_log.out"))]
    return [path for path in files if path.is_file() and path.stat().st_size]


def _cause(files: list[Path]) -> str:
    """The line that best says why a job ended, from what went to stderr: the last error, its own before SLURM's.

    A line of `setup` that failed without ending the job is reported as well: it may be the cause.
    """
    lines = []
    for path in files:
        if path.suffix == ".err":
            try:
                lines += lines_at_end(path)
            except OSError as error:
                lines.append(f"{path}: cannot be read ({error.strerror})")
    setup = [line.removeprefix(FAILED_LINE) for line in lines if line.startswith(f"{FAILED_LINE}`")]
    lines = [line for line in lines if not line.startswith(f"{FAILED_LINE}`")]
    own = [line for line in lines if not _OF_SLURM.match(line)]
    errors = [line for line in own if _ERROR.search(line)] or [line for line in lines if _ERROR.search(line)]
    cause = (errors or own or lines or [""])[-1][:300]
    return cause if _SETUP_ENDED in cause else with_setup(cause, ", ".join(setup)[:500])


def with_setup(reason: str, failed: str) -> str:
    """The reason of a failure, with the lines of `setup` that had failed before, if there are any."""
    return "; ".join(filter(None, [reason, f"in setup {failed}" if failed else ""]))
