"""Jobs that wait: why, in plain words, and what helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.report.status import row_of, stuck, table_of
from jobs.report.waiting import advice, needs_action
from jobs.scheduler.own_jobs import SlurmJob
from jobs.state import StateReader
from tests.support.claims import Queue, slurm_claim
from tests.support.jobs_sweeps import make_sweep

RELEASE = "scontrol release 7"
NEVER = "it will not start like this: cancel it, change "


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("JobHeldUser", RELEASE),
        ("JobHeldAdmin", RELEASE),
        ("launch failed requeued held", RELEASE),
        ("launch_failed_requeued_held", RELEASE),
        ("JobHoldMaxRequeue", RELEASE),
        ("ReservationDeleted", "scontrol update JobId=7 ReservationName="),
        ("DependencyNeverSatisfied", f"{NEVER}`dependency`"),
        ("BadConstraints", f"{NEVER}`constraint`"),
        ("InvalidAccount", f"{NEVER}`account`"),
        ("Job's account not permitted to use this partition (main allows foo not root)", f"{NEVER}`account`"),
        ("InvalidQOS", f"{NEVER}`qos`"),
        ("PartitionTimeLimit", f"{NEVER}`time`"),
        ("QOSMaxWallDurationPerJobLimit", NEVER),
        ("AssocMaxCpuPerJobLimit", NEVER),
        ("QOSMaxGRESPerNode", NEVER),
        ("QOSMinGRES", NEVER),
        ("PartitionNodeLimit", "its partition has or allows no such nodes now"),
        ("PartitionDown", "its partition is closed"),
        ("PartitionInactive", "its partition is closed"),
        ("ReqNodeNotAvail, UnavailableNodes:127.0.0.1", "sinfo -R says why"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", "sinfo -R says why"),
        ("AssocGrpCPUMinutesLimit", "the account's budget is used up"),
        ("AccountingPolicy", "a limit of your account or QOS"),
    ],
)
def test_somebody_has_to_see_to_it(reason: str, expected: str) -> None:
    said = advice(SlurmJob("7_0", "PENDING", reason))
    assert expected in said
    assert needs_action(said)
    assert not re.search(r"[{}]", said)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("QOSMaxJobsPerUserLimit", "other jobs of yours have ended"),
        ("AssocMaxJobsLimit", "other jobs of yours have ended"),
        ("QOSGrpGRES", "others of your account or QOS leave room"),
        ("AssocGrpJobsLimit", "others of your account or QOS leave room"),
        ("Licenses", "licenses are free"),
        ("Reservation", "its reservation begins"),
        ("Dependency", "the job that it depends on has ended"),
        ("BeginTime", "its time has come"),
        ("JobArrayTaskLimit", "(array_parallelism)"),
        ("Resources", "nodes are free"),
        ("Priority", "its turn comes"),
    ],
)
def test_it_starts_by_itself(reason: str, expected: str) -> None:
    said = advice(SlurmJob("7_0", "PENDING", reason))
    assert said.startswith("it starts by itself when ")
    assert expected in said
    assert not needs_action(said)


def test_states_without_a_reason() -> None:
    assert RELEASE in advice(SlurmJob("7", "REQUEUE_HOLD", ""))
    said = advice(SlurmJob("7_0", "SPECIAL_EXIT", "JobHeldUser"))  # not because of `hold`
    assert "RequeueExitHold" in said
    assert RELEASE in said
    assert needs_action(said)
    assert advice(SlurmJob("7_0", "PENDING", "AReasonOf2030")) == ""
    assert advice(SlurmJob("7_0", "RUNNING", "")) == advice(None) == ""


def test_status_says_it(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1).runs[0]
    slurm_claim(tmp_path, run)
    state = StateReader(tmp_path, Queue(SlurmJob("7_0", "PENDING", "JobHeldUser"))).state(run)
    row = row_of(state, tmp_path)
    assert row["reason"] == "pending in SLURM: JobHeldUser"
    assert RELEASE in row["advice"]
    (line,) = table_of([row], "title").below
    assert line == f"digits-content-s0 pending: pending in SLURM: JobHeldUser; {row['advice']}"
    assert stuck([state, state]) == [f"digits-content-s0 and 1 more: {row['advice']}"]
