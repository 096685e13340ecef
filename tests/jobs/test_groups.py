"""Seeds that train together: which runs make a group, and what becomes of its members on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.execute.slots import Slot, gpu_memory_gib, take_slot
from jobs.groups import evenly, group_runs, in_step, most_replicas, num_images, unsupported_reason
from jobs.profile import LocalProfile, SlurmProfile
from jobs.records import Intent, WantedRun
from jobs.scheduler.client import Scheduler
from jobs.state import RunState, StateReader
from jobs.submit.submit import prepare
from jobs.sweep import Run, Sweep
from tests.support.jobs_sweeps import (
    assert_no_process_left,
    exits,
    finished_trainings,
    launch,
    make_sweep,
    most_at_a_time,
    processes_of,
    results,
    settle,
)
from tests.support.waiting import wait_for
from vitpa.arguments import ConfigError
from vitpa.checkpoint_file import Footer
from vitpa.config import RunConfig
from vitpa.config_file import load_config, parse_config, shipped_configs
from vitpa.records import read_json
from vitpa.rundir import RunDir
from vitpa.step.fit import memory_gib
from vitpa.together import MAX_REPLICAS


def labels(sweep: Sweep, groups: list[list[int]]) -> list[list[str]]:
    return [[sweep.runs[index].label.removeprefix("digits-") for index in group] for group in groups]


def configs(root: Path, sweep: Sweep) -> list[RunConfig]:
    setting = [f"runtime.root={root}"]
    return [parse_config(run.config.model_dump(mode="json"), run.label, setting) for run in sweep.runs]


def checkpoints(root: Path, run: Run, *steps: int) -> None:
    folder = run.directory(root).checkpoints
    folder.mkdir(parents=True)
    for step in steps:
        (folder / f"step_{step:09d}.pt").write_bytes(b"archive" + Footer.of(b"archive", run.signature, step).line())


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(5, 5, [5]), (5, 3, [3, 2]), (5, 4, [3, 2]), (7, 3, [3, 2, 2]), (5, 1, [1] * 5), (1, 9, [1])]
)
def test_seeds_are_split_evenly(count: int, most: int, sizes: list[int]) -> None:
    parts = evenly(list(range(count)), most)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == list(range(count))


def test_cells_are_never_mixed_and_seeds_keep_their_order(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=3)
    assert labels(sweep, group_runs(configs(tmp_path, sweep), lambda config, seeds: seeds)) == [
        ["content-s0", "content-s1", "content-s2"],
        ["positional-s0", "positional-s1", "positional-s2"],
    ]
    assert labels(sweep, group_runs(configs(tmp_path, sweep), lambda config, seeds: 2)) == [
        ["content-s0", "content-s1"],
        ["positional-s0", "positional-s1"],
        ["content-s2"],
        ["positional-s2"],
    ]
    alone = [[index] for index in range(6)]
    assert group_runs(configs(tmp_path, sweep), lambda config, seeds: 1) == alone


def test_settings_that_do_not_shape_the_step_share_it(tmp_path: Path) -> None:
    axes = {
        "optim.lr": [5e-4, 1e-3],
        "mixing": {"none": {}, "both": {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0}},
        "train.global_batch_size": [64, 128],
    }
    sweep = make_sweep(tmp_path, seeds=2, axes=axes)
    groups = group_runs(configs(tmp_path, sweep), lambda config, runs: runs)
    assert [len(group) for group in groups] == [8] * 4
    for group in groups:
        runs = [sweep.runs[index].config for index in group]
        assert len({(run.model.attention, run.train.global_batch_size) for run in runs}) == 1
        assert len({(run.optim.lr, run.augment.mixup_alpha, run.seed) for run in runs}) == 8


def test_plan_says_which_keys_split_the_steps(tmp_path: Path) -> None:
    def notes(seeds: int, axes: dict[str, Any], **profile: Any) -> list[str]:
        states = [RunState(run, "missing") for run in make_sweep(tmp_path, seeds=seeds, axes=axes).runs]
        slurm = SlurmProfile.model_validate({"executor": "slurm", "time": "60", **profile})
        return prepare(states, slurm, tmp_path, [], Cluster()).notes

    one: dict[str, Any] = {"optim.lr": [5e-4, 1e-3]}
    both = {**one, "train.global_batch_size": [64, 128]}
    assert notes(2, {}) == []  # seeds alone: as always
    assert notes(2, one) == ["digits content, digits positional: 4 runs that differ in optim.lr, seed train in 1 step"]
    assert notes(2, both) == [
        "digits content, digits positional: 8 runs that differ in optim.lr, train.global_batch_size, seed train in 2 steps; "
        "1 would do, but for train.global_batch_size, which shapes a step"
    ]
    assert notes(1, {"train.global_batch_size": [64, 128]})[0].startswith("digits content, digits positional: 2 runs")
    assert notes(2, both, gpus_per_node=0) == []  # each trains alone in any case
    assert notes(10, one) == ["digits content, digits positional: 20 runs that differ in optim.lr, seed train in 2 steps"]


def test_runs_with_other_runtime_settings_are_not_mixed(tmp_path: Path) -> None:
    first, _, second, *_ = configs(tmp_path, make_sweep(tmp_path, seeds=2))
    other = second.model_copy(update={"runtime": second.runtime.model_copy(update={"workers": 3})})
    assert group_runs([first, second], lambda config, seeds: 9) == [[0, 1]]
    assert group_runs([first, other], lambda config, seeds: 9) == [[0], [1]]


def test_only_runs_with_a_common_checkpoint_go_on_together(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=6)
    content = [run for run in sweep.runs if run.attention == "content"]
    checkpoints(tmp_path, content[1], 100, 150)
    checkpoints(tmp_path, content[2], 150, 200)  # 150 with s1
    checkpoints(tmp_path, content[4], 100)  # s1 has it, s2 does not
    checkpoints(tmp_path, content[5], 150)
    directories = [run.directory(tmp_path) for run in content]
    assert in_step(directories) == [[0, 3], [1, 2, 5], [4]]
    chosen = [config for config in configs(tmp_path, sweep) if config.model.attention == "content"]
    assert group_runs(chosen, lambda config, seeds: seeds) == [[0, 3], [1, 2, 5], [4]]
    assert group_runs(chosen, lambda config, seeds: 2) == [[0, 3], [1, 2], [4], [5]]


def most(config: RunConfig, wanted: object = "auto", *, seeds: int = 5, processes: int = 1, gib: float | None = 80) -> int:
    return most_replicas(config, seeds, wanted, processes=processes, gpu_memory_gib=gib)  # type: ignore[arg-type]


def test_as_many_as_fit_the_memory() -> None:
    config = load_config(shipped_configs()["cifar10"])
    three = memory_gib(config, 3, 50_000)
    assert most(config) == 5
    assert most(config, gib=three) == 3
    assert most(config, gib=three - 0.01) == 2
    assert most(config, gib=0.1) == 1
    assert most(config, 5000) == MAX_REPLICAS
    shared = config.model_copy(update={"runtime": config.runtime.model_copy(update={"runs_per_gpu": 2})})
    assert most(shared, gib=2 * three) == 3
    assert (most(config, gib=None), most(config, 3, gib=None)) == (1, 3)
    assert (most(config, processes=2), most(config, 3, processes=2)) == (1, 1)
    on_cpu = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": "cpu"})})
    assert (most(on_cpu), most(on_cpu, 3)) == (1, 3)


def test_what_cannot_be_stacked_trains_alone() -> None:
    imagenet = load_config(shipped_configs()["imagenet"])
    assert unsupported_reason(imagenet)
    assert most(imagenet, 5) == 1
    resnet = load_config(shipped_configs()["cifar10"], ["model.kind=resnet18"])
    assert "model.kind=resnet18" in (unsupported_reason(resnet) or "")
    assert (most(resnet), most(resnet, 5)) == (1, 1)
    with pytest.raises(ConfigError, match=r"^model\.kind=resnet18: .* 2 processes .* one GPU in the profile$"):
        most(resnet, processes=2)
    own = RunConfig(dataset="pets")
    assert "pets: its images may not stay on the device" in (unsupported_reason(own) or "")
    resident = own.model_copy(update={"runtime": own.runtime.model_copy(update={"loader": "resident"})})
    assert unsupported_reason(resident) is None
    assert (num_images(resident, "train"), most(resident), most(resident, 2)) == (None, 1, 2)


def test_an_intent_of_an_earlier_version_has_a_task_per_run() -> None:
    runs = [WantedRun(signature="0" * 16)] * 3
    assert Intent(token="t", runs=runs).groups == [[0], [1], [2]]
    assert Intent(token="t", runs=runs, tasks=[[0, 2], [1]]).groups == [[0, 2], [1]]


def order_sizes(root: Path, profile: LocalProfile | SlurmProfile, seeds: int) -> list[int]:
    states = [RunState(run, "missing") for run in make_sweep(root, seeds=seeds).runs]
    return [len(group) for group in prepare(states, profile, root, [], Cluster()).groups]


class Cluster(Scheduler):
    """A SLURM with arrays of 3 tasks."""

    def cluster(self) -> str:
        return "lab"

    def max_array_tasks(self) -> int:
        return 3


def test_on_this_machine_no_gpu_is_idle_for_the_sake_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("jobs.submit.submit.gpu_memory_gib", lambda: 80.0)
    runtime = {"data_dir": f"{tmp_path}/data"}
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime), 2) == [1, 1, 1, 1]
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime), 4) == [2, 2, 2, 2]
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime, slots=1), 4) == [4, 4]
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime, replicas=4), 4) == [4, 4]
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime, gpus_per_run=2), 4) == [1] * 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert order_sizes(tmp_path, LocalProfile(runtime=runtime), 2) == [1, 1, 1, 1]


def test_for_slurm_gpu_hours_count_and_arrays_are_of_groups(tmp_path: Path) -> None:
    base = {"executor": "slurm", "time": "60", "runtime": {"data_dir": f"{tmp_path}/data"}}
    profile = SlurmProfile.model_validate(base)
    assert order_sizes(tmp_path, profile, 4) == [4, 4]
    assert order_sizes(tmp_path, profile.model_copy(update={"gpus_per_node": 0}), 2) == [1, 1, 1, 1]
    assert order_sizes(tmp_path, profile.model_copy(update={"gpus_per_node": 2}), 2) == [1, 1, 1, 1]
    assert order_sizes(tmp_path, profile.model_copy(update={"gpu_memory_gib": 0.5}), 2) == [1, 1, 1, 1]
    limited = profile.model_copy(update={"replicas": 2})
    states = [RunState(run, "missing") for run in make_sweep(tmp_path, seeds=8).runs]
    plan = prepare(states, limited, tmp_path, [], Cluster())  # 8 groups of 2 in arrays of at most 3
    assert [batch.tasks for batch in plan.batches] == [[[0, 1], [2, 3], [4, 5]]] * 2 + [[[0, 1], [2, 3]]]
    assert [state.run.seed for state in plan.batches[0].chosen] == [0, 1, 0, 1, 2, 3]
    assert plan.jobs == " in 8 jobs"


def test_the_gpu_s_memory_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_memory_gib() == 40
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert gpu_memory_gib() is None


# --- the life of a group on this machine, with the stand-in


class Group:
    """The runs of one cell of a sweep, to be trained together by one worker."""

    def __init__(self, root: Path, *, seeds: int = 3, steps: int = 4) -> None:
        self.root, self.sweep = root, make_sweep(root, seeds=seeds, steps=steps)
        self.runs = [run for run in self.sweep.runs if run.attention == "content"]
        self.profile = root / "together.yaml"
        runtime = {"device": "cpu", "data_dir": f"{root}/data"}
        self.profile.write_text(yaml.safe_dump({"slots": 1, "replicas": seeds, "runtime": runtime}))

    def directory(self, seed: int) -> RunDir:
        return self.runs[seed].directory(self.root)

    def vitpa(self, verb: str, *terms: str) -> str:
        done = launch(self.root, self.profile, verb, "attention=content", *terms)
        return done.stdout + done.stderr

    def states(self) -> list[str]:
        return [state.state for state in StateReader(self.root).states(self.runs)]

    def settle(self) -> list[RunState]:
        settle(self.root, Sweep(self.sweep.config, self.runs))
        return StateReader(self.root).states(self.runs)

    def ends(self) -> list[list[str]]:
        return exits(self.root, Sweep(self.sweep.config, self.runs))

    def wait_until_it_trains(self) -> None:
        wait_for(lambda: all(self.directory(seed).metrics_jsonl.is_file() for seed in range(len(self.runs))))

    def trainers(self) -> int:
        return sum("stand_in" in line for line in processes_of(self.root))

    def mark(self, kind: str, seed: int) -> Path:
        path = self.root / kind / self.runs[seed].signature
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path


@pytest.fixture
def long(tmp_path: Path) -> Group:
    """Three seeds that train on until they are stopped."""
    group = Group(tmp_path, steps=100_000)
    assert "submitted 3 of 6 runs on this machine (profile " in group.vitpa("submit")
    group.wait_until_it_trains()
    assert group.trainers() == 1
    return group


def nearly_done(group: Group) -> None:
    """What is trained again has a step or two left."""
    for seed in range(len(group.runs)):
        (group.directory(seed).path / "stand-in-checkpoint.json").write_text('[99998, ""]')


@pytest.mark.slow
def test_every_seed_has_its_records_and_one_log(tmp_path: Path) -> None:
    group = Group(tmp_path)
    assert "submit would start 3 runs in 1 job, 1 at a time" in group.vitpa("plan")
    dry = group.vitpa("submit", "--dry-run")
    assert "would start 3 runs in 1 job" in dry
    assert "  digits-content-s0 (missing) + digits-content-s1 (missing) + digits-content-s2 (missing)" in dry
    group.vitpa("submit", "--wait")
    assert group.ends() == [["done"]] * 3
    assert [result.seed for result in results(tmp_path, Sweep(group.sweep.config, group.runs))] == [0, 1, 2]
    assert most_at_a_time(tmp_path) == 3
    first, *others = [group.directory(seed).attempts()[0].log for seed in range(3)]
    assert first.read_text() == "starts at 0 seed 0 seed 1 seed 2\n"
    assert [str(log.readlink()) for log in others] == [f"../../../{group.runs[0].signature}/attempts/0001/log.txt"] * 2
    logs = group.vitpa("logs")
    assert logs.count("starts at 0") == 1
    assert logs.count("== digits-content-s") == 3
    assert "starts at 0" in group.vitpa("logs", "seed=2")
    assert "nothing to submit" in group.vitpa("submit")
    assert_no_process_left(tmp_path)


@pytest.mark.slow
def test_workers_at_once_take_whole_groups(tmp_path: Path) -> None:
    group = Group(tmp_path, seeds=6, steps=2)
    document = yaml.safe_load(group.profile.read_text())
    group.profile.write_text(yaml.safe_dump({**document, "slots": 3, "replicas": 2}))
    assert "submit would start 6 runs in 3 jobs, 3 at a time" in group.vitpa("plan")
    group.vitpa("submit", "--wait")
    printed = {group.directory(seed).attempts()[0].log.read_text() for seed in range(6)}
    assert printed == {f"starts at 0 seed {seed} seed {seed + 1}\n" for seed in (0, 2, 4)}


@pytest.mark.slow
def test_one_fails_alone_and_is_retried_alone(long: Group) -> None:
    mark = long.mark("leave", 1)
    wait_for(lambda: long.states() == ["running", "failed", "running"])
    assert StateReader(long.root).state(long.runs[1]).reason.startswith("failed at step ")
    end = read_json(long.directory(1).attempts()[0].exit_json) or {}
    assert (end["state"], end["left"]) == ("failed", True)
    mark.unlink()
    (long.directory(1).path / "stand-in-checkpoint.json").write_text('[99998, ""]')
    assert "submitted 1 of 6 runs" in long.vitpa("retry")
    long.vitpa("cancel", "seed=0,2")
    wait_for(lambda: long.states() == ["cancelled", "done", "cancelled"])
    assert (long.directory(1).attempts()[1].log).read_text() == "resumes at 99998\n"
    assert_no_process_left(long.root)


@pytest.mark.slow
def test_one_is_cancelled_and_the_others_go_on(long: Group) -> None:
    assert "1 asked to stop at their next step, with a checkpoint" in long.vitpa("cancel", "seed=0", "--now")
    wait_for(lambda: long.states() == ["cancelled", "running", "running"])
    assert long.trainers() == 1
    assert not long.directory(0).stop.exists()
    step = json.loads((long.directory(0).path / "stand-in-checkpoint.json").read_text())[0]
    wait_for(lambda: json.loads((long.directory(1).path / "stand-in-checkpoint.json").read_text())[0] > step)
    long.directory(1).stop.touch()
    wait_for(lambda: long.states() == ["cancelled", "interrupted", "running"])
    assert "1 killed" in long.vitpa("cancel", "seed=2", "--now")
    assert [state.state for state in long.settle()] == ["cancelled", "interrupted", "cancelled"]
    assert_no_process_left(long.root)


@pytest.mark.slow
def test_all_are_cancelled_and_go_on_together(long: Group) -> None:
    assert "3 asked to stop" in long.vitpa("cancel")
    assert [state.state for state in long.settle()] == ["cancelled"] * 3
    nearly_done(long)
    long.vitpa("retry", "--wait")
    assert long.ends() == [["cancelled", "done"]] * 3
    assert long.directory(2).attempts()[1].log.read_text() == "resumes at 99998 seed 0 seed 1 seed 2\n"
    assert finished_trainings(long.root).count(long.runs[0].signature) == 2


@pytest.mark.slow
def test_a_killed_training_fails_all_and_a_killed_worker_loses_them(long: Group) -> None:
    start = read_json(long.directory(0).attempts()[0].start_json) or {}
    (trainer,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"stand_in" in path.read_bytes() and str(long.root).encode() in path.read_bytes()
    ]
    os.kill(trainer, signal.SIGKILL)
    states = long.settle()
    assert {(state.state, state.reason) for state in states} == {("failed", "killed by SIGKILL (out of memory?)")}
    assert "submitted 3 of 6 runs" in long.vitpa("retry")
    wait_for(lambda: long.states() == ["running"] * 3 and long.trainers() == 1)
    start = read_json(long.directory(0).attempts()[1].start_json) or {}
    os.kill(start["process"]["pid"], signal.SIGKILL)
    assert [state.state for state in long.settle()] == ["lost"] * 3
    nearly_done(long)
    long.vitpa("submit", "--wait")
    assert long.ends() == [["failed", "", "done"]] * 3
    assert_no_process_left(long.root)


@pytest.mark.slow
def test_a_worker_told_to_stop_stops_all(long: Group) -> None:
    start = read_json(long.directory(2).attempts()[0].start_json) or {}
    os.kill(start["process"]["pid"], signal.SIGTERM)
    assert {(state.state, state.reason) for state in long.settle()} == {("interrupted", "signal SIGTERM")}
    assert not any(long.directory(seed).stop.exists() for seed in range(3))


@pytest.mark.slow
def test_a_bad_configuration_and_a_withdrawn_claim_do_not_hurt_the_others(tmp_path: Path) -> None:
    group = Group(tmp_path, seeds=4)
    assert take_slot(tmp_path, [Slot(units=["cpu0"], gpus=[])], lambda: True)  # the only one
    group.vitpa("submit")
    assert group.states() == ["pending"] * 4
    assert "1 cancelled while they waited" in group.vitpa("cancel", "seed=1")
    group.directory(0).config_yaml.write_text("dataset: [")
    checkpoints(tmp_path, group.runs[3], 7)
    shutil.rmtree(tmp_path / "slots")
    states = group.settle()
    assert [state.state for state in states] == ["failed", "cancelled", "done", "interrupted"]
    assert "not valid YAML" in states[0].reason
    assert states[3].reason.startswith("no checkpoint of a step that the runs trained with it have, too: submit again")
    group.vitpa("submit", "--wait")
    assert group.states() == ["failed", "cancelled", "done", "done"]
