"""The models against timm, against a slow reading of the formula, and against the paper's definition."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitpa.config_file import load_config, shipped_configs
from vitpa.models import build_model
from vitpa.models.positional import PositionalAttention, PositionalVisionTransformer

SMALL: dict[str, Any] = {
    "num_classes": 10,
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "pos_embed_std": 0.02,
}


def positional(seed: int = 0, **changes: Any) -> PositionalVisionTransformer:
    model = build_model(attention="positional", seed=seed, **{**SMALL, **changes})
    assert isinstance(model, PositionalVisionTransformer)
    return model


def test_content_is_timms_vit_tiny_with_interchangeable_weights() -> None:
    config = load_config(shipped_configs()["imagenet"])
    assert config.model.attention == "content"
    ours = build_model(**dict(config.model), num_classes=1000, seed=0).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_mean_pooling_is_timms_of_a_vit_without_class_token() -> None:
    sizes = {name: SMALL[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    theirs = VisionTransformer(**sizes, num_classes=10, global_pool="avg", class_token=False).eval()
    ours = build_model(attention="content", seed=0, global_pool="avg", **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        tokens = ours.forward_features(images)  # before the last norm
        torch.testing.assert_close(ours(images), ours.head(ours.fc_norm(tokens.mean(1))))
    assert ours.cls_token is None
    assert ours.pos_embed.shape == (1, 16, 24)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_small_vit_of_the_paper_is_a_configuration(dataset: str) -> None:
    model = build_model(**dict(load_config(shipped_configs()[dataset]).model), num_classes=10, seed=0)
    assert len(model.blocks) == 7
    assert model.embed_dim == 384
    assert model.blocks[0].attn.num_heads == 12
    assert model.blocks[0].mlp.fc1.out_features == 384
    assert model.pos_embed.shape == (1, 65, 384)


def test_same_seed_same_weights_and_other_seed_other_weights() -> None:
    torch.manual_seed(5)
    one = positional(seed=1).state_dict()
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), positional(seed=1).state_dict().values(), strict=True))
    assert not torch.equal(one["pos_embed"], positional(seed=2).state_dict()["pos_embed"])


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    positional()
    assert torch.equal(torch.rand(3), expected)


def test_pos_embed_std_is_honoured() -> None:
    assert positional(embed_dim=240, pos_embed_std=0.5).pos_embed.std().item() == pytest.approx(0.44, abs=0.02)  # cut at 2 std


def reference_attention(layer: PositionalAttention, x: Tensor, pos_embed: Tensor) -> Tensor:
    """softmax(P Wq (P Wk)^T / sqrt(d)) X Wv, image by image and head by head."""
    D, d = x.shape[-1], x.shape[-1] // layer.num_heads
    wq, wk = layer.qk.weight[:D], layer.qk.weight[D:]
    bq, bk = layer.qk.bias[:D], layer.qk.bias[D:]
    outputs = []
    for image in x:
        heads = []
        for head in range(layer.num_heads):
            rows = slice(head * d, (head + 1) * d)
            q = pos_embed[0] @ wq[rows].T + bq[rows]
            k = pos_embed[0] @ wk[rows].T + bk[rows]
            v = image @ layer.v.weight[rows].T + layer.v.bias[rows]
            heads.append(torch.softmax(q @ k.T / d**0.5, dim=-1) @ v)
        outputs.append(torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(outputs)


def test_positional_attention_equals_the_formula() -> None:
    torch.manual_seed(0)
    layer = PositionalAttention(24, 4).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, pos_embed = torch.randn(3, 17, 24).double(), torch.randn(1, 17, 24).double()
    torch.testing.assert_close(layer(x, pos_embed), reference_attention(layer, x, pos_embed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_positional_network_mixes_tokens_by_position_only(global_pool: str) -> None:
    """Written out from the paper: no P in the tokens, one P for all layers."""
    model = positional(global_pool=global_pool).double().eval()
    torch.nn.init.normal_(model.pos_embed)
    images = torch.randn(2, 3, 8, 8).double()
    x = model.patch_embed(images)
    if global_pool == "token":
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1)
    for block in model.blocks:
        x = x + reference_attention(block.attn, block.norm1(x), model.pos_embed)
        x = x + block.mlp(block.norm2(x))
    features = model.norm(x)[:, 0] if global_pool == "token" else model.fc_norm(x.mean(1))
    torch.testing.assert_close(model(images), model.head(features), rtol=1e-10, atol=1e-10)


def test_positional_attention_does_not_change_with_the_image() -> None:
    torch.manual_seed(0)
    layer = PositionalAttention(24, 4).double()
    x, other = torch.randn(2, 17, 24).double(), torch.randn(2, 17, 24).double()
    pos_embed = 5 * torch.randn(1, 17, 24).double()

    def mix(tokens: Tensor) -> Tensor:
        mixed: Tensor = layer(tokens, pos_embed) - layer(torch.zeros_like(tokens), pos_embed)
        return mixed

    # with one attention matrix for every image the layer is linear in the image; content attention is not
    torch.testing.assert_close(mix(x + 3 * other), mix(x) + 3 * mix(other), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mix(x), mix(x.flip(1)).flip(1))  # and it does depend on the position


def test_attention_maps_are_row_stochastic() -> None:
    model = positional(pos_embed_std=1.0)
    torch.testing.assert_close(model.attention_maps().detach().sum(dim=-1), torch.ones(3, 4, 17))


def test_gradient_reaches_the_encoding_and_its_projections() -> None:
    model = positional(pos_embed_std=1.0)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    D = 24
    for block in model.blocks:
        gradient = block.attn.qk.weight.grad
        assert gradient[:D].abs().max() > 0  # Wq
        assert gradient[D:].abs().max() > 0  # Wk
    assert model.pos_embed.grad.abs().max() > 0


def test_no_weight_decay_names_the_encoding_and_the_class_token() -> None:
    assert {"pos_embed", "cls_token"} <= set(positional().no_weight_decay())
