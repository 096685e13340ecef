"""Model (T): one head of attention that depends on positions alone, one value vector, and its gradient written out.

F(X) = sum_i act(c sum_j S_ij <v, X_j>), S = the softmax of each row of A / s. In the paper c = D and s = sqrt(d); in the code
both are 1. Trained are v and the entries of A off its diagonal. Jelassi, Sander, Li 2022, section 4. Axes: N samples, D
patches, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 1 << 22  # of X at a time: what is read once stays in the cache for the second product

Activation = Callable[[Tensor], tuple[Tensor, Tensor]]  # its values and derivatives


def fifth_power(x: Tensor) -> tuple[Tensor, Tensor]:
    """x^5 + 0.03 x, as in the code, and its derivative."""
    fourth = x**4
    return x * fourth + 0.03 * x, 5 * fourth + 0.03


def cube(x: Tensor) -> tuple[Tensor, Tensor]:
    """x^3 and its derivative."""
    return x**3, 3 * x**2


@dataclass(frozen=True)
class Form:
    """What the paper's text and the code do not agree on, and the activation.

    Attributes:
        factor: c: D in the text, 1 in the code.
        temperature: s: sqrt(d) in the text, 1 in the code.
        activation: Of a patch's value.
    """

    factor: float = 1.0
    temperature: float = 1.0
    activation: Activation = fifth_power

    def attention(self, A: Tensor) -> Tensor:
        """S (D, D) of A (D, D)."""
        return torch.softmax(A / self.temperature, dim=-1)

    def outputs(self, A: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """F (N,) of A (D, D), v (d,) and X (N, D, d)."""
        return self.activation(self.factor * (X @ v) @ self.attention(A).T)[0].sum(1)


def loss_and_gradients(form: Form, A: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """The mean logistic loss log(1 + exp(-y F)) and its gradients with respect to A and v.

    The diagonal of A is not trained: there the gradient is 0. X is read once, in pieces that fit into a cache.

    Args:
        form: Of the model.
        A: (D, D).
        v: (d,).
        X: (N, D, d).
        y: (N,), -1 or 1.
    """
    N, D, d = X.shape
    S = form.attention(A)
    loss, of_S, of_v = torch.zeros((), dtype=X.dtype), torch.zeros_like(S), torch.zeros_like(v)
    for X_part, y_part in zip(*(each.split(max(CHUNK_BYTES // (D * d * 8), 1)) for each in (X, y)), strict=True):
        z = X_part @ v  # (n, D)
        values, slopes = form.activation(form.factor * z @ S.T)
        margin = y_part * values.sum(1)
        loss += F.softplus(-margin).sum()
        of_u = (-y_part * torch.sigmoid(-margin) * form.factor / N)[:, None] * slopes  # of c sum_j S_ij z_j, times c
        of_S += of_u.T @ z
        of_v += X_part.reshape(-1, d).T @ (of_u @ S).reshape(-1)
    of_A = S * (of_S - (of_S * S).sum(1, keepdim=True)) / form.temperature
    return float(loss) / N, of_A.fill_diagonal_(0.0), of_v
