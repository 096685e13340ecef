"""Several seeds of one network as one: the parameters of R models stacked along a first axis, every product batched over it.

The same functions as timm's VisionTransformer and PositionalVisionTransformer of each replica, with two differences that
change no result: of the last block only what reaches the class token is computed, and the patch embedding is a product.

Axes: R replicas, B batch, P patches, N = 1 + P tokens (class token first), D embed_dim, H heads, d = D / H, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-6  # timm's


class Operations(NamedTuple):
    """The three operations of a block for which there are kernels; `PLAIN` says what they compute."""

    attention: Callable[[Tensor], Tensor]
    mix: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def plain_attention(qkv: Tensor) -> Tensor:
    """Queries, keys and values (M, N, 3, H, d) of M images -> softmax(q k^T / sqrt(d)) v, as (M, N, D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each M, H, N, d
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain_mix(attention: Tensor, v: Tensor) -> Tensor:
    """Attention matrices (R, H, N, N) of positions, applied to the values (R, B, N, H, d) of every image -> (R, B, N, D)."""
    R, B, N, H, d = v.shape
    by_head = v.permute(0, 3, 2, 1, 4).reshape(R * H, N, B * d)  # one product per head for the whole batch
    mixed = torch.bmm(attention.to(v.dtype).reshape(R * H, N, N), by_head)
    return mixed.view(R, H, N, B, d).permute(0, 3, 2, 1, 4).reshape(R, B, N, H * d)


def plain_add_norm(  # noqa: PLR0917 - the signature of the kernel
    residual: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of residual and branch (R, M, D) and a bias (R, D), and the layer norm of that sum."""
    total = (residual.to(bias.dtype) + branch.to(bias.dtype) + bias[:, None]).to(residual.dtype)
    return total, norm(total, weight, norm_bias, eps)


PLAIN = Operations(plain_attention, plain_mix, plain_add_norm)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of x (R, M, D) with a weight and bias (R, D) per replica, computed in their type; of x's type."""
    normed = F.layer_norm(x.to(weight.dtype), x.shape[-1:], eps=eps)
    return (normed * weight[:, None] + bias[:, None]).to(x.dtype)


def stack(models: Sequence[VisionTransformer]) -> dict[str, Tensor]:
    """The parameters of `models` by name, stacked (R, ...). From now on those of each model are views into them."""
    stacked = {}
    for name, _ in models[0].named_parameters():
        parameters = [model.get_parameter(name) for model in models]
        stacked[name] = torch.stack([parameter.detach() for parameter in parameters])
        for parameter, view in zip(parameters, stacked[name], strict=True):
            parameter.data = view
    return stacked


@dataclass(frozen=True)
class StackedViT:
    """The forward pass of R networks of one architecture. Holds sizes only; the weights come with each call."""

    attention: Literal["content", "positional"]
    patch_size: int
    depth: int
    num_heads: int
    operations: Operations = PLAIN

    def product_weights(self, names: Sequence[str]) -> list[str]:
        """Those of the parameters `names` that enter matrix products: they are wanted in the type of the tokens."""
        return [name for name in names if name.endswith(".weight") and "norm" not in name]

    def __call__(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Images (R, B, 3, H, W) -> logits (R, B, K), in the type of the product weights.

        `weights` has timm's names; product weights may be bfloat16, everything else is float32.
        """
        tokens = self.embed(weights, images)  # R, B*N, D
        R, B = images.shape[:2]
        first = "blocks.0.norm1."
        normed = norm(tokens, weights[first + "weight"], weights[first + "bias"], NORM_EPS)
        for index in range(self.depth - 1):
            block, following = f"blocks.{index}.", f"blocks.{index + 1}."
            branch, bias = self._attend(weights, block + "attn.", normed, B)
            tokens, normed = self._add_norm(weights, tokens, branch, bias, block + "norm2.")
            branch = self._mlp(weights, block + "mlp.", normed)
            tokens, normed = self._add_norm(weights, tokens, branch, weights[block + "mlp.fc2.bias"], following + "norm1.")
        block = f"blocks.{self.depth - 1}."
        branch, bias = self._attend_class(weights, block + "attn.", normed, B)
        tokens = tokens.view(R, B, -1, tokens.shape[-1])[:, :, 0]  # R, B, D: the class tokens
        tokens, normed = plain_add_norm(tokens, branch, bias, *self._norm(weights, block + "norm2."), NORM_EPS)
        branch = self._mlp(weights, block + "mlp.", normed)
        _, normed = plain_add_norm(tokens, branch, weights[block + "mlp.fc2.bias"], *self._norm(weights, "norm."), NORM_EPS)
        return linear(weights, "head.", normed)

    def embed(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Images (R, B, 3, H, W) -> tokens (R, B*N, D)."""
        R, B, C, height, width = images.shape
        kernel, p = weights["patch_embed.proj.weight"], self.patch_size  # R, D, 3, p, p
        patches = images.to(kernel.dtype).view(R, B, C, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        patches = patches.reshape(R, -1, C * p * p)  # R, B*P, 3*p*p
        embedded = product(patches, kernel.flatten(2)).view(R, B, -1, kernel.shape[1])  # R, B, P, D
        embedded = embedded + weights["patch_embed.proj.bias"][:, None, None]
        classes = weights["cls_token"].expand(-1, B, -1, -1)  # R, B, 1, D
        tokens = torch.cat([classes, embedded], dim=2)
        if self.attention == "content":
            tokens = tokens + weights["pos_embed"]
        return tokens.to(kernel.dtype).flatten(1, 2)

    def _attend(self, weights: Mapping[str, Tensor], name: str, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The attention of a block without its last bias: x (R, B*N, D) -> (R, B*N, D), and that bias (R, D)."""
        R, M, D = x.shape
        B, N = batch, M // batch
        if self.attention == "content":
            qkv = linear(weights, name + "qkv.", x).view(R * B, N, 3, self.num_heads, -1)
            mixed = self.operations.attention(qkv).view(R, M, D)
        else:
            v = linear(weights, name + "v.", x).view(R, B, N, self.num_heads, -1)
            mixed = self.operations.mix(self.positional(weights, name), v).view(R, M, D)
        return product(mixed, weights[name + "proj.weight"]), weights[name + "proj.bias"]

    def _attend_class(self, weights: Mapping[str, Tensor], name: str, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The same for the class token alone, which attends to all: x (R, B*N, D) -> (R, B, D), and the last bias (R, D)."""
        R, M, D = x.shape
        B, H = batch, self.num_heads
        if self.attention == "content":
            weight, bias = weights[name + "qkv.weight"], weights[name + "qkv.bias"]
            class_tokens = x.view(R, B, -1, D)[:, :, 0]
            q = (product(class_tokens, weight[:, :D]) + bias[:, None, :D].to(x.dtype)).view(R, B, 1, H, -1)
            k, v = (product(x, weight[:, D:]) + bias[:, None, D:].to(x.dtype)).view(R, B, M // B, 2, H, -1).unbind(3)
            scores = (q.to(bias.dtype) * k.to(bias.dtype)).sum(-1) * (D // H) ** -0.5  # R, B, N, H
            shares = torch.softmax(scores, dim=2)
        else:
            v = linear(weights, name + "v.", x).view(R, B, M // B, H, -1)
            shares = self.positional(weights, name)[:, :, 0].transpose(1, 2)[:, None]  # R, 1, N, H
        mixed = (shares[..., None] * v.to(shares.dtype)).sum(2).to(x.dtype).flatten(2)
        return product(mixed, weights[name + "proj.weight"]), weights[name + "proj.bias"]

    def positional(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        """The attention matrices (R, H, N, N) of the block called `name`, float32, from its positional encoding alone."""
        weight, pos_embed = weights[name + "qk.weight"], weights["pos_embed"]
        qk = linear(weights, name + "qk.", pos_embed[:, 0].to(weight.dtype))  # pos_embed is R, 1, N, D
        R, N, D2 = qk.shape
        q, k = qk.view(R, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each R, H, N, d
        scores = (q @ k.transpose(-2, -1)).to(pos_embed.dtype) * (D2 // 2 // self.num_heads) ** -0.5
        return torch.softmax(scores, dim=-1)

    def _mlp(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        """The MLP of a block without its last bias: x (R, M, D) -> (R, M, D)."""
        return product(F.gelu(linear(weights, name + "fc1.", x)), weights[name + "fc2.weight"])

    def _add_norm(
        self, weights: Mapping[str, Tensor], tokens: Tensor, branch: Tensor, bias: Tensor, following: str
    ) -> tuple[Tensor, Tensor]:
        return self.operations.add_norm(tokens, branch, bias, *self._norm(weights, following), NORM_EPS)

    @staticmethod
    def _norm(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        return weights[name + "weight"], weights[name + "bias"]


class _Product(torch.autograd.Function):
    """x W^T, with the gradient of W laid out as W is: autograd's own is transposed, which costs a copy of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        return torch.bmm(dy, weight), torch.bmm(dy.transpose(1, 2), x)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, M, in) times the transposed weight (R, out, in) of a linear layer -> (R, M, out)."""
    result: Tensor = _Product.apply(x, weight)
    return result


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The linear layer called `name` of every replica: x (R, M, in) -> (R, M, out)."""
    return product(x, weights[name + "weight"]) + weights[name + "bias"][:, None].to(x.dtype)
