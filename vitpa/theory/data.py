"""The two distributions of the theory's experiments: patches that share a signal in sets (assumption 1), and Gaussian ones.

Jelassi, Sander, Li 2022 (arXiv 2210.09221): assumption 1 and figure 2. Axes: R seeds, N samples, D patches, d dimensions,
L sets of C patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Delta = Literal["q/4", "q/2"]


@dataclass(frozen=True)
class Signal:
    """Assumption 1: [D] is divided into L sets of C = D / L patches, of which one carries the label.

    y is uniform on {-1, 1} and l on [L]. X_j = y w + xi_j in S_l; elsewhere X_j = delta_j w + xi_j. w is a unit vector.

    Attributes:
        patches: D.
        sets: L.
        dim: d.
        q: How often delta is not 0 ("q/2"), or twice that ("q/4"); None: log(d) / D, as in the code.
        delta: The probability of delta = 1, and that of -1: q/2 in the paper's text, q/4 in the code.
        sigma: The standard deviation of the noise xi, in each direction.
        project_noise: Whether xi is orthogonal to w, as in the paper's text; in the code it is not.
    """

    patches: int = 10
    sets: int = 5
    dim: int = 100
    q: float | None = None
    delta: Delta = "q/4"
    sigma: float = 0.1
    project_noise: bool = False

    @property
    def set_size(self) -> int:
        """C."""
        return self.patches // self.sets

    @property
    def q_value(self) -> float:
        """Of q, if it is left to d and D, too."""
        return math.log(self.dim) / self.patches if self.q is None else self.q

    @property
    def probability(self) -> float:
        """Of delta = 1, and of delta = -1."""
        return self.q_value / {"q/4": 4, "q/2": 2}[self.delta]

    def sample(self, count: int, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` samples with the signal `w` (d,): X (N, D, d) and the labels y (N,), which are -1 or 1."""
        y = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
        carries = torch.randint(0, self.sets, (count,), generator=generator)
        u = torch.rand(count, self.patches, generator=generator, dtype=torch.float64)
        delta = (u < self.probability).double() - (u >= 1 - self.probability).double()
        in_set = carries[:, None] == self.partition()
        size = torch.where(in_set, y[:, None].double(), delta)
        X = torch.randn(count, self.patches, self.dim, dtype=torch.float64, generator=generator).mul_(self.sigma)
        if self.project_noise:
            X -= (X @ w)[..., None] * w
        X.addcmul_(size[..., None], w)
        return X, y.double()

    def partition(self) -> Tensor:
        """The set of each patch: (D,) int64."""
        return torch.arange(self.patches) // self.set_size


@dataclass(frozen=True)
class Gaussian:
    """The negative control, figure 2: X_j is standard Gaussian, y the sign of a network that mixes neighbouring patches.

    y = sign sum_l (sum_{j in S_l} <w, X_j>)^3: a convolution of stride C with cubic activation, its windows disjoint.
    The defaults are an image of 4 x 4 patches in blocks of 2 x 2; the paper does not say d.

    Attributes:
        side: Patches along a side of the image: D = side^2.
        block: Patches along a side of a set: C = block^2.
        dim: d.
    """

    side: int = 4
    block: int = 2
    dim: int = 10

    @property
    def patches(self) -> int:
        """D."""
        return self.side**2

    def sample(self, count: int, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` samples labelled by `w` (d,): X (N, D, d) and the labels y (N,), which are -1 or 1."""
        X = torch.randn(count, self.patches, self.dim, dtype=torch.float64, generator=generator)
        sums = torch.zeros(count, int(self.partition().max()) + 1, dtype=torch.float64)
        sums.index_add_(1, self.partition(), X @ w)
        return X, torch.where((sums**3).sum(1) < 0, -1.0, 1.0).double()

    def partition(self) -> Tensor:
        """The set of each patch: (D,) int64; patches in rows."""
        return squares(self.side, self.block)


def squares(side: int, block: int) -> Tensor:
    """The partition of side x side patches, in rows, into squares of block x block: the number of each patch's, (side^2,)."""
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    return row // block * (side // block) + column // block


def unit_vector(dim: int, generator: torch.Generator) -> Tensor:
    """A signal w: (dim,), uniform on the sphere."""
    return F.normalize(torch.randn(dim, dtype=torch.float64, generator=generator), dim=0)


def linear_error(problem: Signal) -> float:
    """The exact error of sign(sum_j <w, X_j>) without noise: P(C + sum of the other deltas < 0), a tie counting half.

    As long as the attention has not moved, the model's linear part decides, and this is its error: 7.84 % with q/4 and
    15.6 % with q/2 at the default sizes.
    """
    p, sums = problem.probability, torch.ones(1, dtype=torch.float64)  # the distribution of the sum, from the least value on
    for _ in range(problem.patches - problem.set_size):
        padded = F.pad(sums, (2, 2))
        sums = p * padded[:-2] + (1 - 2 * p) * padded[1:-1] + p * padded[2:]
    values = torch.arange(len(sums)) - len(sums) // 2 + problem.set_size
    return float(sums @ ((values < 0) + (values == 0) / 2).double())
