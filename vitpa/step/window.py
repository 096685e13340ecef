"""The training metrics of the steps since the last row, kept on the device so that no step waits for the host.

Axes: R replicas.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = 2**62  # as a step: it has not happened


class Window:
    """Sums over steps, for each of R runs that are trained together."""

    def __init__(self, replicas: int, device: torch.device) -> None:
        self.sums = torch.zeros(replicas, 3, dtype=torch.float64, device=device)  # loss * images, correct, images
        self.grad_norm = torch.zeros(replicas, device=device)  # of the newest step, before clipping
        self.bad_step = torch.full((replicas,), NEVER, device=device)  # the first whose loss or gradient was not finite

    def add(self, losses: Tensor, correct: Tensor, images: int) -> None:
        """Count a batch of `images` per run: mean losses (R,), numbers of correct predictions (R,)."""
        self.sums[:, 0] += losses.double() * images
        self.sums[:, 1] += correct
        self.sums[:, 2] += images

    def check(self, step: Tensor | int, losses: Tensor, grad_norm: Tensor) -> None:
        """Note the gradients' norms (R,), and `step` for the runs of which it is the first that is not finite."""
        finite = losses.isfinite() & grad_norm.isfinite()
        self.grad_norm.copy_(grad_norm)
        self.bad_step.copy_(torch.where(finite, self.bad_step, self.bad_step.clamp(max=step)))

    def take(self) -> Row:
        """Close the window and open the next one; the host does not wait for the device."""
        values = torch.cat([self.sums, self.grad_norm.double()[:, None], self.bad_step.double()[:, None]], dim=1)
        self.sums.zero_()
        return Row.sent(values)


@dataclass(frozen=True)
class Row:
    """Values of R runs, such as the sums of a closed window, on their way to the host."""

    values: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def sent(cls, values: Tensor) -> Row:
        """Send `values` (R, ...), a tensor that is not written to any more; the host does not wait for the device."""
        if values.device.type == "cpu":
            return cls(values, None)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(on_host, copied)

    def arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self.copied is None or self.copied.query()

    def read(self) -> Tensor:
        """The values, on the host. Waits for them. Those of a window: its sums, the gradient's norm, the bad step (R, 5)."""
        while not self.arrived():  # not Event.synchronize, which takes a whole core
            time.sleep(0.0002)
        return self.values
