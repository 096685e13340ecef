"""The networks of a step and of an evaluation: one call for all replicas, with the weights as the optimiser holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitpa.config import RunConfig
from vitpa.models.resnet import OneNetwork
from vitpa.models.stacked import StackedViT
from vitpa.step.operations import choose_operations

Network = StackedViT | OneNetwork


class Networks(NamedTuple):
    """How the models are called."""

    train: Network
    evaluate: Network  # the same where a network does the same in both
    copies_dtype: torch.dtype  # of the copies of the weights that enter products; that of the weights: there are none
    buffers: list[Tensor]  # that a training step changes
    notes: list[str]  # what the user should know

    @staticmethod
    def of(config: RunConfig, models: Sequence[nn.Module], *, device: torch.device, num_images: int) -> Networks:
        """Those of replicas of one configuration, for `num_images` images of a step, of all replicas.

        Models that are no ViTs are called one by one, so that there is one.
        """
        products = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        if config.model.kind != "vit":
            (model,) = models
            torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in the products of a ViT
            train, evaluate = (OneNetwork(model, training, products) for training in (True, False))
            return Networks(train, evaluate, torch.float32, list(model.buffers()), [])
        operations, notes = choose_operations(config.model, device=device, dtype=products, num_images=num_images)
        sizes = config.model.patch_size, config.model.depth, config.model.num_heads
        network = StackedViT(config.model.attention, *sizes, operations, config.model.global_pool)
        return Networks(network, network, products, [], notes)
