"""The training metrics of the steps since the last row, kept on the device so that no step waits for the host.

Axes: R replicas.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

NEVER = 2**62  # as a step: it has not happened


class MetricAccumulator:
    """Sums over steps, for each of R runs that are trained together."""

    def __init__(self, replicas: int, device: torch.device) -> None:
        self.sums = torch.zeros(replicas, 3, dtype=torch.float64, device=device)  # loss * images, correct, images
        self.grad_norm = torch.zeros(replicas, device=device)  # of the newest step, before clipping
        self.first_nonfinite_step = torch.full((replicas,), NEVER, device=device)  # by its loss or its gradient

    def add(self, losses: Float[Tensor, " R"], correct: Int64[Tensor, " R"], images: int) -> None:
        """Count a batch of `images` per run: mean losses, numbers of correct predictions."""
        self.sums[:, 0] += losses.double() * images
        self.sums[:, 1] += correct
        self.sums[:, 2] += images

    def check(self, step: Int64[Tensor, ""] | int, losses: Float[Tensor, " R"], grad_norm: Float[Tensor, " R"]) -> None:
        """Note the gradients' norms, and `step` for the runs of which it is the first that is not finite."""
        finite = losses.isfinite() & grad_norm.isfinite()
        self.grad_norm.copy_(grad_norm)
        first = self.first_nonfinite_step
        first.copy_(torch.where(finite, first, first.clamp(max=step)))

    def take(self) -> AsyncHostCopy:
        """Copy what a row is made of to the host, and sum from zero again; the host does not wait for the device.

        Returns:
            (R, 5) float64: the three sums, the norm of the newest gradient, the first step that was not finite, or NEVER.
        """
        others = self.grad_norm.double(), self.first_nonfinite_step.double()
        values = torch.cat([self.sums, torch.stack(others, dim=1)], dim=1)
        self.sums.zero_()
        return AsyncHostCopy.start(values)


@dataclass(frozen=True)
class AsyncHostCopy:
    """Values on their way from the device to the host."""

    values: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def start(cls, values: Tensor) -> AsyncHostCopy:
        """Begin to copy `values`, a tensor that is not written to any more; the host does not wait for the device."""
        if values.device.type == "cpu":
            return cls(values, None)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(on_host, copied)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self.copied is None or self.copied.query()

    def result(self) -> Tensor:
        """The values, on the host; waits for them."""
        while not self.done():  # not Event.synchronize, which takes a whole core
            time.sleep(0.0002)
        return self.values
