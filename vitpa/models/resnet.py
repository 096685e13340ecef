"""timm's ResNet-18 for small images: the baseline that relies on which pixels are neighbours.

He et al. 2016 (arXiv 1512.03385), with the stem that is usual for images of 32 pixels: a 3x3 convolution with stride 1 and no
pooling, where timm's for ImageNet has a 7x7 one with stride 2 and pooling after it.

Axes: R replicas, B batch, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.func import functional_call

BLOCKS = (2, 2, 2, 2)  # of each stage; from the second on, a stage halves height and width
CHANNELS = (64, 128, 256, 512)


def resnet18(num_classes: int) -> ResNet:
    """Images (B, 3, H, W) of any size -> logits (B, num_classes); initialised as timm does it."""
    model = ResNet(BasicBlock, BLOCKS, channels=CHANNELS, num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


@dataclass(frozen=True)
class OneNetwork:
    """A module as a network of one replica, called as StackedViT is; its buffers stay its own.

    Attributes:
        module: The network.
        training: Whether batch norm takes the statistics of the batch, and adds them to its running ones, or takes those.
        products: The type in which `torch.autocast` has products computed.
        forward: Compiled.
    """

    module: nn.Module
    training: bool
    products: torch.dtype
    forward: Callable[..., Any] | None = None

    def __call__(
        self,
        weights: Mapping[str, Float[Tensor, "1 ..."]],
        copies: Mapping[str, Tensor],
        images: Float[Tensor, "1 B 3 H W"],
        scales: Tensor | None = None,
    ) -> Float[Tensor, "1 B K"]:
        """Images -> logits. `weights` are the parameters by their names; there are neither copies nor scales of branches."""
        assert not copies and scales is None
        self.module.train(self.training)
        logits: Tensor = (self.forward or self._forward)(dict(weights), images)
        return logits

    def compiled(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> OneNetwork:
        """The same network, compiled by `compiler`."""
        return replace(self, forward=compiler(self._forward))

    def _forward(self, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        own = {name: weight.squeeze(0) for name, weight in weights.items()}
        # no cache: it would keep the weights of another step, and the gradients' graph with them
        with torch.autocast(images.device.type, self.products, enabled=self.products != torch.float32, cache_enabled=False):
            logits: Tensor = functional_call(self.module, own, (images.squeeze(0),))
        return logits[None]
