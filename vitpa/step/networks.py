"""The networks of a step and of an evaluation: one call for all replicas, with the weights as the optimiser holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitpa.config import RunConfig
from vitpa.models.resampling import resampling_matrix
from vitpa.models.resnet import OneNetwork
from vitpa.models.stacked import StackedViT
from vitpa.step.operations import choose_operations

Network = StackedViT | OneNetwork


class Networks:
    """How the models of replicas of one configuration are called, which depends on the size of the images.

    Models that are no ViTs are called one by one, so that there is one.

    Attributes:
        copies_dtype: Of the copies of the weights that enter products; that of the weights: there are none.
        buffers: What a training step changes.
        notes: What the user should know of the networks that have been asked for.
    """

    def __init__(self, config: RunConfig, models: Sequence[nn.Module], *, device: torch.device, num_images: int) -> None:
        """`num_images` are those of a step, of all replicas."""
        self.config, self.models, self.device, self.num_images = config, models, device, num_images
        self.products = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        self.copies_dtype, self.buffers = self.products, list[Tensor]()
        self.notes: list[str] = []
        self._vits: dict[int, StackedViT] = {}
        if config.model.kind != "vit":
            (model,) = models
            torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in the products of a ViT
            self.copies_dtype, self.buffers = torch.float32, list(model.buffers())

    def train(self, img_size: int) -> Network:
        """The network in training, for images of `img_size` pixels."""
        return self._vit(img_size) if self.config.model.kind == "vit" else self._module(training=True)

    def evaluate(self) -> Network:
        """The network in evaluation, for images of the model's size; a ViT does the same in both."""
        return self._vit(self.config.model.img_size) if self.config.model.kind == "vit" else self._module(training=False)

    def _module(self, *, training: bool) -> OneNetwork:
        return OneNetwork(self.models[0], training, self.products)

    def _vit(self, img_size: int) -> StackedViT:
        if img_size not in self._vits:
            model = self.config.model.model_copy(update={"img_size": img_size})
            operations, notes = choose_operations(
                model,
                device=self.device,
                dtype=self.products,
                num_images=self.num_images,
                torch_operations=self.config.runtime.torch_operations,
            )
            self.notes += [note for note in notes if note not in self.notes]
            sizes, resampling = (model.patch_size, model.depth, model.num_heads), None
            if img_size != self.config.model.img_size:
                sides = (px // model.patch_size for px in (self.config.model.img_size, img_size))
                resampling = resampling_matrix(*sides).to(self.device)
            self._vits[img_size] = StackedViT(model.attention, *sizes, operations, model.global_pool, resampling)
        return self._vits[img_size]
