"""Why a job waits in SLURM, in plain words, and what helps: the reasons that squeue gives (man squeue, JOB REASON CODES)."""

from __future__ import annotations

import re

from jobs.scheduler.own_jobs import SlurmJob

_NEVER = "it will not start like this: cancel it, change {what} in the profile and submit again"
_BY_ITSELF = "it starts by itself when {when}"
# by reason without blanks and underscores, in small letters; the first that matches
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"launchfailed|jobholdmaxrequeue|maxrequeue",
        "SLURM could not start it on its node (scontrol show job {job} and sinfo -R may say why) and holds it; to try again: "
        "scontrol release {job}",
    ),
    (r"jobhelduser", "it is held, by `hold` in the profile or by scontrol hold; to let it start: scontrol release {job}"),
    (
        r"jobheldadmin",
        "an administrator holds it, or SLURM does after an error (scontrol show job {job}); to let it start: "
        "scontrol release {job}, which may be for administrators only",
    ),
    (
        r"reservationdeleted|resvdelhold",
        "its reservation was deleted; to let it start without: scontrol update JobId={job} ReservationName= and "
        "scontrol release {job}",
    ),
    (r"dependencyneversatisfied", _NEVER.format(what="`dependency`")),
    (r"badconstraints|constraints", _NEVER.format(what="`constraint`, or what it asks of a node,")),
    (r"invalidaccount|accountnotallowed|job'saccount", _NEVER.format(what="`account` or `partition`")),
    (r"invalidqos|qosnotallowed", _NEVER.format(what="`qos` or `partition`")),
    (r"partitiontimelimit|(qos|assoc\w*)timelimit|maxwall", _NEVER.format(what="`time` (a long run goes on in its next job)")),
    (r"(qos|assoc)max\w*(perjob|pernode)|qosmin", _NEVER.format(what="what it asks for (more, or less, than is allowed),")),
    (r"partition(node)?(config|limit)", "its partition has or allows no such nodes now: see sinfo, `nodes` and `partition`"),
    (r"accountingpolicy|qosusagethreshold", "a limit of your account or QOS: see sacctmgr show qos, or ask for more"),
    (r"(qos|assoc)grp\w*minutes", "the account's budget is used up: ask the administrators, or use another `account`"),
    (r"(qos|assoc)grp", _BY_ITSELF.format(when="others of your account or QOS leave room")),
    (r"(qos|assoc)max|(qos|assoc\w*)(job|resource)limit|maxjobs", _BY_ITSELF.format(when="other jobs of yours have ended")),
    (
        r"partitiondown|partitioninactive",
        "its partition is closed; it starts when that is up again (sinfo); or choose another",
    ),
    (
        r"reqnodenotavail|nodedown|nodesrequired|frontenddown",
        "nodes that it needs are down, drained or reserved (sinfo -R says why): it starts when they are back",
    ),
    (r"reservation|reqresv", _BY_ITSELF.format(when="its reservation begins")),
    (r"dependency", _BY_ITSELF.format(when="the job that it depends on has ended")),
    (r"licenses", _BY_ITSELF.format(when="licenses are free")),
    (r"begintime|cleaning", _BY_ITSELF.format(when="its time has come: SLURM waits a little before it starts a job again")),
    (r"jobarraytasklimit", _BY_ITSELF.format(when="others of the sweep have ended (array_parallelism)")),
    (r"resources", _BY_ITSELF.format(when="nodes are free")),
    (r"priority", _BY_ITSELF.format(when="its turn comes")),
)
_FAILED = (  # its reason is that of any job on hold
    "SLURM holds it, since it ended with an exit code of the cluster's RequeueExitHold; to have it try again: "
    "scontrol release {job}; if not, vitpa sweep cancel"
)
HELD_STATES = ("REQUEUE_HOLD", "RESV_DEL_HOLD")


def advice(job: SlurmJob | None) -> str:
    """What a waiting job waits for, and what helps; empty for one that does not wait, or for a reason that is not known."""
    if job is None or not job.waiting:
        return ""
    if job.state == "SPECIAL_EXIT":
        return _FAILED.format(job=job.id.partition("_")[0])
    reason = re.sub(r"[\s_]", "", job.reason).lower()
    found = next((text for pattern, text in _ADVICE if re.match(pattern, reason)), "")
    if not found and job.state in HELD_STATES:
        found = "SLURM holds it; to let it start: scontrol release {job}"
    return found.format(job=job.id.partition("_")[0])


def needs_action(text: str) -> bool:
    """Whether an advice is about a job that will not start by itself."""
    return bool(text) and not text.startswith(_BY_ITSELF.partition("{")[0])
