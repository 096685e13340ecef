"""AdamW for the replicas of vitpa/step/step.py: all parameters of R models in one buffer, updated by one elementwise function.

torch's fused AdamW takes one replica after the other, because each has its own clipping, and a small model does not fill a
GPU: over one buffer the update runs at the speed of the memory. Each replica has the settings of its own optimiser. Its state
is shown as that of torch.optim.AdamW, so that a checkpoint is the one of a run alone.

Axes: R replicas, P parameters of a model, padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from vitpa.optim import load_moments
from vitpa.per_replica import Setting, setting

ALIGNMENT = 64  # parameters start at multiples of so many numbers: matrix products want 16 bytes at least


class ReplicaAdamW:
    """The parameters, gradients and moments of R models, in the order of torch's AdamW: the decayed ones first."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.AdamW],
        dtype: torch.dtype,
        max_norms: Sequence[float | None],
    ) -> None:
        """`dtype` is that of the products' weights, `max_norms` the largest norms of the replicas' gradients (None: any).

        From now on the parameters of each model are views into `values`.
        """
        self.optimizers, self.R = optimizers, len(models)
        names = {id(parameter): name for name, parameter in models[0].named_parameters()}
        groups = optimizers[0].param_groups
        self.spans: dict[str, tuple[int, torch.Size]] = {}  # where a parameter starts, and its shape
        end = 0
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                self.spans[names[id(parameter)]] = end, parameter.shape
                end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if number == 0:
                self.decayed = end
        like = next(models[0].parameters())
        self.values, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(self.R, end, dtype=like.dtype, device=like.device) for _ in range(3)
        )
        self.shared = torch.zeros(self.R * (end + 1), dtype=like.dtype, device=like.device)  # what processes add up, at once
        self.gradients, self.losses = self.shared[: self.R * end].view(self.R, end), self.shared[self.R * end :]  # R, P; R
        for replica, model in enumerate(models):
            for name, view in self.of_replica(self.values, replica).items():
                parameter = model.get_parameter(name)
                view.copy_(parameter.detach())
                parameter.data = view
        self.copies = None if dtype == like.dtype else self.values.to(dtype)
        self.frozen = torch.zeros(self.R, dtype=torch.bool, device=like.device)  # these replicas are not updated any more
        own = [optimizer.param_groups[0] for optimizer in optimizers]
        self.betas = tuple(setting([each["betas"][index] for each in own]) for index in (0, 1))
        self.weight_decay, eps = (setting([each[key] for each in own]) for key in ("weight_decay", "eps"))
        norms = setting([math.inf if norm is None else norm for norm in max_norms])
        first, second = self.betas
        self._rows = tuple(self._on_rows(each) for each in (norms, 1 - first, second, 1 - second, eps))
        self._gradients_by_replica = [view for r in range(self.R) for view in self.of_replica(self.gradients, r).values()]
        self._show_state(0)

    def of_replica(self, buffer: Float[Tensor, "R P"], replica: int) -> dict[str, Tensor]:
        """What `buffer` holds of each parameter of one model, by name."""
        return {name: view[replica] for name, view in self.by_name(buffer).items()}

    def by_name(self, buffer: Float[Tensor, "R P"]) -> dict[str, Tensor]:
        """What `buffer` holds of each parameter, by name: views (R, ...)."""
        return {name: buffer[:, at : at + shape.numel()].unflatten(1, shape) for name, (at, shape) in self.spans.items()}

    def take_gradients(self, gradients: Iterable[Float[Tensor, "R ..."]], *, add: bool = False) -> None:
        """Copy the gradients of all parameters, in the order of `spans`, into the buffer, or add them to it."""
        by_parameter = list(gradients)
        by_replica = [gradient[replica] for replica in range(self.R) for gradient in by_parameter]
        if add:
            torch._foreach_add_(self._gradients_by_replica, by_replica)
        else:
            torch._foreach_copy_(self._gradients_by_replica, by_replica)

    def copy_values(self) -> None:
        """Bring the copies for products up to date."""
        if self.copies is not None:
            self.copies.copy_(self.values)

    def _on_rows(self, value: Setting) -> Setting:
        """A setting as it meets the buffers (R, P): a number as it is, or (R, 1)."""
        return value.to(self.values)[:, None] if isinstance(value, Tensor) else value

    def factors(self, learning_rates: Float64[Tensor, " steps #R"]) -> Float[Tensor, "steps 3 #R 1"]:
        """What an update needs of its step, from the learning rates of the whole run, of all replicas or of each.

        Columns: the factor of decayed parameters, the learning rate by the bias correction of the first moment, the root of
        that of the second (Kingma & Ba 2015, section 3; Loshchilov & Hutter 2019, algorithm 2).
        """
        (beta1, beta2), numbers = self.betas, torch.arange(1, len(learning_rates) + 1, dtype=torch.float64)[:, None]
        decay = 1 - learning_rates * self.weight_decay
        columns = torch.broadcast_tensors(decay, learning_rates / (1 - beta1**numbers), (1 - beta2**numbers).sqrt())
        return torch.stack(columns, dim=1)[..., None].to(self.values)

    def update(self, losses: Float[Tensor, " R"], factors: Float[Tensor, " 3 #R 1"]) -> Float[Tensor, " R"]:
        """Clip and apply the gradients, with the row of `factors` that belongs to the step.

        Replicas whose loss or gradient is not finite are frozen. Returns the gradients' norms, before clipping.
        """
        (max_norm, rest1, beta2, rest2, eps), (decay, rate, root) = self._rows, factors.unbind()
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        self.frozen |= ~(norms.isfinite() & losses.isfinite())
        gradients = self.gradients * (max_norm / (norms + 1e-6)[:, None]).clamp(max=1)
        first = torch.lerp(self.exp_avg, gradients, rest1)
        second = self.exp_avg_sq * beta2 + gradients * gradients * rest2
        columns = torch.arange(self.values.shape[1], device=self.values.device)
        kept = torch.where(columns < self.decayed, decay, 1.0)
        values = self.values * kept - rate * first / (second.sqrt() / root + eps)
        frozen = self.frozen[:, None]
        self.values.copy_(torch.where(frozen, self.values, values))
        self.exp_avg.copy_(torch.where(frozen, self.exp_avg, first))
        self.exp_avg_sq.copy_(torch.where(frozen, self.exp_avg_sq, second))
        self.copy_values()
        return norms

    def state_tensors(self) -> list[Tensor]:
        """Everything that an update changes and a checkpoint holds."""
        return [self.values, self.exp_avg, self.exp_avg_sq, self.frozen]

    def state_dict(self, replica: int, step: int) -> dict[str, Any]:
        """The state of one replica after `step` steps, as torch.optim.AdamW gives it; a copy."""
        self._show_state(step)
        state = self.optimizers[replica].state_dict()
        own = {number: {key: value.clone() for key, value in each.items()} for number, each in state["state"].items()}
        return {"state": own, "param_groups": state["param_groups"]}

    def load_state_dict(self, replica: int, state: dict[str, Any]) -> None:
        """Take over the moments of one replica from the state_dict() of a torch.optim.AdamW."""
        optimizer = self.optimizers[replica]
        load_moments(optimizer, state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for parameter, view in zip(parameters, self.of_replica(buffer, replica).values(), strict=True):
                view.copy_(optimizer.state[parameter][key])
        self._show_state(0)

    def _show_state(self, step: int) -> None:
        """Let the optimisers show our buffers as their state, after `step` steps."""
        for replica, optimizer in enumerate(self.optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = (self.of_replica(buffer, replica).values() for buffer in (self.exp_avg, self.exp_avg_sq))
            for parameter, first, second in zip(parameters, *moments, strict=True):
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
