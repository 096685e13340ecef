"""The ViT whose attention depends on positions alone: softmax(P Wq (P Wk)^T / sqrt(d_head)) X Wv.

Jelassi, Sander, Li, "Vision Transformers provably learn spatial structure", NeurIPS 2022. P is not added to the tokens.
That one P is shared by all layers, and that every layer and head has its own Wq and Wk, is our reading of the paper.

Axes: B batch, N tokens (class token first, if there is one), D embed_dim, H heads, d = D / H, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class PositionalAttention(nn.Module):
    """Multi-head attention whose matrix is computed from the positional encoding, once for the whole batch."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5
        self.qk = nn.Linear(embed_dim, 2 * embed_dim)
        self.v = nn.Linear(embed_dim, embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        for linear in (self.qk, self.v, self.proj):  # as timm initialises its attention
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def scores(self, pos_embed: Float[Tensor, "1 N D"]) -> Float[Tensor, "H N N"]:
        """The attention before the softmax, of the positional encoding."""
        _, N, D = pos_embed.shape
        q, k = self.qk(pos_embed).view(N, 2, self.num_heads, D // self.num_heads).permute(1, 2, 0, 3)  # each H, N, d
        scores: Tensor = self.scale * (q @ k.transpose(-2, -1))
        return scores

    def attention(self, pos_embed: Float[Tensor, "1 N D"]) -> Float[Tensor, "H N N"]:
        """The attention matrices, rows summing to 1, of the positional encoding."""
        return torch.softmax(self.scores(pos_embed), dim=-1)

    def forward(self, x: Float[Tensor, "B N D"], pos_embed: Float[Tensor, "1 N D"]) -> Float[Tensor, "B N D"]:
        """Mix the tokens x with the attention of `pos_embed`."""
        B, N, D = x.shape
        v = self.v(x).view(B, N, self.num_heads, D // self.num_heads)
        v = v.permute(2, 1, 0, 3).reshape(self.num_heads, N, -1)  # H, N, B*d: one product per head for the whole batch
        mixed = self.attention(pos_embed).to(v.dtype) @ v
        mixed = mixed.view(self.num_heads, N, B, -1).permute(2, 1, 0, 3).reshape(B, N, D)
        projected: Tensor = self.proj(mixed)
        return projected


class PositionalVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with every block's attention replaced by `PositionalAttention` over one shared P."""

    def __init__(self, *, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **options)
        for block in self.blocks:
            block.attn = PositionalAttention(embed_dim, num_heads)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Images -> logits."""
        logits: Tensor = self.forward_head(self.forward_features(x))
        return logits

    def forward_features(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Images -> tokens after the last norm; before it if the head has one of its own, `fc_norm`."""
        x = self.patch_embed(x)  # P is not added
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = x + block.drop_path1(block.attn(block.norm1(x), self.pos_embed))
            x = x + block.drop_path2(block.mlp(block.norm2(x)))
        normed: Tensor = self.norm(x)
        return normed

    def attention_maps(self) -> Float[Tensor, "depth H N N"]:
        """The attention of every layer and head: the same for every image."""
        return torch.softmax(self.attention_scores(), dim=-1)

    def attention_scores(self) -> Float[Tensor, "depth H N N"]:
        """The same before the softmax."""
        return torch.stack([block.attn.scores(self.pos_embed) for block in self.blocks])
