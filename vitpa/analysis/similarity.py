"""The positional-similarity map: how alike the positional encodings of every two patches are, drawn as a grid of maps."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vitpa.analysis.measures import cosine_similarity


def positional_similarity(pos_embed: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Cosine similarities (n, n), in [-1, 1], of the encodings of the n patches in pos_embed (1, num_prefix_tokens + n, D).

    The class token's encoding, the first, is left out.
    """
    return cosine_similarity(pos_embed[0, num_prefix_tokens:]).float()


def similarity_grid(similarity: Tensor, zoom: int = 4) -> Tensor:
    """Draw similarities (n, n) of n = g * g patches as an image (1, height, width) in [0, 1].

    The map at row i, column j of the grid shows the similarity of patch (i, j) to all patches; maps are separated by a
    line of one patch. Dosovitskiy et al. 2021, figure 7 (centre).
    """
    g = round(similarity.shape[0] ** 0.5)
    maps = (similarity.view(g, g, g, g) + 1) / 2  # grid row, grid column, row, column
    maps = F.pad(maps, (0, 1, 0, 1), value=1.0)
    image = maps.permute(0, 2, 1, 3).reshape(g * (g + 1), g * (g + 1))[:-1, :-1]
    return image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)[None].clamp(0, 1)
