"""Exact errors against other ways to compute them, and theorem 3.2's alternatives."""

from __future__ import annotations

import math

import pytest
import torch

from vitpa.theory.association import association
from vitpa.theory.data import Delta, Signal, linear_error
from vitpa.theory.descent import draw_test, errors_of
from vitpa.theory.exact import alternative, best_error, choices, noiseless_error
from vitpa.theory.model import Form, cube

PROBLEM = Signal()
FORMS = [Form(), Form(factor=10.0, temperature=10.0), Form(activation=cube)]


@pytest.mark.parametrize("delta", ["q/4", "q/2"])
def test_uniform_attention_has_the_linear_error(delta: Delta) -> None:
    """To first order in a small v; x^5 of equal values has the sign of x, too."""
    problem = Signal(delta=delta)
    assert noiseless_error(problem, Form(), torch.zeros(10, 10, dtype=torch.float64)) == pytest.approx(linear_error(problem))


@pytest.mark.parametrize(("delta", "per_cent"), [("q/4", 2.55), ("q/2", 9.06)])
def test_the_best_error_is_that_of_counting_sets(delta: Delta, per_cent: float) -> None:
    problem = Signal(delta=delta)
    both, by_hand = problem.probability**2, 0.0
    for against in range(5):
        for along in range(5 - against):
            orders = (
                math.factorial(4) // math.factorial(against) // math.factorial(along) // math.factorial(4 - against - along)
            )
            mass = orders * both ** (against + along) * (1 - 2 * both) ** (4 - against - along)
            by_hand += mass * {True: 1.0, False: 0.0}[against > 1 + along] + mass * 0.5 * (against == 1 + along)
    assert best_error(problem) == pytest.approx(by_hand, abs=1e-12)
    assert round(100 * by_hand, 2) == per_cent


def test_no_attention_is_better_than_the_best() -> None:
    random = torch.Generator().manual_seed(0)
    errors = [
        noiseless_error(PROBLEM, Form(), 3 * torch.randn(10, 10, dtype=torch.float64, generator=random)) for _ in range(5)
    ]
    assert min(errors) > best_error(PROBLEM)


@pytest.mark.parametrize("form", FORMS)
def test_transformers_that_associate_nothing_generalise_as_well(form: Form) -> None:
    """Theorem 3.2: the sets Top_C do not meet S_l, and the test error is far below the plateau."""
    own, other = (alternative(PROBLEM, shift, 10 * form.temperature) for shift in (0, 1))
    same = PROBLEM.partition()[:, None] == PROBLEM.partition()[None, :]
    assert association(own, PROBLEM.partition()).complete
    assert not same.gather(1, other.topk(PROBLEM.set_size, dim=1).indices).any()
    assert association(other, PROBLEM.partition()).share == 0
    error = noiseless_error(PROBLEM, form, other)
    assert error == pytest.approx(noiseless_error(PROBLEM, form, own), abs=1e-12)
    assert error == pytest.approx(best_error(PROBLEM), abs=2e-3)
    assert error < linear_error(PROBLEM) / 2


def test_the_exact_error_is_that_of_samples() -> None:
    problem, samples = Signal(sigma=1e-6), 40_000
    test = draw_test(problem, samples, [0], 0)
    A = alternative(problem)
    v = w = torch.eye(2, dtype=torch.float64)[:1]
    found, exact = float(errors_of(Form(), A[None], v, w, test)), noiseless_error(problem, Form(), A)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / samples))


def test_choices_are_all_and_no_more() -> None:
    sizes, mass = choices(Signal(patches=6, sets=3))
    assert len(sizes) == 3 * 3**4
    assert mass.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="up to 12 patches, not 20"):
        choices(Signal(patches=20, sets=5))
