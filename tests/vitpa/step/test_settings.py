"""Runs with settings of their own in one step, on the digits: each as if it were alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.checkpoints import load_newest
from tests.support.trainings import arguments, config_of
from vitpa.config import RunConfig
from vitpa.distributed import Group
from vitpa.step.losses import smoothed_cross_entropy
from vitpa.train import set_up
from vitpa.train_command import main

STEPS = 50
CPU = torch.device("cpu")
RANDOM = ["augment.policy=randaugment"]
TIMM = ["augment.policy=randaugment_timm"]
PIXEL = ["augment.erase_mode=pixel"]
# name: what the runs have in common, and each run's own
CASES: dict[str, tuple[list[str], list[list[str]]]] = {
    "lr": ([], [["optim.lr=2e-3"], ["optim.lr=5e-4"], ["optim.lr=2e-3", "seed=1"]]),
    "min_lr": ([], [["optim.min_lr=0"], ["optim.min_lr=1e-3"]]),
    "warmup_epochs": ([], [["optim.warmup_epochs=0"], ["optim.warmup_epochs=0.5"], ["optim.warmup_epochs=3"]]),
    "weight_decay": ([], [["optim.weight_decay=0"], ["optim.weight_decay=0.5"]]),
    "betas": ([], [["optim.betas=[0.9,0.999]"], ["optim.betas=[0.8,0.95]"], ["optim.betas=[0.9,0.95]"]]),
    "eps": ([], [["optim.eps=1e-8"], ["optim.eps=1e-4"]]),
    "label_smoothing": ([], [["optim.label_smoothing=0"], ["optim.label_smoothing=0.3"]]),
    "grad_clip_norm": (
        [],
        [["optim.grad_clip_norm=null"], ["optim.grad_clip_norm=0.02"], ["optim.grad_clip_norm=0.1"]],
    ),
    "drop_path_rate": ([], [["model.drop_path_rate=0"], ["model.drop_path_rate=0.2"], ["model.drop_path_rate=0.4"]]),
    "pos_embed_std": ([], [["model.pos_embed_std=0.02"], ["model.pos_embed_std=0.5"]]),
    "mixup": ([], [["augment.mixup_alpha=0"], ["augment.mixup_alpha=0.8"], ["augment.mixup_alpha=0.1"]]),
    "mixing": (
        [],
        [
            [],
            ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1"],
            ["augment.mixup_alpha=0.8", "augment.cutmix_alpha=1", "augment.mixup_switch_prob=0.1"],
            ["augment.cutmix_alpha=0.5"],
        ],
    ),
    "erasing": (
        [],
        [
            ["augment.erase_prob=0"],
            ["augment.erase_prob=0.25"],
            ["augment.erase_prob=0.9", "augment.erase_scale=[0.1,0.5]", "augment.erase_ratio=[0.5,2]"],
        ],
    ),
    "noise": (PIXEL, [["augment.erase_prob=0"], ["augment.erase_prob=0.5"], ["augment.erase_prob=0.1"]]),
    "cutout": ([], [["augment.cutout_px=0"], ["augment.cutout_px=3"], ["augment.cutout_px=8"]]),
    "randaugment": (RANDOM, [[f"augment.randaugment_magnitude={value}"] for value in (3, 30, 9)]),
    "randaugment_timm": (
        TIMM,
        [
            ["augment.randaugment_magnitude=9"],
            ["augment.randaugment_magnitude=2", "augment.randaugment_magnitude_std=3"],
            ["augment.randaugment_magnitude=2", "augment.randaugment_magnitude_std=0"],
        ],
    ),
}
MIXTURE = (
    [*RANDOM, *PIXEL],
    [
        ["seed=0", "optim.grad_clip_norm=null", "optim.label_smoothing=0"],
        ["seed=1", "optim.lr=2e-3", "augment.mixup_alpha=0.8", "augment.erase_prob=0.25", "optim.weight_decay=0.3"],
        ["seed=0", "optim.betas=[0.9,0.95]", "model.drop_path_rate=0.3", "augment.cutmix_alpha=1", "model.pos_embed_std=0.3"],
        ["seed=2", "augment.randaugment_magnitude=3", "augment.cutout_px=2", "optim.warmup_epochs=0", "optim.eps=1e-6"],
    ],
)


def configs_of(data: Path, root: Path, case: tuple[list[str], list[list[str]]], *options: str) -> list[RunConfig]:
    common, own = case
    words = [
        "runtime.cpu_threads=1",
        "train.epochs=3",
        "augment.crop=padded",
        "augment.crop_padding_px=1",
        "runtime.step=eager",
    ]
    return [config_of(arguments(data, root, *words, *common, *options, *each)) for each in own]


def trained(configs: Sequence[RunConfig], steps: int = STEPS) -> list[dict[str, Tensor]]:
    """The weights of runs after so many steps in one stack."""
    t = set_up(configs, Group(0, 1, 0, 1, torch.device(configs[0].runtime.device)))
    assert not [note for note in t.steps.prepare(0) if "could be" in note or "could not be" in note]  # compiled, captured
    for step in range(steps):
        if step % t.epoch_steps == 0:
            t.steps.begin_epoch(step // t.epoch_steps, 0)
        t.steps.load()
        t.steps.step()
    t.steps.close()
    assert t.steps.adamw.frozen.sum() == 0
    return [{name: value.detach().clone() for name, value in each.model.state_dict().items()} for each in t.replicas]


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def check_as_alone(configs: Sequence[RunConfig], atol: float = 1e-6) -> None:
    together = trained(configs)
    for config, ours in zip(configs, together, strict=True):
        (alone,) = trained([config])
        assert distance(ours, alone) <= atol
    for first, second in itertools.combinations(together, 2):
        assert distance(first, second) > 1e-4  # the setting makes a difference


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_replica_with_settings_of_its_own_is_the_run_with_these_settings_alone(
    digits: Path, tmp_path: Path, name: str
) -> None:
    check_as_alone(configs_of(digits, tmp_path, CASES[name]))


@pytest.mark.parametrize(
    "options",
    [[], ["model.attention=positional", "runtime.accum_steps=2"], ["train.precision=bfloat16"]],
    ids=["content", "positional, two micro-batches", "bfloat16"],
)
def test_a_mixture_of_settings(digits: Path, tmp_path: Path, options: list[str]) -> None:
    # roundings of bfloat16 grow: a branch of scale 1 is added otherwise than one without a scale
    check_as_alone(
        configs_of(digits, tmp_path, MIXTURE, *options), atol=1e-2 if "train.precision=bfloat16" in options else 1e-6
    )


@pytest.mark.slow
def test_a_mixture_that_is_traced(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the compiler, in one graph; to compile it for a CPU takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager, compiled = (
        trained(configs_of(digits, tmp_path, MIXTURE, f"runtime.step={step}"), 10) for step in ("eager", "compile")
    )
    for first, second in zip(eager, compiled, strict=True):
        assert distance(first, second) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("attention", ["content", "positional"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_mixture_in_a_graph_on_a_gpu(digits: Path, tmp_path: Path, attention: str, precision: str) -> None:
    options = [f"model.attention={attention}", f"train.precision={precision}", "runtime.device=cuda", "runtime.step=graph"]
    check_as_alone(configs_of(digits, tmp_path, MIXTURE, *options), atol=1e-4 if precision == "float32" else 1e-2)


def test_the_smoothed_loss_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator).requires_grad_()
    labels = torch.randint(7, (3, 5), generator=generator)
    smoothing = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    got = smoothed_cross_entropy(logits, labels, smoothing)
    each = zip(logits, labels, smoothing.tolist(), strict=True)
    expected = torch.stack([F.cross_entropy(x, y, label_smoothing=share, reduction="none") for x, y, share in each])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(losses.sum(), logits)[0] for losses in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_replica_that_diverges_leaves_and_the_others_resume_alone(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["train.epochs=2", "optim.warmup_epochs=0", "runtime.cpu_threads=1", "runtime.poll_every_steps=1"]
    words = arguments(digits, tmp_path, *options, "optim.grad_clip_norm=null")
    assert main([*words, "optim.lr=1e-3,1e37", "model.drop_path_rate=0,0.2", "runtime.checkpoint_every_steps=10"]) == 1
    told = capfd.readouterr().err
    assert "vitpa train: 2 of 4 runs have failed: " in told
    assert "model.drop_path_rate 0.2, optim.lr 1e+37 is not trained any more, the others go on: " in told
    for rate in ("0", "0.2"):
        good, bad = ([*words, f"optim.lr={lr}", f"model.drop_path_rate={rate}"] for lr in ("1e-3", "1e37"))
        assert "lower optim.lr=1e+37" in json.loads(config_of(bad).run_dir.attempts()[-1].left_json.read_text())["reason"]
        assert not config_of(bad).run_dir.result_json.exists()
        ours = load_newest(config_of(good).run_dir)
        assert ours is not None
        alone = arguments(digits, tmp_path / "alone", *good[1:])
        assert main(alone) == 0
        theirs = load_newest(config_of(alone).run_dir)
        assert theirs is not None
        assert distance(ours[1].model, theirs[1].model) < 1e-6
        assert ours[1].optimizer["param_groups"] == theirs[1].optimizer["param_groups"]
        (config_of(good).run_dir.checkpoints / "step_000000044.pt").unlink()
        config_of(good).run_dir.result_json.unlink()
        assert main(good) == 0
        assert "resumed at step 40 of 44" in capfd.readouterr().err
        resumed = load_newest(config_of(good).run_dir)
        assert resumed is not None
        assert distance(resumed[1].model, theirs[1].model) < 1e-6
