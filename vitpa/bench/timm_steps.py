"""The usual way to train a ViT, as the yardstick: timm's module, autocast, autograd and torch's fused AdamW, on one device."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.loader import Feed
from vitpa.step.accumulator import MetricAccumulator


class TimmSteps:
    """Training steps of one model; `runtime.step=compile` compiles the module and the augmentation."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: VisionTransformer,
        optimizer: torch.optim.AdamW,
        feed: Feed,
        augmentation: Augmentation,
    ) -> None:
        """`optimizer` has the learning rate of all steps."""
        self.config, self.model, self.optimizer, self.feed = config, model, optimizer, feed
        device = model.pos_embed.device
        self.device_type = device.type
        compiled = config.runtime.step == "compile"
        self.network: Any = torch.compile(model, dynamic=False) if compiled else model
        self.augmentation: Any = torch.compile(augmentation, dynamic=False) if compiled else augmentation
        self.accumulator = MetricAccumulator(1, device)
        self.keys = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.done = 0

    def prepare(self, step: int) -> list[str]:
        """Be ready for the step after `step` steps; the module is compiled when it is first called."""
        self.done = step
        self.model.train()
        return []

    def close(self) -> None:
        """Decode no more."""
        self.feed.close()

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order and the random numbers of `epoch`, from its step `step` on."""
        self.keys = epoch_keys([self.config.seed], epoch).to(self.keys.device)
        self.feed.begin_epoch(epoch, step)

    def load(self) -> None:
        """Put the images of the next step on the device."""
        self.feed.load()

    def step(self) -> None:
        """One optimiser step."""
        images, samples, labels = self.feed.gather(*self.feed.inputs(0))
        images = self.augmentation(images, samples, self.keys)
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.config.train.precision == "bfloat16"):
            logits: Tensor = self.network(images)  # B, K
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.optim.label_smoothing)
        loss.backward()
        max_norm = self.config.optim.grad_clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if max_norm is None else max_norm).detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        loss = loss.detach()[None]
        self.accumulator.add(loss, (logits.detach().argmax(dim=1) == labels).sum()[None], len(labels))
        self.accumulator.check(self.done, loss, norm[None])
        self.feed.advance()
