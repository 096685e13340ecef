"""The attention of a trained model between its patches: one matrix per head; of the content model the mean of many images'.

Axes: L layers, H heads, B images, N tokens (class token first, if there is one), n patches, d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitpa.analysis.measures import among_patches, entropy
from vitpa.models.positional import PositionalVisionTransformer


@torch.no_grad()
def patch_attention(
    model: Any, batches: Iterable[Float[Tensor, "B 3 S S"]]
) -> tuple[Float64[Tensor, "L H n n"], Float64[Tensor, "L H"]] | None:
    """The attention that patches pay to patches, and its entropy (L, H) in nats; each a mean over the images of `batches`.

    Of the positional model, whose attention is the same for every image, no image is needed. None: there is no image.
    """
    if isinstance(model, PositionalVisionTransformer):
        matrices = among_patches(model.attention_scores(), model.num_prefix_tokens)
        return matrices, entropy(matrices)
    count, matrices, entropies = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        with attention_scores(model) as layers:
            model(images)
        its = torch.stack([among_patches(each, model.num_prefix_tokens) for each in layers], 1)  # B, L, H, n, n
        count, matrices, entropies = count + len(images), matrices + its.sum(0), entropies + entropy(its).sum(0)
    return (matrices / count, entropies / count) if count else None


@contextmanager
def attention_scores(model: Any) -> Iterator[list[Float[Tensor, "B H N N"]]]:
    """While it is open, a forward pass of timm's ViT appends each layer's attention before the softmax."""
    found: list[Tensor] = []

    def keep(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        B, N, D = x.shape
        heads = attention.num_heads
        q, k, _ = attention.qkv(x).view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # each B, H, N, d
        q, k = attention.q_norm(q), attention.k_norm(k)
        found.append(attention.scale * (q @ k.transpose(-2, -1)))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
