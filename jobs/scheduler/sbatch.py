"""A profile as submitit's SLURM executor: the sbatch options of a job array of ours, and the lines of its script."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import submitit

from jobs.profile import SlurmProfile, minutes
from jobs.scheduler.client import ranges
from jobs.scheduler.gres import parse_gres
from jobs.scheduler.job_output import FAILED_LINE, SETUP_FAILED
from jobs.scheduler.own_jobs import COMMENT

# SLURM's warning of the time limit reaches a job also while its Python is still starting, and would kill it; the file that is
# removed says that nothing has been started yet
PYTHON = (
    '/bin/sh -c \'trap "" USR1 USR2; [ -z "$VITPA_NOT_STARTED" ] || rm -f "$VITPA_NOT_STARTED"; exec "$@"\' '
    f"sh {shlex.quote(sys.executable)}"
)
# Where srun cannot start the job's process, as while slurmctld is away, or where that is killed, as by the kernel for its
# memory, nobody in the job can see to its runs: the script starts it again; the history of the runs says when to give up.
# Where slurmctld answers, the second failure counts: the profile's srun_args may be wrong.
# Not on several nodes: the others have joined the training that was. A job that SLURM ends or requeues ends with its script.
# Under cgroups srun ends with 253 where the kernel has killed anything of the job for its memory. If that was a training, the
# job's process has written it down, and has removed the second file at its end: it is not started again.
STEP = """srun() {
  local try code ended answered=0
  for try in {1..30}; do
    export VITPA_NOT_STARTED=$(mktemp "${TMPDIR:-/tmp}/vitpa-XXXXXXXX" 2> /dev/null)
    export VITPA_NOT_ENDED=$(mktemp "${TMPDIR:-/tmp}/vitpa-XXXXXXXX" 2> /dev/null)
    code=0 ended=
    command srun "$@" || code=$?
    if [ -n "$VITPA_NOT_ENDED" ]; then
      [ -e "$VITPA_NOT_ENDED" ] || ended=1
      rm -f "$VITPA_NOT_ENDED"
    fi
    [ $code != 0 ] || return 0
    if [ -n "$VITPA_NOT_STARTED" ] && [ -e "$VITPA_NOT_STARTED" ]; then
      rm -f "$VITPA_NOT_STARTED"
      if scontrol ping 2> /dev/null | grep -q ' UP$'; then answered=$((answered + 1)); fi
      [ $answered -lt 2 ] || return $code
      echo "srun has not started the job's process; again in 10 s"
      sleep 10
    elif [[ $code = 137 || $code = 253 ]] && [ -z "$ended" ] && [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ]; then
      echo "the job's process was killed by SIGKILL (out of memory?); it is started again"
    else
      return $code
    fi >&2
  done
  return $code
}"""
# where `setup` ends the job, or a line of it fails, the job's output says so; the job goes on after a line that fails
ON_EXIT = 'echo "setup ended the job with exit code $code: $BASH_COMMAND"'
# of a line, not of what fails in a function or a file that it calls; ${x:0:200} and the 500: an environment has its limits
ON_FAILURE = (
    "VITPA_CODE=$?; if [ ${#BASH_SOURCE[@]} = 1 ] && [ ${#VITPA_SETUP_FAILED} -lt 500 ]; then "
    'VITPA_LINE=$BASH_COMMAND; mapfile -t -s $((LINENO - 1)) -n 1 VITPA_LINE < "${BASH_SOURCE[0]}"; '
    'VITPA_LINE="\\`${VITPA_LINE:0:200}\\` failed with status $VITPA_CODE"; '
    f'echo "{FAILED_LINE}$VITPA_LINE"; '
    'VITPA_SETUP_FAILED="${VITPA_SETUP_FAILED:+$VITPA_SETUP_FAILED, }$VITPA_LINE"; fi >&2'
)
BEFORE_SETUP = (
    "VITPA_SETUP=1 VITPA_SETUP_FAILED=",
    f"""trap 'code=$?; [ -z "$VITPA_SETUP" ] || {{ {ON_EXIT}; }} >&2' EXIT""",
    f"trap '{ON_FAILURE}' ERR",
)
AFTER_SETUP = f"VITPA_SETUP=; trap - ERR; export {SETUP_FAILED}"
# keys of a profile that are parameters of submitit's, too
AS_THEY_ARE = (
    *("signal_delay_s", "nodes", "mem", "partition", "account", "qos", "constraint", "nodelist", "mail_type", "mail_user"),
)
EXPORTED = ("PYTHONPATH", "PYTHONSAFEPATH")  # also where a cluster does not pass on the environment


def slurm_executor(
    profile: SlurmProfile,
    folder: Path,
    *,
    root: Path,
    name: str,
    token: str,
    exclude: list[str],
    indices: list[int],
    count: int,
) -> submitit.SlurmExecutor:
    """The executor for an array of `count` tasks, of which those in `indices` are to be started.

    Raises:
        ValueError: submitit does not know a parameter.
    """
    executor = submitit.SlurmExecutor(folder=folder, python=PYTHON)
    parameters = sbatch_parameters(profile, root=root, name=name, token=token, exclude=exclude)
    at_a_time = profile.array_parallelism or count
    if count > 1 and len(indices) < count:
        parameters["additional_parameters"]["array"] = f"{ranges(indices)}%{at_a_time}"
    executor.update_parameters(**parameters, array_parallelism=at_a_time)
    return executor


def sbatch_parameters(profile: SlurmProfile, *, root: Path, name: str, token: str, exclude: list[str]) -> dict[str, Any]:
    """The parameters of submitit's executor, which are sbatch's by their long names."""
    left_out = ",".join(filter(None, [profile.exclude or "", *exclude]))
    cpus = profile.cpus_per_node
    parameters = {
        "job_name": f"{name}-{token}",
        "comment": COMMENT + token,
        "time": minutes(profile.time_s),
        "ntasks_per_node": 1,  # it starts torchrun, which starts a process per GPU
        "cpus_per_task": cpus,
        "gpus_per_node": None if profile.gpus_in_gres else profile.gpus_per_node or None,
        "gres": ",".join(map(str, parse_gres(profile.gres or ""))) or None,
        "exclude": left_out or None,
        **{key: getattr(profile, key) for key in AS_THEY_ARE},
    }
    more = {"chdir": str(root), "requeue": True, "nice": profile.nice, "reservation": profile.reservation}
    srun = [
        "--kill-on-bad-exit=0",  # node 0 has to write down why
        f"--ntasks={profile.nodes}",  # whatever `setup` exports
        "--export=ALL",  # what the job has, also where the job itself got little (additional_parameters.export)
    ]
    if cpus is not None:
        srun.append(f"--cpus-per-task={cpus}")  # not inherited from sbatch since SLURM 22.05
    return {
        **{key: value for key, value in parameters.items() if value is not None},
        "additional_parameters": {
            **{key: value for key, value in more.items() if value is not None},
            **profile.additional_parameters,
        },
        "srun_args": [*srun, *profile.srun_args],
        "setup": [*_exports(), *BEFORE_SETUP, *profile.setup, AFTER_SETUP, STEP],
    }


def _exports() -> list[str]:
    """Lines that give a job the variables it needs, also where a cluster does not pass on the environment."""
    lines = [f"export {name}={shlex.quote(os.environ[name])}" for name in EXPORTED if name in os.environ]
    srun = shutil.which("srun")
    programs = f' command -v srun > /dev/null || PATH="$PATH:"{shlex.quote(str(Path(srun).parent))}' if srun else ""
    return [*lines, 'export PATH="${PATH:-/usr/local/bin:/usr/bin:/bin}"' + (f";{programs}" if programs else "")]
