"""Data of several seeds, test errors in a plane, and the learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from vitpa.theory.data import Gaussian, Signal
from vitpa.theory.descent import draw, draw_test, errors_of, learning_rate, small_weights
from vitpa.theory.model import Form, cube


@pytest.mark.parametrize(
    ("problem", "form"),
    [
        (Signal(dim=30, sigma=0.3), Form()),
        (Signal(dim=30, sigma=0.3, project_noise=True), Form()),
        (Gaussian(dim=5), Form(activation=cube)),
    ],
)
def test_two_dimensions_know_the_test_error_in_all(problem: Signal | Gaussian, form: Form) -> None:
    samples = 20_000
    data, random = draw(problem, samples, [3], 0), torch.Generator().manual_seed(1)
    A = torch.randn(1, problem.patches, problem.patches, dtype=torch.float64, generator=random)
    v = data.w + 0.3 * torch.randn(1, problem.dim, dtype=torch.float64, generator=random)
    everywhere = (form.outputs(A, v, data.X) * data.y < 0).double().mean().item()
    in_plane = errors_of(form, A, v, data.w, draw_test(problem, samples, [3], 1)).item()
    assert 0.05 < everywhere < 0.45
    assert in_plane == pytest.approx(everywhere, abs=4 * math.sqrt(2 * everywhere / samples))


def test_a_seed_has_its_data_and_weights_whoever_is_beside_it() -> None:
    problem = Signal(patches=6, sets=3, dim=7)
    for alone, among in (
        (draw(problem, 9, [4], 0), draw(problem, 9, [3, 4], 0)),
        (draw_test(problem, 9, [4], 0), draw_test(problem, 9, [3, 4], 0)),
    ):
        assert torch.equal(alone.X[0], among.X[1])
        assert torch.equal(alone.y[0], among.y[1])
        assert not torch.equal(among.X[0], among.X[1])
    weights = small_weights([3, 4], 6, 7, diagonal=1.5)
    assert torch.equal(small_weights([4], 6, 7, diagonal=1.5)["A"][0], weights["A"][1])
    assert weights["A"].diagonal(dim1=1, dim2=2).eq(1.5).all()


def test_the_learning_rate_follows_the_time() -> None:
    assert [learning_rate(time, 0.01, 1.0) for time in (0, 0.1, 0.2, 1, 10, 20, 300)] == pytest.approx(
        [0.01, 0.01, 0.01, 0.05, 0.5, 1.0, 1.0]
    )
    assert {learning_rate(time, 0.1, 0.1) for time in (0, 1, 100)} == {0.1}
