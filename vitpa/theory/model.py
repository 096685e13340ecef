"""Model (T): one head of attention that depends on positions alone, one value vector, and its gradient written out.

F(X) = sum_i act(c sum_j S_ij <v, X_j>), S = the softmax of each row of A / s. In the paper c = D and s = sqrt(d); in the code
both are 1. Trained are v and the entries of A off its diagonal. Jelassi, Sander, Li 2022, section 4. Axes: R seeds, N
samples, D patches, d dimensions; seeds are computed side by side and know nothing of one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLES = 4096  # at a time, so that what is between two products stays small

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
        """S (R, D, D) of A (R, D, D)."""
        return torch.softmax(A / self.temperature, dim=-1)

    def outputs(self, A: Tensor, v: Tensor, X: Tensor) -> Tensor:
        """F (R, N) of A (R, D, D), v (R, d) and X (R, N, D, d)."""
        return self.activation(self.factor * patch_values(X, v) @ self.attention(A).mT)[0].sum(-1)


def patch_values(X: Tensor, v: Tensor) -> Tensor:
    """<v, X_j>: (R, N, D) of X (R, N, D, d) and v (R, d)."""
    return torch.stack([samples @ each for samples, each in zip(X, v, strict=True)])


Gradients = Callable[[Form, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def loss_and_gradients(form: Form, A: Tensor, v: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean logistic loss log(1 + exp(-y F)) of each seed (R,) and its gradients with respect to A and v.

    The diagonal of A is not trained: there the gradient is 0.

    Args:
        form: Of the model.
        A: (R, D, D).
        v: (R, d).
        X: (R, N, D, d).
        y: (R, N), -1 or 1.
    """
    R, N, _, d = X.shape
    S = form.attention(A)
    loss, of_S, of_v = torch.zeros(R, dtype=X.dtype), torch.zeros_like(S), torch.zeros_like(v)
    for X_part, y_part in zip(X.split(SAMPLES, 1), y.split(SAMPLES, 1), strict=True):
        z = patch_values(X_part, v)  # (R, n, D)
        values, slopes = form.activation(form.factor * z @ S.mT)
        margin = y_part * values.sum(-1)
        loss += F.softplus(-margin).sum(-1)
        of_u = (-y_part * torch.sigmoid(-margin) * form.factor / N)[..., None] * slopes  # of c sum_j S_ij z_j, times c
        of_S += of_u.mT @ z
        of_v += torch.bmm((of_u @ S).view(R, 1, -1), X_part.reshape(R, -1, d))[:, 0]
    of_A = S * (of_S - (of_S * S).sum(-1, keepdim=True)) / form.temperature
    of_A.diagonal(dim1=-2, dim2=-1).zero_()
    return loss / N, of_A, of_v
