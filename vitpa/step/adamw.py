"""AdamW for the replicas of vitpa/step/step.py: all parameters of R models in one buffer, updated by one elementwise function.

torch's fused AdamW takes one replica after the other, because each has its own clipping, and a small model does not fill a
GPU: over one buffer the update runs at the speed of the memory. Its state is shown as that of torch.optim.AdamW, so that a
checkpoint is the one of a run alone.

Axes: R replicas, P parameters of a model, padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from vitpa.optim import load_moments

ALIGNMENT = 64  # parameters start at multiples of so many numbers: matrix products want 16 bytes at least


class ReplicaAdamW:
    """The parameters, gradients and moments of R models, in the order of torch's AdamW: the decayed ones first."""

    def __init__(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.AdamW], dtype: torch.dtype, max_norm: float | None
    ) -> None:
        """`dtype` is that of the products' weights, `max_norm` the largest norm of a replica's gradient (None: any).

        From now on the parameters of each model are views into `values`.
        """
        self.optimizers, self.max_norm, self.R = optimizers, max_norm, len(models)
        names = {id(parameter): name for name, parameter in models[0].named_parameters()}
        groups = optimizers[0].param_groups
        self.options = {key: groups[0][key] for key in ("betas", "eps", "weight_decay")}
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

    def factors(self, learning_rates: Float64[Tensor, " steps"]) -> Float[Tensor, "steps 3"]:
        """What an update needs of its step, from the learning rates of the whole run.

        Columns: the factor of decayed parameters, the learning rate by the bias correction of the first moment, the root of
        that of the second (Kingma & Ba 2015, section 3; Loshchilov & Hutter 2019, algorithm 2).
        """
        (beta1, beta2), numbers = self.options["betas"], torch.arange(1, len(learning_rates) + 1, dtype=torch.float64)
        decay = 1 - learning_rates * self.options["weight_decay"]
        return torch.stack([decay, learning_rates / (1 - beta1**numbers), (1 - beta2**numbers).sqrt()], dim=1).to(self.values)

    def update(self, losses: Float[Tensor, " R"], factors: Float[Tensor, " 3"]) -> Float[Tensor, " R"]:
        """Clip and apply the gradients, with the row of `factors` that belongs to the step.

        Replicas whose loss or gradient is not finite are frozen. Returns the gradients' norms, before clipping.
        """
        (beta1, beta2), eps, (decay, rate, root) = self.options["betas"], self.options["eps"], factors.unbind()
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        self.frozen |= ~(norms.isfinite() & losses.isfinite())
        scale = torch.ones_like(norms) if self.max_norm is None else (self.max_norm / (norms + 1e-6)).clamp(max=1)
        gradients = self.gradients * scale[:, None]
        first = torch.lerp(self.exp_avg, gradients, 1 - beta1)
        second = self.exp_avg_sq * beta2 + gradients * gradients * (1 - beta2)
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
