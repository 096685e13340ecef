"""What the experiments share: data of several seeds side by side, their test errors, and gradient descent step by step.

Axes: R seeds, N samples, D patches, d dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpa.theory.data import Gaussian, Signal, unit_vector
from vitpa.theory.model import Form

GROWTH = 0.05  # of the time so far, that a step may take
ROWS = 1.1  # from one row of measurements to the next, the time grows by this factor
STREAMS = 64  # of random numbers for each seed

Row = dict[str, float | str]


@dataclass(frozen=True)
class Data:
    """Samples of several seeds, each of its own signal.

    Attributes:
        w: (R, d).
        X: (R, N, D, d).
        y: (R, N).
    """

    w: Tensor
    X: Tensor
    y: Tensor


@dataclass(frozen=True)
class State:
    """How far an experiment is; no step changes it in place.

    Attributes:
        step: Steps that are taken.
        time: The sum of their learning rates, that is the time of gradient flow.
        next_row: When the next row of measurements is due, in time.
        tensors: The weights.
        rows: What was measured, a row for each seed and time.
    """

    step: int
    time: float
    next_row: float
    tensors: dict[str, Tensor]
    rows: tuple[Row, ...]


def random_stream(seed: int, stream: int) -> torch.Generator:
    """The random numbers of a seed for one purpose."""
    return torch.Generator().manual_seed(seed * STREAMS + stream)


def draw(problem: Signal | Gaussian, count: int, seeds: Sequence[int], stream: int) -> Data:
    """`count` samples for each seed, of a signal that is drawn, too."""
    w, X, y = [], torch.empty(len(seeds), count, problem.patches, problem.dim, dtype=torch.float64), []
    for place, seed in enumerate(seeds):  # one by one: those of all seeds may be a large part of the memory
        generator = random_stream(seed, stream)
        w.append(unit_vector(problem.dim, generator))
        X[place], labels = problem.sample(count, w[-1], generator)
        y.append(labels)
    return Data(torch.stack(w), X, torch.stack(y))


def draw_test(problem: Signal | Gaussian, count: int, seeds: Sequence[int], stream: int) -> Data:
    """`count` fresh samples for each seed, from which `errors_of` knows the error: in the plane of w and v.

    Only <w, X_j> and <v, X_j> matter to labels and outputs, and the noise looks alike in all directions across w: two
    dimensions say all, where d would take 50 times as long. The first is w's, the second that of v's part across it.
    """
    plane = replace(problem, dim=2, q=problem.q_value) if isinstance(problem, Signal) else replace(problem, dim=2)
    w, X, y = torch.tensor([1.0, 0.0], dtype=torch.float64), [], []
    for seed in seeds:
        samples, labels = plane.sample(count, w, random_stream(seed, stream))
        X.append(samples)
        y.append(labels)
    return Data(w.expand(len(seeds), 2), torch.stack(X), torch.stack(y))


def errors_of(form: Form, A: Tensor, v: Tensor, w: Tensor, test: Data) -> Tensor:
    """The share (R,) of the samples of `draw_test` for which sign F is not y, F = 0 counting half.

    Args:
        form: Of the model.
        A: (R, D, D).
        v: (R, d).
        w: (R, d), the signals.
        test: In the plane of w and v.
    """
    along = (v * w).sum(1)
    across = (v - along[:, None] * w).norm(dim=1)
    outputs = form.outputs(A, torch.stack([along, across], 1), test.X)
    return torch.where(outputs == 0, 0.5, (outputs * test.y < 0).double()).mean(1)


def cosine(v: Tensor, w: Tensor) -> Tensor:
    """Of the angle between v and w: (R,) of (R, d)."""
    return F.cosine_similarity(v, w, dim=1)


def learning_rate(time: float, first: float, largest: float) -> float:
    """(ours) The next step: `first`, later 5 % of the time so far, at most `largest`.

    What is shown over the logarithm of the time changes as slowly at its end as at its start, and so may the steps be larger.
    With `first` = `largest` the learning rate is constant.
    """
    return min(max(first, GROWTH * time), largest)


def small_weights(
    seeds: Sequence[int], D: int, d: int, *, diagonal: float, std_of_A: float = 0.001, std_of_v: float = 0.001
) -> dict[str, Tensor]:
    """A (R, D, D) with a diagonal that stays as it is, and v (R, d); elsewhere normally distributed."""
    A, v = [], []
    for seed in seeds:
        generator = random_stream(seed, 2)
        A.append(torch.randn(D, D, dtype=torch.float64, generator=generator).mul_(std_of_A).fill_diagonal_(diagonal))
        v.append(torch.randn(d, dtype=torch.float64, generator=generator).mul_(std_of_v))
    return {"A": torch.stack(A), "v": torch.stack(v)}
