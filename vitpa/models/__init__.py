"""The two networks of the paper, timm's ViT and the same ViT with positional attention, and a ResNet as a baseline."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitpa.models.positional import PositionalVisionTransformer
from vitpa.models.resnet import resnet18


def build_model(
    *,
    kind: Literal["vit", "resnet18"] = "vit",
    attention: Literal["content", "positional"],
    num_classes: int,
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    pos_embed_std: float,
    global_pool: Literal["token", "avg"] = "token",
    seed: int,
) -> VisionTransformer | ResNet:
    """A network on the CPU, initialised from `seed` alone; images (B, 3, img_size, img_size) -> logits (B, num_classes).

    `attention="content"` is timm's VisionTransformer itself, so that timm's weights load and give timm's logits.
    Initialisation is timm's (weights truncated normal with std 0.02, biases 0), but for `pos_embed_std`.
    `global_pool="avg"` is timm's VisionTransformer(global_pool="avg", class_token=False): the mean of all patches, then the
    last norm (`fc_norm`), as in Beyer, Zhai, Kolesnikov 2022 (arXiv 2205.01580), who norm before the mean. All of that is
    for `kind="vit"`; a ResNet has one form.
    """
    if kind == "resnet18":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return resnet18(num_classes)
    network = VisionTransformer if attention == "content" else PositionalVisionTransformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=global_pool == "token",
        )
        nn.init.trunc_normal_(model.pos_embed, std=pos_embed_std, a=-2 * pos_embed_std, b=2 * pos_embed_std)
    return model
