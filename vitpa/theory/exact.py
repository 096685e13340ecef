"""Exact test errors in the limit of no noise, of any model (T) and of the best classifier; theorem 3.2's alternatives.

Without noise X_j is a multiple of w, so that a sample is one of L 3^(D - C) choices of signs, of known probabilities, and its
mirror image. Jelassi, Sander, Li 2022, assumption 1 and theorem 3.2. Axes: E choices, D patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitpa.theory.data import Signal
from vitpa.theory.model import Form

MOST_PATCHES = 12  # 3^(D - C) choices are listed


def noiseless_error(problem: Signal, form: Form, A: Tensor, scale: float = 1.0) -> float:
    """The test error of the model with attention A (D, D) and v = scale w; F = 0 counts half.

    Raises:
        ValueError: there are too many patches for that.
    """
    sizes, mass = choices(problem)
    F = form.outputs(A[None], sizes.new_tensor([[scale]]), sizes[None, :, :, None])[0]
    return _error(F, mass)


def best_error(problem: Signal) -> float:
    """The test error of the best classifier that knows w and the sets (Bayes): 2.55 % with q/4 and 9.06 % with q/2.

    All that tells y are the sets whose patches all have one sign: as many as there are of 1 and of -1, so likely is each y.

    Raises:
        ValueError: as for `noiseless_error`.
    """
    sizes, mass = choices(problem)
    sums = sizes.view(len(sizes), problem.sets, problem.set_size).sum(2)
    return _error((sums == problem.set_size).double().sum(1) - (sums == -problem.set_size).double().sum(1), mass)


def choices(problem: Signal) -> tuple[Tensor, Tensor]:
    """The multiples of w in all samples with y = 1, (E, D), and their probabilities (E,).

    Raises:
        ValueError: there are too many patches for that.
    """
    D, C, p = problem.patches, problem.set_size, problem.probability
    if D > MOST_PATCHES:
        raise ValueError(f"an exact error can be computed for up to {MOST_PATCHES} patches, not {D}")
    signs = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    others = torch.cartesian_prod(*[signs] * (D - C)).view(-1, D - C)
    mass = torch.where(others == 0, 1 - 2 * p, others.new_tensor(p)).prod(1) / problem.sets
    carried = torch.ones(len(others), C, dtype=torch.float64)
    sizes = [torch.cat([others[:, : i * C], carried, others[:, i * C :]], 1) for i in range(problem.sets)]
    return torch.cat(sizes), mass.repeat(problem.sets)


def alternative(problem: Signal, shift: int = 1, strength: float = 10.0) -> Tensor:
    """A (D, D) in which the patches of set l attend to those of set l + shift: theorem 3.2's, in a construction of ours.

    F sums over patches, so that it is the F of the model in which sets attend to themselves (shift 0); only which patch reads
    which set is another. For a shift other than 0 the sets Top_C do not meet S_l.
    """
    partition = problem.partition()
    return strength * ((partition[:, None] + shift) % problem.sets == partition[None, :]).double()


def _error(F: Tensor, mass: Tensor) -> float:
    tie = F.abs() <= 1e-12 * F.abs().max()
    return float(mass @ torch.where(tie, 0.5, (F < 0).double()))
