"""Triton kernels for ViTs: attention, positional mixing, addition and norm, bias and GELU, each in place and without copies.

`attention` and `mixing` are for images of 1 + P tokens (the class token and a power of two of patches), where a library's
tiles of 128 tokens are mostly padding: they have the class token apart from the patches, as a vector, or as a tile of 16
rows of which one counts, the smallest that a matrix unit takes. `tiled_attention` and `tiled_mixing` are for more tokens, of
any number. Nothing is added up atomically: every sum has a fixed order, so the same inputs give the same bits.

Axes: R replicas, B batch, M = R * B images (in norm and GELU: tokens of a replica), N tokens, P = N - 1 patches, H heads,
d head_dim, D = H * d embed_dim.
"""
