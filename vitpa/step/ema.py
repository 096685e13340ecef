"""An exponential moving average (EMA) of the weights of vitpa/step/step.py's replicas, evaluated beside them.

As timm's ModelEmaV3 with its warm-up: the decay rises from 0, so that short runs do not keep the first weights.

Axes: R replicas, P parameters of a model, padded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vitpa.step.adamw import ReplicaAdamW

WARM_UP_POWER = 2 / 3  # timm's


def decays(decay: float, steps: int) -> Float64[Tensor, " steps"]:
    """That of each step of the whole run: min(decay, 1 - (1 + step)^(-2/3)); step 0 takes the weights as they are."""
    return (1 - (1 + torch.arange(steps, dtype=torch.float64)) ** -WARM_UP_POWER).clamp(max=decay)


class WeightAverage:
    """The average of the weights that `adamw` holds, in a buffer like its own."""

    def __init__(self, adamw: ReplicaAdamW, decay: float, steps: int) -> None:
        """`steps` are those of the whole run."""
        self.adamw, self.values = adamw, adamw.values.clone()  # R, P
        self.shares = (1 - decays(decay, steps)).to(self.values)  # of the weights in the average, by step
        # as the weights themselves are called with, so that a compiler need not take the network anew
        self.weights = {name: value.detach().requires_grad_() for name, value in adamw.by_name(self.values).items()}
        self.rounded = None if adamw.copies is None else self.values.to(adamw.copies.dtype)
        self.copies = {} if self.rounded is None else adamw.by_name(self.rounded)  # for products

    def update(self, done: Int64[Tensor, ""]) -> None:
        """Take in the weights of the step after `done` steps; replicas that are frozen stay as they are."""
        average = torch.lerp(self.values, self.adamw.values, self.shares.index_select(0, done.view(1)))
        self.values.copy_(torch.where(self.adamw.frozen[:, None], self.values, average))

    def copy_values(self) -> None:
        """Bring the copies for products up to date."""
        if self.rounded is not None:
            self.rounded.copy_(self.values)

    def state(self, replica: int) -> dict[str, Tensor]:
        """The average of one replica's parameters, by name: views."""
        return self.adamw.of_replica(self.values, replica)

    def load(self, replica: int, state: Mapping[str, Tensor]) -> None:
        """Take over such a state."""
        for name, view in self.state(replica).items():
            view.copy_(state[name])
