"""Images smaller than the model's: the stacked network against timm's own way to take them, with gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.support.networks import SMALL, B, R, gradients_of, key_bias, networks, stacked
from vitpa.models import build_model
from vitpa.models.resampling import resampling_matrix

PATCH = SMALL["patch_size"]
SIDE = SMALL["img_size"] // PATCH


def small_images(side: int) -> Tensor:
    """Images (R, B, 3, H, W) of `side` patches in a row."""
    return torch.randn(R, B, 3, side * PATCH, side * PATCH, generator=torch.Generator().manual_seed(1))


def taking_any_size(model: VisionTransformer, global_pool: str) -> VisionTransformer:
    """timm's module that resamples its positional encodings by itself, with these weights."""
    options = {key: SMALL[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    dynamic = VisionTransformer(
        **options, num_classes=10, global_pool=global_pool, class_token=global_pool == "token", dynamic_img_size=True
    )
    dynamic.load_state_dict(model.state_dict())
    return dynamic


def of_small_images(model: VisionTransformer, side: int, global_pool: str) -> tuple[nn.Module, Tensor]:
    """A module for small images with the other weights of `model`, to call with encodings resampled from the tensor."""
    pos_embed = model.pos_embed.detach().clone().requires_grad_()
    options = {**SMALL, "img_size": side * PATCH, "global_pool": global_pool}
    small = build_model(attention="positional", seed=0, **options)
    small.load_state_dict({name: value for name, value in model.state_dict().items() if name != "pos_embed"}, strict=False)
    return small, pos_embed


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_matrix_does_what_timm_does_and_leaves_out_no_patch(side: int) -> None:
    pos_embed = torch.randn(1, 1 + SIDE**2, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = resample_abs_pos_embed(pos_embed, [side, side])
    factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((expected * factors).sum(), pos_embed)
    matrix = resampling_matrix(SIDE, side)
    assert matrix.shape == (side**2, SIDE**2)
    torch.testing.assert_close(matrix @ pos_embed[0, 1:], expected[0, 1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrix.T @ factors[0, 1:], gradient[0, 1:], rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient[0, 0], factors[0, 0])
    assert (matrix != 0).any(0).all()


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_logits_and_every_gradient_are_those_of_timms_resampling(attention: str, global_pool: str, side: int) -> None:
    models, network = networks(attention, torch.float32, global_pool=global_pool)
    weights, images = stacked(models), small_images(side)
    logits = replace(network, resampling=resampling_matrix(SIDE, side))(weights, {}, images)
    gradients = gradients_of(logits, weights)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for replica, model in enumerate(models):
        if attention == "content":
            reference: nn.Module = taking_any_size(model, global_pool)
            parameters: dict[str, Tensor] = dict(reference.named_parameters())
            expected = reference(images[replica])
        else:
            reference, pos_embed = of_small_images(model, side, global_pool)
            resampled = resample_abs_pos_embed(
                pos_embed, [side, side], [SIDE, SIDE], num_prefix_tokens=int(global_pool == "token")
            )
            parameters = {**dict(reference.named_parameters()), "pos_embed": pos_embed}
            expected = torch.func.functional_call(reference, {"pos_embed": resampled}, (images[replica],))
        torch.testing.assert_close(logits[replica], expected, rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad((expected * factors[replica]).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, wanted, strict=True):
            ours = gradients[name][replica].clone()
            ours[key_bias(name)] = gradient[key_bias(name)]  # 0 but for rounding
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6, msg=name)
