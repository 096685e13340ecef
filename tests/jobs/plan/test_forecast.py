"""The forecast against hand calculations: time, GPU-hours, attempts, and nothing where nothing was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.groups import num_images
from jobs.plan.forecast import (
    Group,
    Speed,
    attempts,
    benchmark_s,
    forecast,
    job_s,
    kind_of,
    makespan_s,
    mean_share,
    run_s,
    speeds_of,
)
from jobs.plan.speeds import Rate
from jobs.state import StateReader
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.config import RunConfig
from vitpa.flops import gflop_per_image
from vitpa.records import read_json, write_json

CONTENT, POSITIONAL = ("digits", "content"), ("digits", "positional")


@pytest.mark.parametrize(
    ("durations_s", "at_a_time", "expected"),
    [
        ([10, 10, 10, 10], 2, 20),
        ([10, 10, 10], 2, 20),
        ([30, 10, 10, 10], 2, 30),  # the three short ones follow one another beside the long one
        ([10, 10, 10, 30], 2, 40),
        ([10, 20], 100, 20),
        ([], 4, 0),
        ([10], None, None),
    ],
)
def test_makespan(durations_s: list[float], at_a_time: int | None, expected: float | None) -> None:
    assert makespan_s(durations_s, at_a_time) == expected


@pytest.mark.parametrize(
    ("run", "limit", "delay", "expected"),
    [(100, 3600, 120, 1), (3480, 3600, 120, 1), (3481, 3600, 120, 2), (36_000, 3600, 120, 11), (0, 60, 10, 1)],
)
def test_attempts(run: float, limit: float, delay: float, expected: int) -> None:
    assert attempts(run, limit, delay) == expected


def test_two_groups_run_side_by_side() -> None:
    small = Group((3600.0,) * 4, gpus=1, at_a_time=2)  # 2 h, 4 GPU-hours
    large = Group((1800.0,) * 3, gpus=8, at_a_time=1)  # 1.5 h, 12 GPU-hours
    found = forecast([small, large], {})
    assert (found.train_s, found.gpu_hours, found.wall_s) == (19_800, 16, 7200)


def test_nothing_is_added_up_while_a_kind_is_not_measured() -> None:
    found = forecast([Group((3600.0, None), gpus=1, at_a_time=2)], {}, [POSITIONAL, POSITIONAL])
    assert (found.train_s, found.gpu_hours, found.wall_s) == (None, None, None)
    (line,) = found.lines()
    assert line.startswith("GPU-hours and time: unknown until a run of each kind has finished (not yet: digits positional); ")
    assert line.endswith("; --speeds FILE takes a benchmark's figures instead")
    assert Group((3600.0, None), gpus=1).longest_s is None


def test_without_a_number_of_runs_at_a_time_there_is_no_wall_time() -> None:
    found = forecast([Group((7200.0, 3600.0), gpus=2)], {CONTENT: Speed(1234.5, 2, "NVIDIA H100", 2)})
    assert (found.gpu_hours, found.wall_s) == (6, None)
    assert found.lines() == [
        "about 6.00 GPU-hours, 3.0 h of training one after the other (the longest job: 2.0 h)",
        "measured: digits content 1,234 images/s on NVIDIA H100 (2 runs)",
    ]


def test_a_run_takes_images_times_epochs_over_speed(tmp_path: Path) -> None:
    run = make_sweep(tmp_path, seeds=1, steps=40).runs[0]
    speeds = {CONTENT: Speed(100, 1, "", 1)}
    assert run_s(run, speeds, 1437) == pytest.approx(1437 * 40 / 100)
    assert run_s(run, speeds, None) is None
    assert run_s(run, {}, 1437) is None


def test_smaller_images_count_by_their_arithmetic_when_measured_and_now(tmp_path: Path) -> None:
    short = make_sweep(tmp_path, seeds=1, name="short").runs
    sizes = {"augment.crop": "random_resized", "train.image_sizes": [[0, 4], [1, 8]]}
    progressive = make_sweep(tmp_path, seeds=1, name="progressive", overrides=sizes).runs
    share = mean_share(progressive[0].config)
    assert share == pytest.approx((gflop_per_image(progressive[0].config, 4) / gflop_per_image(short[0].config) + 3) / 4)
    rate = Rate(100.0, "training", "", "NVIDIA X", 1, 128, 1, "", "file")
    assert benchmark_s(progressive[0].config, rate, (1000, 300)) == pytest.approx((4000 * share + 4 * 300 / 3) / 100)
    measured = {CONTENT: Speed(100, 1, "", 1)}
    assert run_s(short[0], measured, 1000) == pytest.approx(40)
    assert run_s(progressive[0], measured, 1000) == pytest.approx(40 * share)
    write_result(tmp_path, progressive[0], images_per_s=100.0)
    (progressive[0].directory(tmp_path).path / "config.yaml").write_text(
        yaml.safe_dump(progressive[0].config.model_dump(mode="json"))
    )
    for states in (StateReader(tmp_path).states(progressive), []):  # of the sweep itself, or of another
        assert speeds_of(states, progressive, tmp_path)[CONTENT].images_per_s == pytest.approx(100 * share)


@pytest.mark.parametrize(
    ("measured_gpus", "gpus", "seeds", "expected"),
    [
        (1 / 5, 1, 5, 100),  # five together when measured, and now
        (1 / 5, 1, 3, 60),  # three instead have more of the GPU each
        (1, 1, 5, 500),  # alone when measured: as many GPU-hours, at most
        (1, 1, 1, 100),
        (4, 4, 1, 100),
        (0, 1, 3, 100),  # on the CPU: nobody knows
    ],
)
def test_replicas_cost_the_gpu_hours_of_the_measured_runs(
    measured_gpus: float, gpus: float, seeds: int, expected: float
) -> None:
    speed = Speed(1.0, 1, "", measured_gpus)
    assert job_s([100.0] * seeds, speed, gpus) == pytest.approx(expected)
    assert job_s([100.0, None], speed, gpus) is None


def test_speed_is_the_mean_of_the_sweeps_finished_runs(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    write_result(tmp_path, sweep.runs[0], images_per_s=100.0, train_time_s=9.0, gpu_hours=18 / 3600)
    write_result(tmp_path, sweep.runs[2], images_per_s=200.0, train_time_s=9.0, gpu_hours=18 / 3600)
    path = sweep.runs[2].directory(tmp_path).env_json
    write_json(path, {**(read_json(path) or {}), "device": "cuda", "gpu": "NVIDIA H100"})
    found = speeds_of(StateReader(tmp_path).states(sweep.runs), sweep.runs, tmp_path)
    assert found.keys() == {CONTENT}
    assert found[CONTENT] == Speed(150.0, 2, "NVIDIA H100", 2.0)


def test_of_the_axes_those_of_the_network_and_of_the_batches_make_kinds(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=1, axes={"augment.permute_block_px": [0, 4], "model.depth": [1, 2]})
    assert {kind_of(run) for run in sweep.runs} == {
        ("digits", f"{name}-depth{n}") for _, name in (CONTENT, POSITIONAL) for n in (1, 2)
    }
    run = sweep.runs[0]
    assert run.settings == {"augment.permute_block_px": "0", "model.depth": "1"}
    write_result(tmp_path, run, attention=run.attention, images_per_s=100.0)
    (run.directory(tmp_path).path / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    speeds = speeds_of(StateReader(tmp_path).states(sweep.runs), sweep.runs, tmp_path)
    assert speeds.keys() == {("digits", f"{run.attention}-depth1")}
    assert speeds_of([], sweep.runs, tmp_path) == speeds  # found by its configuration


def test_keys_that_move_together_make_kinds(tmp_path: Path) -> None:
    size = {"small": {"model.depth": 1, "optim.lr": 1e-3}, "large": {"model.depth": 2, "optim.lr": 5e-4}}
    sweep = make_sweep(tmp_path, seeds=1, axes={"size": size})
    assert {kind_of(run)[1] for run in sweep.runs} == {f"{name}-{each}" for _, name in (CONTENT, POSITIONAL) for each in size}


def test_other_sweeps_of_the_same_root_count_if_their_model_is_the_same(tmp_path: Path) -> None:
    finished = make_sweep(tmp_path, seeds=2, steps=2, name="short")
    for run, speed in zip(finished.runs[:2], (50.0, 70.0), strict=True):
        write_result(tmp_path, run, attention=run.attention, images_per_s=speed)
        document = run.config.model_dump(mode="json")
        del document["model"]["kind"]  # as earlier versions wrote it
        (run.directory(tmp_path).path / "config.yaml").write_text(yaml.safe_dump(document))
    edited = finished.runs[2]
    write_result(tmp_path, edited, images_per_s=9000.0)
    (edited.directory(tmp_path).path / "config.yaml").write_text(yaml.safe_dump(edited.config.model_dump(mode="json")))
    edited.directory(tmp_path).env_json.write_text("{}")  # it cannot be verified
    (tmp_path / "runs/0123456789abcdef").mkdir()
    (tmp_path / "runs/0123456789abcdef/result.json").write_text("{")  # somebody else's trouble
    wanted = make_sweep(tmp_path, seeds=1, steps=400)
    speeds = speeds_of(StateReader(tmp_path).states(wanted.runs), wanted.runs, tmp_path)
    assert {kind: speed.images_per_s for kind, speed in speeds.items()} == {CONTENT: 50.0, POSITIONAL: 70.0}
    deeper = wanted.runs[0].config.model.model_copy(update={"depth": 3})
    other = [replace(run, config=run.config.model_copy(update={"model": deeper})) for run in wanted.runs]
    assert speeds_of([], other, tmp_path) == {}


def test_images_of_a_users_own_data_set_are_those_of_the_manifest(tmp_path: Path) -> None:
    config = RunConfig(dataset="pets")
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"data_dir": str(tmp_path)})})
    assert num_images(config, "train") is None
    (tmp_path / "pets").mkdir()
    write_json(tmp_path / "pets/train.json", {"num_samples": 37})
    assert num_images(config, "train") == 37
    assert (num_images(RunConfig(dataset="imagenet"), "train"), num_images(RunConfig(dataset="imagenet"), "val")) == (
        1_281_167,
        50_000,
    )


def test_the_manifest_counts_more_than_the_table(tmp_path: Path) -> None:
    config = RunConfig(dataset="imagenet")
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"data_dir": str(tmp_path)})})
    (tmp_path / "imagenet").mkdir()
    write_json(tmp_path / "imagenet/val.json", {"num_samples": 5000})
    assert (num_images(config, "train"), num_images(config, "val")) == (1_281_167, 5000)
