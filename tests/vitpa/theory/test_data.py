"""The theory's data are what assumption 1 and figure 2 say."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from vitpa.theory.data import Delta, Gaussian, Signal, linear_error, unit_vector

SAMPLES = 40_000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("delta", "per_cent"), [("q/4", 7.84), ("q/2", 15.61)])
def test_the_error_of_a_linear_model_is_the_exact_one(delta: Delta, per_cent: float) -> None:
    problem = Signal(delta=delta)
    p, by_hand = problem.probability, 0.0
    for deltas in product((-1, 0, 1), repeat=8):  # all values of the eight patches that do not carry the label
        mass = math.prod(p if value else 1 - 2 * p for value in deltas)
        by_hand += mass * {True: 1.0, False: 0.0}[2 + sum(deltas) < 0] + mass * 0.5 * (2 + sum(deltas) == 0)
    assert linear_error(problem) == pytest.approx(by_hand, abs=1e-12)
    assert round(100 * by_hand, 2) == per_cent


@pytest.mark.parametrize("delta", ["q/4", "q/2"])
def test_one_set_carries_the_label_and_the_others_noise(delta: Delta) -> None:
    problem, random = Signal(delta=delta, sigma=1e-6), generator()
    w = unit_vector(problem.dim, random)
    X, y = problem.sample(SAMPLES, w, random)
    z = (X @ w).round()  # (N, D), the noise is gone
    in_sets = z.view(SAMPLES, problem.sets, problem.set_size)
    assert set(y.tolist()) == {-1.0, 1.0}
    assert bool((in_sets == y[:, None, None]).all(2).any(1).all())
    # in four of five sets a patch has a delta; in the fifth the label
    expected = 0.8 * 2 * problem.probability + 0.2
    assert z.abs().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / z.numel()) * problem.set_size)
    errors = ((z.sum(1) * y < 0).double() + (z.sum(1) == 0).double() / 2).mean().item()
    limit = linear_error(problem)
    assert errors == pytest.approx(limit, abs=4 * math.sqrt(limit / SAMPLES))


def test_the_noise_is_of_the_given_size_and_orthogonal_to_the_signal_if_asked_for() -> None:
    for project in (False, True):
        problem, random = Signal(project_noise=project), generator()
        w = unit_vector(problem.dim, random)
        X, _ = problem.sample(2_000, w, random)
        across = X - (X @ w)[..., None] * w
        assert across.pow(2).sum(2).mean().item() == pytest.approx(0.1**2 * 99, rel=0.02)
        z = X @ w
        assert ((z - z.round()).abs().max().item() < 1e-12) == project


def test_a_seed_gives_the_same_data() -> None:
    for problem in (Signal(), Gaussian()):
        first, second = (problem.sample(10, unit_vector(problem.dim, random), random) for random in (generator(), generator()))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_the_gaussian_labels_are_a_cubic_convolutions() -> None:
    problem, random = Gaussian(), generator()
    w = unit_vector(problem.dim, random)
    X, y = problem.sample(500, w, random)
    for image, label in zip(X.view(500, 4, 4, -1), y, strict=True):
        windows = [image[row : row + 2, column : column + 2] for row in (0, 2) for column in (0, 2)]
        value = sum(float((window @ w).sum()) ** 3 for window in windows)
        assert math.copysign(1.0, value) == label
    assert y.mean().abs().item() < 4 / math.sqrt(500)


def test_the_sets_are_blocks_of_the_image() -> None:
    assert Gaussian().partition().view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert Signal().partition().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
