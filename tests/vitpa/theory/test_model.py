"""The gradient that is written out against finite differences, autograd, and a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitpa.theory.model
from vitpa.theory.model import Form, cube, fifth_power, loss_and_gradients

FORMS = [Form(), Form(factor=6.0, temperature=math.sqrt(5.0)), Form(activation=cube)]
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """Of two seeds A (2, 6, 6), v (2, 5), X (2, 40, 6, 5) and y (2, 40)."""
    random = torch.Generator().manual_seed(0)
    A, v, X = (torch.randn(2, *size, dtype=torch.float64, generator=random) for size in ((6, 6), (5,), (40, 6, 5)))
    return A, v, X, torch.where(X[:, :, 0, 0] < 0, -1.0, 1.0).double()


def loss_of(form: Form, A: Tensor, v: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """The loss of one seed, patch by patch as it is defined."""
    outputs = []
    for sample in X:
        S = torch.softmax(A / form.temperature, -1)
        patches = [form.factor * sum(S[i, j] * (v @ sample[j]) for j in range(len(A))) for i in range(len(A))]
        outputs.append(sum(form.activation(patch)[0] for patch in patches))
    return F.softplus(-y * torch.stack([torch.as_tensor(output) for output in outputs])).mean()


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_autograd(form: Form, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    A, v, X, y = problem
    A.requires_grad_()
    v.requires_grad_()
    expected = torch.stack([loss_of(form, *seed) for seed in zip(A, v, X, y, strict=True)])
    of_A, of_v = torch.autograd.grad(expected.sum(), (A, v))
    of_A.diagonal(dim1=1, dim2=2).zero_()
    for samples in (1, 7, 4096):
        monkeypatch.setattr(vitpa.theory.model, "SAMPLES", samples)
        loss, grad_A, grad_v = loss_and_gradients(form, A.detach(), v.detach(), X, y)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad_A, of_A, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(grad_v, of_v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: Form, problem: Problem) -> None:
    A, v, X, y = (each[:1] for each in problem)
    _, grad_A, grad_v = loss_and_gradients(form, A, v, X, y)
    step = 1e-6

    def slope(of_A: Tensor, of_v: Tensor) -> float:
        ahead, behind = (loss_of(form, A[0] + sign * step * of_A, v[0] + sign * step * of_v, X[0], y[0]) for sign in (1, -1))
        return ((ahead - behind) / (2 * step)).item()

    for index in (0, 3):
        found = slope(torch.zeros_like(A[0]), torch.eye(5, dtype=torch.float64)[index])
        assert grad_v[0, index].item() == pytest.approx(found, rel=1e-6, abs=1e-9)
    for row, column in ((0, 1), (4, 2)):
        direction = torch.zeros_like(A[0])
        direction[row, column] = 1.0
        assert grad_A[0, row, column].item() == pytest.approx(slope(direction, torch.zeros_like(v[0])), rel=1e-6, abs=1e-9)
    assert not grad_A.diagonal(dim1=1, dim2=2).any()


def test_without_attention_the_gradient_is_that_of_the_mean_patch(problem: Problem) -> None:
    """At A = 0 each patch sees the mean, so F = D act(<v, mean X>)."""
    _, v, X, y = (each[0] for each in problem)
    A, mean = torch.zeros(1, 6, 6, dtype=torch.float64), X.mean(1)
    values, slopes = fifth_power(mean @ v)
    of_F = -y * torch.sigmoid(-y * 6 * values)
    loss, grad_A, grad_v = loss_and_gradients(Form(), A, v[None], X[None], y[None])
    assert loss.item() == pytest.approx(F.softplus(-y * 6 * values).mean().item())
    torch.testing.assert_close(grad_v[0], (of_F * 6 * slopes) @ mean / len(X))
    of_row = (of_F * slopes) @ (X @ v - (mean @ v)[:, None]) / 6 / len(X)  # the softmax's derivative, alike in all rows
    torch.testing.assert_close(grad_A[0], of_row.expand(6, 6).clone().fill_diagonal_(0))
