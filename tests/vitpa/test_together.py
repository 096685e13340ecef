"""Which runs may share a step, what differs between them, and how a command line asks for several."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.trainings import arguments, config_of, metrics, result_of
from vitpa import train_command
from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.config_file import shipped_configs
from vitpa.records import write_json
from vitpa.step.fit import state_bytes
from vitpa.together import (
    check_together,
    differing,
    group_name,
    keys_that_may_differ,
    may_differ,
    replica_names,
    settings_apart,
    step_shape,
)
from vitpa.train_command import check_memory, configs_of, main

RECIPE = shipped_configs()["digits"]
SUBMIT = "to train several values: vitpa sweep submit RECIPE "


def runs(*overrides: str, seeds: list[int] | None = None) -> list[RunConfig]:
    return configs_of([RECIPE], overrides, seeds)


def test_every_key_that_may_differ_is_one_and_all_others_shape_the_step() -> None:
    keys = keys_that_may_differ()
    assert len(keys) == 20
    assert {"seed", "optim.lr", "optim.grad_clip_norm", "augment.erase_scale", "model.pos_embed_std"} <= set(keys)
    assert not any(
        map(
            may_differ,
            ("lr", "train.epochs", "train.image_sizes", "augment.policy", "augment.erase_mode", "runtime.workers", "dataset"),
        )
    )
    (first,) = runs()
    (same,) = runs("optim.lr=2e-3", "augment.cutmix_alpha=1", "model.drop_path_rate=0.1", "seed=4")
    (other,) = runs("model.depth=3")
    assert step_shape(first) == step_shape(same) != step_shape(other)


def test_runs_are_named_by_what_differs() -> None:
    assert replica_names(runs()) == ["seed 0"]
    assert replica_names(runs(seeds=[0, 3])) == ["seed 0", "seed 3"]
    assert group_name(runs(seeds=[0, 3])) == "digits-content-s0,3"
    several = runs("optim.lr=1e-3,5e-4", "optim.grad_clip_norm=null,0.5", seeds=[0, 1])
    assert len(several) == 8
    assert differing(several) == ["optim.lr", "optim.grad_clip_norm", "seed"]
    assert replica_names(several)[:3] == [
        "optim.lr 0.001, optim.grad_clip_norm null, seed 0",
        "optim.lr 0.001, optim.grad_clip_norm null, seed 1",
        "optim.lr 0.001, optim.grad_clip_norm 0.5, seed 0",
    ]
    assert group_name(several) == "digits-content (8 runs by optim.lr, optim.grad_clip_norm, seed)"
    assert settings_apart(several)[-1] == {"optim.lr": 5e-4, "optim.grad_clip_norm": 0.5}


def test_what_shapes_the_step_is_refused_in_one_line() -> None:
    first, other = runs()[0], runs("train.global_batch_size=32", "optim.lr=1e-4")[0]
    with pytest.raises(
        ConfigError,
        match=r"^train\.global_batch_size=64 and train\.global_batch_size=32 cannot be trained together: it shapes the step, "
        r"which all replicas share; train them apart \(a sweep does that by itself\)$",
    ):
        check_together([first, other])
    slower = runs("runtime.cpu_threads=3")[0]
    with pytest.raises(
        ConfigError, match=r"they share a process; say runtime.cpu_threads=VALUE on the command line, for all$"
    ):
        check_together([first, slower])
    with pytest.raises(
        ConfigError, match=r"^the run with seed 0 is to be trained twice; name each run, and each value of a setting, once$"
    ):
        check_together([first, first])


def test_lists_are_values_of_keys_that_take_them() -> None:
    (one,) = runs("optim.betas=[0.9,0.95]")
    assert one.optim.betas == (0.9, 0.95)
    two = runs("optim.betas=[0.9,0.95],[0.8,0.9]")
    assert [run.optim.betas for run in two] == [(0.9, 0.95), (0.8, 0.9)]
    assert [run.seed for run in runs("seed=2,5")] == [2, 5]
    with pytest.raises(ConfigError, match=r"optim\.lr=high"):
        runs("optim.lr=1e-3,high")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.depth=2,3", SUBMIT + "model.depth=2,3"),
        ("augment.erase_mode=const,pixel", SUBMIT + "augment.erase_mode=const,pixel"),
        ("augment.crop_scale=[0.1,1],[0.2,1]", SUBMIT + "augment.crop_scale=[0.1,1],["),
        ("model.attention=content,positional", SUBMIT + "attention=content,positional"),
        ("train.holdout=0.1,0.2", "name one of them"),
        ("runtime.stop_after_epoch=1,null", "name one of them"),
    ],
)
def test_several_values_of_what_shapes_the_step_are_refused(override: str, hint: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        runs("optim.lr=5e-4,1e-3", override)
    assert str(error.value).startswith(f"{override}: {key} must be the same for all runs of one step; {hint}")


def test_a_text_may_have_commas() -> None:
    assert runs("runtime.data_dir=a,b")[0].runtime.data_dir == "a,b"


@pytest.mark.parametrize("values", ["1e-3,,2e-3", "1e-3,2e-3,", "5e-4,", ",5e-4", ","])
def test_an_empty_value_is_refused(values: str) -> None:
    expected = rf"^override 'optim\.lr={values}': an empty value; write optim\.lr=A,B, or leave the comma out$"
    with pytest.raises(ConfigError, match=expected):
        runs(f"optim.lr={values}")


def test_more_runs_than_a_step_takes_are_refused_before_any_is_resolved() -> None:
    expected = (
        r"^8,002 runs in one step: at most 1,024; name fewer seeds, values or files \(a sweep takes several steps by itself\)$"
    )
    with pytest.raises(ConfigError, match=expected):
        runs("optim.lr=1e-3,2e-3", seeds=list(range(4001)))


def test_runs_that_cannot_fit_the_memory_are_refused_before_any_is_claimed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path)
    monkeypatch.setattr(train_command, "memory_limit", lambda: 3 * state_bytes(config_of(words)) + 1)
    assert main([*words, "--seeds", "0,1,2,3"]) == 1
    assert re.search(
        r"4 runs in one step: their weights, gradients and optimiser states alone take \d+\.\d GiB of the \d+\.\d GiB of "
        r"memory; at most 3 fit: name fewer seeds, values or files\n$",
        capfd.readouterr().err,
    )
    assert not (tmp_path / "runs").exists()
    check_memory([config_of(words)] * 3, torch.device("cpu"))


def test_runs_of_several_files_and_values_train_in_one_step(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, "train.epochs=2", "runtime.cpu_threads=1", "runtime.log_every_steps=11")
    other = tmp_path / "other.yaml"
    write_json(other, config_of([*words, "augment.erase_prob=0.5", "optim.lr=3e-4"]).model_dump(mode="json"))
    words = [word for word in words if not word.startswith("optim.lr=")]
    assert main([*words, "optim.label_smoothing=0,0.2", "--with", str(other)]) == 0
    told = capfd.readouterr().err
    assert "digits-content (4 runs by augment.erase_prob, optim.lr, optim.label_smoothing): starts at step 0 of 44" in told
    assert " (augment.erase_prob 0.5, optim.lr 0.0003, optim.label_smoothing 0.2)" in told
    assert "augment.erase_prob 0.5, optim.lr 0.0003, optim.label_smoothing 0.0 finished: val top-1" in told
    erased = [*words, "augment.erase_prob=0.5", "optim.lr=3e-4", "optim.label_smoothing=0.2"]
    run = config_of(erased).run_dir
    env = json.loads(run.env_json.read_text())
    assert env["trained_with_seeds"] == [0] * 4
    assert env["trained_with_settings"][3] == {
        "augment.erase_prob": 0.5, "optim.lr": 3e-4, "optim.label_smoothing": 0.2
    }  # fmt: skip
    rates = [row["train/lr"] for row in metrics(run) if "train/lr" in row]
    alone = arguments(digits, tmp_path / "alone", *erased[1:])
    assert main(alone) == 0
    theirs = config_of(alone).run_dir
    assert rates == [row["train/lr"] for row in metrics(theirs) if "train/lr" in row]
    for row, their_row in zip(metrics(run), metrics(theirs), strict=True):
        assert row == pytest.approx(their_row, rel=1e-4)
    assert result_of(erased).signature == result_of(alone).signature
