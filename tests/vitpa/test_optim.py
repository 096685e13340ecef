"""Parameter groups and the learning-rate schedule, the latter against values written out by hand."""

from __future__ import annotations

import pytest

from vitpa.arguments import ConfigError
from vitpa.config_file import parse_config
from vitpa.models import build_model
from vitpa.models.resnet import resnet18
from vitpa.optim import MAX_STEPS, adamw, learning_rate, learning_rates


def test_schedule_equals_values_written_by_hand() -> None:
    # 4 warm-up steps to 1.0, then cosine over 4 steps to 0.1: 0.1 + 0.9 (1 + cos(pi k / 4)) / 2 for k = 1, 2, 3, 4
    expected = [0.25, 0.5, 0.75, 1.0, 0.868198, 0.55, 0.231802, 0.1]
    got = [learning_rate(step, peak=1.0, minimum=0.1, warmup_steps=4, total_steps=8) for step in range(8)]
    assert got == pytest.approx(expected, abs=1e-6)


def test_schedule_without_warmup_and_with_warmup_alone() -> None:
    assert learning_rate(0, peak=1.0, minimum=0.0, warmup_steps=0, total_steps=1) == pytest.approx(0.0)
    assert learning_rate(1, peak=1.0, minimum=0.0, warmup_steps=2, total_steps=2) == 1.0


def test_more_steps_than_can_be_listed_are_one_line() -> None:
    config = parse_config({"dataset": "digits"}, "test", ["train.epochs=100000", "train.global_batch_size=2"])
    with pytest.raises(
        ConfigError, match=r"^train\.epochs=100000 are 71,900,000 steps at train\.global_batch_size=2; at most 20"
    ):
        learning_rates([config], 719)
    assert len(learning_rates([config], 1)) == 100_000 < MAX_STEPS


def test_only_weight_matrices_decay() -> None:
    model = build_model(
        attention="positional", num_classes=10, img_size=8, patch_size=2, embed_dim=24, depth=2, num_heads=4,
        mlp_ratio=2.0, drop_path_rate=0.0, pos_embed_std=0.02, seed=0,
    )  # fmt: skip
    optimizer = adamw(model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, fused=False)
    decay, no_decay = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert {"patch_embed.proj.weight", "head.weight", "blocks.0.attn.qk.weight"} <= decayed
    assert not any(name.endswith("bias") or "norm" in name or name in ("pos_embed", "cls_token") for name in decayed)


def test_of_a_resnet_convolutions_and_the_classifier_decay() -> None:
    model = resnet18(10)
    optimizer = adamw(model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, fused=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups)
    convolutions = {name for name in names.values() if "conv" in name or name.endswith("downsample.0.weight")}
    assert decayed == {*convolutions, "fc.weight"}
    assert len(others) == 2 * 20 + 1  # weights and biases of batch norms; the classifier's bias
