"""How much spatial structure a matrix over patches has, and how much it would have by chance. Tensors in, numbers out.

Neighbour recall, mean attention distance, entropy and the correlation with distance are the field's measures (marked ours in
the README), not the paper's; its own, patch association, is in vitpa/theory/association.py.

Chance: the patches change places at random, as if the image had been cut up and put together in another order. What is
expected then is computed exactly; the interval, which 95 % of the orders fall into, from PERMUTATIONS of them.

Axes: n patches, M matrices (such as those of layers and heads), P permutations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitpa.theory.association import association

PERMUTATIONS = 1000
_CHUNK = 50  # permutations at a time: their matrices are in memory together
TOLERANCE = 1e-9  # distances that differ by less are equal

Matrices = Float64[Tensor, "M n n"]
Places = Float64[Tensor, "n 2"]


def grid_places(side: int) -> Places:
    """Row and column of each patch of an image of side x side patches, in rows: (side^2, 2)."""
    index = torch.arange(side * side)
    return torch.stack([index // side, index % side], 1).double()


def distances(places: Places) -> Float64[Tensor, "n n"]:
    """Euclidean distances between the patches, in patches."""
    difference = places[:, None] - places[None, :]
    return difference.square().sum(-1).sqrt()


def cosine_similarity(vectors: Float[Tensor, "n D"]) -> Float64[Tensor, "n n"]:
    """Cosines of the angles between any two of n vectors, in [-1, 1]."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return unit @ unit.T


def scaled_products(vectors: Float[Tensor, "n D"]) -> Float64[Tensor, "n n"]:
    """P^T P of figure 1, scaled to [-1, 1]: divided by its largest absolute value, so that 0 stays 0 (how is our reading)."""
    products = vectors.double() @ vectors.double().T
    return products / products.abs().max().clamp_min(torch.finfo(torch.float64).tiny)


def among_patches(scores: Float[Tensor, "*M N N"], num_prefix_tokens: int = 1) -> Float64[Tensor, "*M n n"]:
    """The attention that patches pay to patches: without the class token, the first, and with rows that sum to 1 again.

    From `scores`, the attention before the softmax: where the class token takes all of it, as float32 rounds it, the ratio of
    what is left would be 0 / 0.
    """
    return torch.softmax(scores[..., num_prefix_tokens:, num_prefix_tokens:].double(), dim=-1)


def chosen(matrices: Matrices, count: int) -> Matrices:
    """Which `count` patches have the largest entries in each row, the patch itself apart: weights that sum to `count`.

    A weight is 1 or 0, but among equal entries that compete for the last places these are shared: the expectation of a draw.
    """
    n = matrices.shape[-1]
    others = matrices.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
    least = others.topk(count, dim=-1).values[..., -1:]
    above, equal = (others > least).double(), (others == least).double()
    return above + equal * (count - above.sum(-1, keepdim=True)) / equal.sum(-1, keepdim=True)


def near(places: Places, count: int) -> Float64[Tensor, "n n"]:
    """1 where a patch is among the `count` nearest of another, else 0; all that are as near as the last of them count."""
    apart = distances(places) + torch.diag(torch.full((len(places),), float("inf"), dtype=torch.float64))
    return (apart <= apart.topk(count, dim=-1, largest=False).values[:, -1:] + TOLERANCE).double()


@dataclass(frozen=True)
class Measured:
    """A measure of M matrices, with what it is when the patches change places at random.

    Attributes:
        value: (M,).
        chance: (M,), the exact expectation.
        permuted: (M, P), the values of P orders.
    """

    value: Float64[Tensor, " M"]
    chance: Float64[Tensor, " M"]
    permuted: Float64[Tensor, "M P"]

    def mean(self) -> Measured:
        """The mean over the matrices: M = 1."""
        return Measured(*(each.mean(0, keepdim=True) for each in (self.value, self.chance, self.permuted)))

    def split(self, count: int) -> list[Measured]:
        """Parts of `count` matrices each."""
        parts = zip(*(each.split(count) for each in (self.value, self.chance, self.permuted)), strict=True)
        return [Measured(*part) for part in parts]

    def interval(self) -> Float64[Tensor, "2 M"]:
        """2.5 % and 97.5 % of the values of the permuted orders."""
        return self.permuted.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)


