"""What must hold on a disk that loses what was not synced, and on NFS, where a host sees late what another one has made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from jobs.execute.slurm import run_task
from jobs.submit.snapshot import make_snapshot
from jobs.submit.submission import SubmissionDir, _secure_pickles
from tests.support.simulation import trainer
from tests.support.simulation.disk import Disk, Faults
from tests.support.simulation.history import simulated_disk
from tests.support.simulation.processes import Host, Park, Process
from tests.support.simulation.seams import SNAPSHOT
from vitpa.checkpoint import Progress
from vitpa.config_file import load_config, record_config
from vitpa.logs import Logs
from vitpa.records import make_folders, with_checksum, write_json
from vitpa.replica import Replica
from vitpa.rundir import RunDir


def in_process(park: Park, host: str, action: Callable[[], object]) -> None:
    process = park.start(Process(park, Host(host), f"process on {host}", action, environment={}))
    park.run(until=lambda: not process.alive)
    assert process.exit_code == 0, process.error


@pytest.fixture
def disk() -> Iterator[Disk]:
    with simulated_disk() as made:
        made.begin(Faults())
        yield made


def before_power_loss(disk: Disk, action: Callable[[], object]) -> None:
    """Do something in a process, and then lose what it has not synced."""
    park = Park(0)
    in_process(park, "n1", action)
    disk.lose_data(park.now_s, lambda most: 0)
    disk.lose_entries(park.now_s, lambda most: 0)


def test_what_is_not_synced_is_lost(disk: Disk) -> None:
    path = Path(disk.root) / "words"

    def write() -> None:
        with path.open("w") as file:
            file.write("words")

    before_power_loss(disk, write)
    assert not path.exists()


def test_a_record_is_not_lost_with_a_new_folder(disk: Disk) -> None:
    path = Path(disk.root) / "runs" / "0123456789abcdef" / "attempts" / "record.json"

    def write() -> None:
        make_folders(path.parent)
        write_json(path, {})

    before_power_loss(disk, write)
    assert path.read_text() == "{}\n"


def test_a_claim_is_not_lost(disk: Disk) -> None:
    run = RunDir(Path(disk.root), "0123456789abcdef")
    before_power_loss(disk, lambda: run.claim_attempt(1, {"by": "a test"}, "config"))
    assert [attempt.claim_json.exists() for attempt in run.attempts()] == [True]


@pytest.mark.parametrize("length", [None, 100, 0])
def test_a_pickle_is_not_lost_and_one_that_was_cut_short_is_written_again(disk: Disk, length: int | None) -> None:
    submission = SubmissionDir(Path(disk.root) / "sweeps" / "small" / "submissions" / "s")
    paths = [JobPaths(submission.submitit, job_id=f"7_{index}").submitted_pickle for index in range(3)]
    arguments = disk.root, "sweeps/small/submissions/s"

    def start() -> None:
        make_folders(submission.submitit)
        for path in paths:
            DelayedSubmission(run_task, *arguments).dump(path)
        if length is not None:
            paths[0].write_bytes(paths[1].read_bytes()[:length])
            paths[2].unlink()  # it has not got its name yet
        _secure_pickles(Path(disk.root), submission, ["7_0", "7_1", "7_2"])

    before_power_loss(disk, start)
    assert [DelayedSubmission.load(path).args for path in paths] == [arguments] * 3


def test_a_copy_of_the_code_is_not_lost(disk: Disk) -> None:
    made: list[Path] = []
    before_power_loss(disk, lambda: made.append(make_snapshot(Path(disk.root))))
    assert {path: (made[0] / path).read_bytes() for path in SNAPSHOT} == SNAPSHOT


def test_a_copy_of_the_code_that_was_found_or_put_right_is_not_lost(disk: Disk) -> None:
    made: list[Path] = []

    def make_twice() -> None:
        made.append(make_snapshot(Path(disk.root)))
        shutil.rmtree(made[0] / "jobs")
        make_snapshot(Path(disk.root))

    before_power_loss(disk, make_twice)
    assert {path: (made[0] / path).read_bytes() for path in SNAPSHOT} == SNAPSHOT


def test_a_result_is_not_lost_nor_what_it_is_compared_with(disk: Disk) -> None:
    config = load_config(Path("digits"), [f"runtime.root={disk.root}"])
    run = config.run_dir

    def finish() -> None:
        record_config(config)
        made_with = {"code_version": "g1", "beton_sha256": trainer.BETON_SHA256, "steps_total": 4}
        write_json(run.env_json, with_checksum(made_with))
        replica = Replica(config, run, trainer.Weights(b"\0" * 32))
        replica.progress = Progress(
            step=4, train_time_s=1.0, code_versions=["g1"], val={"val/top1": 0.5, "val/top5": 0.9, "val/loss": 1.0}
        )
        with Logs(run, restored_step=0, restored_rows="", not_before_s=0.0, tensorboard=False) as replica.logs:
            replica.logs.row(4, 4.0, replica.progress.val)
            replica.record_result(trainer.BETON_SHA256)

    before_power_loss(disk, finish)
    result = run.result()
    assert result is not None
    assert result.steps == 4


def test_a_claim_fails_on_a_host_that_does_not_see_the_other_one_yet(disk: Disk) -> None:
    disk.faults.late, disk.faults.late_s = 1.0, 60.0
    park, run = Park(0), RunDir(Path(disk.root), "0123456789abcdef")
    made: list[bool] = []

    def claim() -> None:
        made.append(run.claim_attempt(1, {"by": "a test"}) is not None)

    in_process(park, "n1", lambda: make_folders(run.attempts_dir))
    in_process(park, "n2", lambda: made.append(run.attempt(1).path.exists()))
    in_process(park, "n1", claim)
    in_process(park, "n2", lambda: made.append(run.attempt(1).path.exists()))
    in_process(park, "n2", claim)
    assert made == [False, True, False, False]
    assert len(run.attempts()) == 1
