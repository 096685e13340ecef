"""Sweep files and profiles: what ships resolves, order, names, and errors that say how to fix."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import yaml

from jobs.drift import Drift
from jobs.errors import SweepError
from jobs.execute.slots import slots_of, threads_per_process, visible_gpus
from jobs.grid import axes_of
from jobs.profile import LocalProfile
from jobs.sweep import SweepDir, load_sweep, shipped_sweeps, value_text
from tests.support.jobs_sweeps import make_sweep
from vitpa.arguments import ConfigError
from vitpa.config_file import parse_config

RUNS = {"demo": 6, "paper_small": 30, "paper_imagenet": 10, "permuted": 72, "permuted_resnet": 18}


@pytest.mark.parametrize("name", list(shipped_sweeps()))
def test_shipped_sweeps_resolve(name: str, tmp_path: Path) -> None:
    sweep = load_sweep(name, tmp_path)
    assert sweep.name == name
    points = math.prod(len(axis.choices) for axis in axes_of(sweep.config.axes, {}, name))
    points = len(sweep.ledger.trials) if sweep.ledger is not None else points
    cells = len(sweep.config.recipes) * len(sweep.config.attentions) * points
    assert len({run.signature for run in sweep.runs}) == len(sweep.runs) == cells * len(sweep.config.seeds)
    assert len(sweep.runs) == RUNS.get(name, len(sweep.runs))
    assert {run.seed for run in sweep.runs[:cells]} == {0}, "a whole comparison comes first"
    for dataset in sweep.config.reference:
        assert dataset in {run.dataset for run in sweep.runs}


def test_order_and_labels(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    labels = ["digits-content-s0", "digits-positional-s0", "digits-content-s1", "digits-positional-s1"]
    assert [run.label for run in sweep.runs] == labels


AXES = {"augment.permute_block_px": [0, 4], "optim.lr": [1e-3, 1e-2]}


def test_the_grid_has_every_combination_of_the_axes_and_names_it(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, axes=AXES, seeds=[0, 1]), tmp_path)
    assert [run.label for run in sweep.runs[:8]] == [
        f"digits-{attention}-permute_block_px{block_px}-lr{rate}-s0"
        for block_px in (0, 4)
        for rate in ("0.001", "0.01")
        for attention in ("content", "positional")
    ]
    assert [(run.seed, run.settings) for run in sweep.runs[8:]] == [(1, run.settings) for run in sweep.runs[:8]]
    assert sweep.runs[2].settings == {"augment.permute_block_px": "0", "optim.lr": "0.01"}
    for run in sweep.runs:
        assert run.settings["augment.permute_block_px"] == str(run.config.augment.permute_block_px)
        assert run.settings["optim.lr"] == str(run.config.optim.lr)
    assert len({run.signature for run in sweep.runs}) == 16
    one = {run.signature for run in make_sweep(tmp_path, seeds=2).runs}  # its values are the first ones
    assert len(one & {run.signature for run in sweep.runs}) == 4


def test_a_recorded_sweep_has_its_axes(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, axes=AXES), tmp_path)
    directory = SweepDir(tmp_path, "small")
    directory.record(sweep)
    assert directory.recorded() == sweep.runs
    assert {path.name for path in directory.by_name.iterdir()} == {run.label for run in sweep.runs}
    text = directory.runs_json.read_text()
    directory.runs_json.write_text(text.replace("optim.lr", "optim.lrr"))
    with pytest.raises(SweepError, match=r"runs\.json.*axes: unknown key optim\.lrr; delete it and submit again$"):
        directory.recorded()


def test_a_value_on_an_axis_is_a_part_of_a_files_name(tmp_path: Path) -> None:
    axes = {"optim.grad_clip_norm": [None], "optim.betas": [[0.9, 0.95]], "augment.hflip": [False], "augment.policy": ["none"]}
    (run, *_) = load_sweep(write(tmp_path, axes=axes), tmp_path).runs
    assert run.label == "digits-content-hflipfalse-policynone-betas0.9_0.95-grad_clip_normnull-s0"
    assert value_text(((0, 96), (150, 224))) == "0-96_150-224"  # train.image_sizes


def test_seeds_are_all_that_differs_in_a_cell(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path, seeds=3).runs
    for run in runs:
        alone = parse_config(run.config.model_dump(mode="json"), run.label)
        assert (run.config, run.signature) == (alone, alone.signature)
    assert len({run.signature for run in runs}) == 6
    for seed, message in ((-1, "greater than or equal to 0"), (2**31, "less than or equal to 2147483647")):
        with pytest.raises(ConfigError, match=rf"small\.yaml: seeds: seed={seed}: Input should be {message}"):
            load_sweep(write(tmp_path, seeds=[1, seed, 2]), tmp_path)


def test_recorded_runs_are_not_read_again_if_they_are_known(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    directory = SweepDir(tmp_path, "small")
    directory.record(sweep)
    recorded = directory.recorded(sweep.runs)
    assert recorded is not None
    assert all(one is other for one, other in zip(recorded, sweep.runs, strict=True))
    document = json.loads(directory.runs_json.read_text())
    document["runs"][0]["config"]["train"]["epochs"] = 9  # under the signature of before
    directory.runs_json.write_text(json.dumps(document))
    first, *others = directory.recorded(sweep.runs) or []
    assert (first.config.train.epochs, first.signature != sweep.runs[0].signature) == (9, True)
    assert others == sweep.runs[1:]


def test_recorded_runs_are_the_resolved_ones(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    directory = SweepDir(tmp_path, "small")
    assert directory.recorded() is None
    directory.record(sweep)
    assert directory.recorded() == sweep.runs
    assert load_sweep("small", tmp_path).runs == sweep.runs, "a submitted sweep is found by its name"
    assert (directory.by_name / "digits-content-s1").readlink() == Path("../../../runs") / sweep.runs[2].signature


@pytest.mark.parametrize(
    "text", ["{}", '{"runs": [{}]}', '{"runs": [', '{"runs": [{"label": "a", "recipe": "b", "config": {}}]}']
)
def test_a_damaged_record_says_its_hint(tmp_path: Path, text: str) -> None:
    sweep = make_sweep(tmp_path, seeds=1)
    directory = SweepDir(tmp_path, "small")
    directory.record(sweep)
    directory.runs_json.write_text(text)
    with pytest.raises(SweepError, match=r"runs\.json.*; delete it and submit again$"):
        directory.recorded()


def test_drift(tmp_path: Path) -> None:
    before = make_sweep(tmp_path, seeds=1)
    assert Drift.between(before, before.runs).describe() == ""
    more = make_sweep(tmp_path, seeds=2)
    assert Drift.between(more, before.runs) == Drift(["digits-content-s1", "digits-positional-s1"], [])
    longer = make_sweep(tmp_path, seeds=1, steps=5)
    drift = Drift.between(longer, before.runs)
    assert drift.gone == ["digits-content-s0", "digits-positional-s0"]
    assert "2 no longer in it as configured before" in drift.describe()


def test_labels_that_swap_their_settings_are_a_change(tmp_path: Path) -> None:
    none: dict[str, float] = {}
    both = {"augment.mixup_alpha": 0.8}
    before = make_sweep(tmp_path, seeds=1, axes={"mixing": {"none": none, "both": both}})
    drift = Drift.between(make_sweep(tmp_path, seeds=1, axes={"mixing": {"none": both, "both": none}}), before.runs)
    assert not drift.added + drift.gone
    assert "changed: 4 called otherwise (digits-content-both-s0 -> digits-content-none-s0, digits-pos" in drift.describe()


def write(tmp_path: Path, **changes: object) -> str:
    make_sweep(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": ["cifr10"]}, "recipe 'cifr10': neither a shipped one (.*cifar10"),
        ({"recipes": ["digits", "recipe.yaml"]}, "digits-content-s0 comes up 2 times"),
        ({"seeds": [0, 1, 1]}, "seeds: 1 is given 2 times; once is enough"),
        ({"reference": {"cifar10": {}}}, "reference.cifar10: no data set of the sweep; there is digits"),
        (
            {"attentions": ["content"], "reference": {"digits": {"positional": {"val_top1": 0.5, "source": "us"}}}},
            "reference.digits.positional: no attention of the sweep; there is content",
        ),
        ({"overrides": {"seed": 3}}, "overrides.seed is not for the overrides"),
        ({"axes": {"seed": [3]}}, "axes.seed: say it by seeds, which is an axis of every sweep"),
        ({"axes": {"model.attention": ["content"]}}, "axes.model.attention: say it by attentions"),
        ({"axes": {"runtime.workers": [3]}}, "axes.runtime.workers: it does not change the numbers"),
        ({"axes": {"optim.lr": [1e-3]}, "overrides": {"optim.lr": 1e-2}}, "axes.optim.lr is in the overrides, too"),
        ({"axes": {"optim.lr": []}}, "axes.optim.lr has no value; name some, or leave it out"),
        ({"axes": {"train.epochs": [3, 3]}}, "axes.train.epochs: 3 is given 2 times; once is enough"),
        ({"axes": {"optim.lr": [1e-3]}, "reference": {"digits": {}}}, "reference: .* this sweep has axes; leave it out"),
        (
            {"attentions": ["content"], "overrides": {"model.kind": "resnet18"}, "axes": {"model.depth": [1, 2]}},
            "digits-resnet18-depth1-s0 and digits-resnet18-depth2-s0 are the same run",
        ),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SweepError, match=message.replace("(.", r"\(.")):
        load_sweep(write(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atentions": ["content"]}, "unknown key atentions; did you mean attentions?"),
        ({"axis": {"optim.lr": [1e-3, 2e-3]}}, "unknown key axis; did you mean axes?"),
        ({"axes": ["optim.lr"]}, "Input should be an object; write it as `axes: {optim.lr: [5e-4, 1e-3]}`"),
        ({"name": "a b"}, "name=a b: take letters, digits, _ and -, and begin with a letter or digit"),
        ({"attentions": ["vanilla"]}, "attentions.0=vanilla"),
        ({"seeds": ["a"]}, "seeds.0=a"),
        ({"overrides": {"optim.lrr": 1}}, "unknown key optim.lrr; did you mean optim.lr?"),
        ({"axes": {"optim.lrr": [1]}}, "small.yaml: axes: unknown key optim.lrr; did you mean optim.lr?"),
        ({"axes": {"augment.permute_block_px": [2, 3]}}, "small.yaml: axes: augment.permute_block_px=3 does not divide"),
        ({"axes": {"optim": [{"lr": 1}]}}, "small.yaml: axes: optim: optim is a section; give its keys one by one"),
    ],
)
def test_invalid_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_sweep(write(tmp_path, **changes), tmp_path)


def test_overrides_reach_every_run(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, overrides={"optim.lr": 1e-4, "train.epochs": 7}), tmp_path)
    assert {(run.config.optim.lr, run.config.train.epochs) for run in sweep.runs} == {(1e-4, 7)}


def test_unknown_sweep_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"'demmo': no such file, none of the shipped sweeps.*demo.* and recipes \(cifar10"):
        load_sweep("demmo", tmp_path)


def test_gpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert [slot.gpus for slot in slots_of(LocalProfile(), "auto")] == [["2"], ["5"], ["7"]]
    assert [slot.gpus for slot in slots_of(LocalProfile(gpus_per_run=2), "auto")] == [["2", "5"]]
    shared = slots_of(LocalProfile(runs_per_gpu=2), "cuda")
    assert [slot.gpus[0] for slot in shared] == ["2", "5", "7", "2", "5", "7"]
    assert len({unit for slot in shared for unit in slot.units}) == 6
    with pytest.raises(SweepError, match="asks for 4 slots, but 3 GPUs give 3"):
        slots_of(LocalProfile(slots=4), "auto")
    with pytest.raises(SweepError, match="gpus_per_run=4, but 3 GPUs are visible"):
        slots_of(LocalProfile(gpus_per_run=4), "auto")


def test_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert visible_gpus() == []
    assert len(slots_of(LocalProfile(), "auto")) == 6
    assert len(slots_of(LocalProfile(cpus_per_slot=4), "auto")) == 1
    assert len(slots_of(LocalProfile(slots=8), "cpu")) == 8
    profile = LocalProfile(cpus_per_slot=3)
    assert threads_per_process(profile, slots_of(profile, "cpu")) == 3
    with pytest.raises(SweepError, match="no GPU is visible"):
        slots_of(LocalProfile(), "cuda")