def orders(n: int, seed: int = 0) -> Int64[Tensor, "P n"]:
    """PERMUTATIONS random orders of n patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.argsort(torch.rand(PERMUTATIONS, n, generator=generator, dtype=torch.float64), dim=1)


def _against(weights: Matrices, of_pairs: Float64[Tensor, "n n"], shuffles: Int64[Tensor, "P n"]) -> Measured:
    """sum_ij weights_ij of_pairs_ij: of the patches in their places, expected over all orders, and for each of `shuffles`."""
    M, n, _ = weights.shape
    flat = weights.reshape(M, n * n)
    off = ~torch.eye(n, dtype=torch.bool)
    within = weights.diagonal(dim1=1, dim2=2).sum(1)  # a patch is at no distance from itself in any order
    chance = within * of_pairs.diagonal().mean() + (flat.sum(1) - within) * of_pairs[off].mean()
    permuted = [
        flat @ of_pairs[part[:, :, None], part[:, None, :]].reshape(len(part), n * n).T for part in shuffles.split(_CHUNK)
    ]
    return Measured(flat @ of_pairs.flatten(), chance, torch.cat(permuted, 1))


def neighbour_recall(matrices: Matrices, places: Places, count: int, shuffles: Int64[Tensor, "P n"]) -> Measured:
    """Of the `count` patches with the largest entries in a row, the share that are among the `count` nearest; mean of rows."""
    return _against(chosen(matrices, count) / (count * len(places)), near(places, count), shuffles)


def attention_distance(attention: Matrices, places: Places, shuffles: Int64[Tensor, "P n"]) -> Measured:
    """The mean distance from a patch to the patches that it attends to, weighted by attention; in patches."""
    return _against(attention / len(places), distances(places), shuffles)


def distance_correlation(matrices: Matrices, places: Places, shuffles: Int64[Tensor, "P n"]) -> Measured:
    """Pearson's correlation, over pairs of different patches, of entries with distances; negative where near ones are alike.

    0 where all entries are equal, as where all distances are.
    """
    n = len(places)
    off = ~torch.eye(n, dtype=torch.bool)

    def standardized(each: Tensor) -> Tensor:
        centred = (each - each[..., off].mean(-1)[..., None, None]) * off
        norm = centred.square().sum((-1, -2), keepdim=True).sqrt()
        scale = each[..., off].abs().amax(-1)[..., None, None] * n * torch.finfo(torch.float64).eps
        return torch.where(norm > scale, centred / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    return _against(standardized(matrices), standardized(distances(places)), shuffles)


def association_gap(matrices: Matrices, partition: Int64[Tensor, " n"], shuffles: Int64[Tensor, "P n"]) -> Measured:
    """The mean entry within the sets of a partition, a patch itself apart, less the mean entry between sets."""
    same = partition[:, None] == partition[None, :]
    within = same & ~torch.eye(len(partition), dtype=torch.bool)
    return _against(matrices, within / within.sum() - ~same / (~same).sum().double(), shuffles)


def association_share(matrices: Matrices, partition: Int64[Tensor, " n"]) -> tuple[Float64[Tensor, " M"], float]:
    """The share of patches whose set is found, by definition 2.2 (vitpa/theory/association.py), and that of a random order."""
    n, size = len(partition), int((partition == partition[0]).sum())
    shares = [association(each, partition).share for each in matrices]
    return torch.tensor(shares, dtype=torch.float64), 1 / math.comb(n - 1, size - 1)


def entropy(attention: Float64[Tensor, "*M n n"]) -> Float64[Tensor, " *M"]:
    """The entropy of a row, in nats; mean of the rows. ln n if attention is uniform, 0 if it is on one patch."""
    of_rows: Tensor = torch.special.entr(attention).sum(-1)
    return of_rows.mean(-1)
