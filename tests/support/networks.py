"""Small networks, alone and stacked, with their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitpa.models import build_model
from vitpa.models.stacked import StackedViT

R, B = 3, 4
SMALL: dict[str, Any] = {
    "num_classes": 10,
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.0,
    "pos_embed_std": 0.5,
}
D = SMALL["embed_dim"]


def networks(attention: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[list[VisionTransformer], StackedViT]:
    """R modules of which every parameter is random (not 0 or 1, as biases and norms are at first), and their stack."""
    sizes = {**SMALL, **changes}
    models = [build_model(attention=attention, seed=seed, **sizes).to(dtype) for seed in range(R)]  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype), alpha=0.2)
    stack = StackedViT(attention, sizes["patch_size"], sizes["depth"], sizes["num_heads"])  # type: ignore[arg-type]
    return models, replace(stack, global_pool=sizes.get("global_pool", "token"))


def stacked(models: list[VisionTransformer]) -> dict[str, Tensor]:
    names = [name for name, _ in models[0].named_parameters()]
    return {name: torch.stack([model.get_parameter(name).detach() for model in models]).requires_grad_() for name in names}


def random_images(dtype: torch.dtype = torch.float64) -> Tensor:
    """Other images for each replica: (R, B, 3, H, W)."""
    return torch.randn(R, B, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients_of(logits: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a sum in which every logit (R, B, K) has a factor of its own."""
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((logits * factors).sum(), list(weights.values()))
    return dict(zip(weights, gradients, strict=True))


def key_bias(name: str) -> slice:
    """Where a bias is that of the keys: it changes nothing, softmax cancels it."""
    return slice(D, 2 * D) if name.endswith((".qkv.bias", ".qk.bias")) else slice(0, 0)
