"""Triton kernels for small ViTs: attention, positional mixing, addition and layer norm, each in one pass over memory.

They are for images of 1 + P tokens (the class token and a power of two of patches), where a library's tiles of 128 tokens
are mostly padding. The class token is apart from the patches: a vector, or a tile of 16 rows of which one counts, the
smallest that a matrix unit takes. Nothing is added up atomically: every sum has a fixed order, so the same inputs give the
same bits.

Axes: R replicas, B batch, M = R * B images (in the norms: tokens of a replica), N tokens, P = N - 1 patches, H heads,
d head_dim, D = H * d embed_dim.
"""
