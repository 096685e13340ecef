"""Several seeds in one step by torch.func, the way PyTorch's tutorial on model ensembling has it, as a yardstick for ours.

vmap over the stacked parameters of R modules, autocast, torch's fused AdamW on the stack, on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.loader import Feed
from vitpa.optim import make_optimizer
from vitpa.step.accumulator import MetricAccumulator


class VmapSteps:
    """Training steps of R models; `runtime.step=compile` compiles the gradients and the augmentation.

    Attention is computed step by step: under vmap the backward pass of scaled_dot_product_attention is not to be had.
    """

    def __init__(
        self, configs: Sequence[RunConfig], *, models: Sequence[nn.Module], feed: Feed, augmentation: Augmentation
    ) -> None:
        """Models of one architecture, without dropout, of runs that differ in their seeds alone."""
        self.config, self.feed, self.R = configs[0], feed, len(configs)
        self.seeds = [config.seed for config in configs]
        self.device = next(models[0].parameters()).device
        stack, _ = stack_module_state(list(models))
        self.parameters: dict[str, Tensor] = {name: value.detach() for name, value in stack.items()}
        self.optimizer = self._optimizer(models[0])
        self.module = copy.deepcopy(models[0]).to("meta")
        for module in self.module.modules():
            if hasattr(module, "fused_attn"):  # timm's
                setattr(module, "fused_attn", False)  # noqa: B010 - a tensor or a module, as nn.Module's attributes are typed
        of_all = vmap(grad(self._loss, has_aux=True), randomness="different")
        compiled = self.config.runtime.step == "compile"
        self.gradients: Any = torch.compile(of_all, dynamic=False) if compiled else of_all
        self.augmentation: Any = torch.compile(augmentation, dynamic=False) if compiled else augmentation
        self.accumulator = MetricAccumulator(self.R, self.device)
        self.keys = epoch_keys(self.seeds, 0).to(self.device)
        self.done = 0

    def _optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """That of the first model, for the parameters of all."""
        optimizer, names = make_optimizer(self.config, model), {id(value): name for name, value in model.named_parameters()}
        groups = [
            {"params": [self.parameters[names[id(value)]] for value in group["params"]], "weight_decay": group["weight_decay"]}
            for group in optimizer.param_groups
        ]
        settings = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "fused")}
        return torch.optim.AdamW(groups, **settings)

    def _loss(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of one model on its batch (B, 3, H, W): the mean loss; the same again, and the number of correct predictions."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.train.precision == "bfloat16"):
            logits: Tensor = functional_call(self.module, parameters, (images,))  # B, K
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.optim.label_smoothing)
        return loss, (loss.detach(), (logits.detach().argmax(dim=1) == labels).sum())

    def prepare(self, step: int) -> list[str]:
        """Be ready for the step after `step` steps; what is compiled is so when it is first called."""
        self.done = step
        return []

    def close(self) -> None:
        """Decode no more."""
        self.feed.close()

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order and the random numbers of `epoch`, from its step `step` on."""
        self.keys = epoch_keys(self.seeds, epoch).to(self.device)
        self.feed.begin_epoch(epoch, step)

    def load(self) -> None:
        """Put the images of the next step on the device."""
        self.feed.load()

    def step(self) -> None:
        """One optimiser step of every model."""
        images, samples, labels = self.feed.gather(*self.feed.inputs(0))
        images = self.augmentation(images, samples, self.keys.repeat_interleave(self.feed.batch_size, dim=0))
        batch = (each.view(self.R, -1, *each.shape[1:]) for each in (images, labels))
        gradients, (losses, correct) = self.gradients(self.parameters, *batch)
        norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()]).norm(dim=0)  # R
        max_norm = self.config.optim.grad_clip_norm
        factor = torch.ones_like(norms) if max_norm is None else (max_norm / (norms + 1e-6)).clamp(max=1)
        for name, value in gradients.items():
            self.parameters[name].grad = value * factor.view(-1, *[1] * (value.ndim - 1))
        self.optimizer.step()
        self.done += 1
        self.accumulator.add(losses, correct, self.feed.batch_size)
        self.accumulator.check(self.done, losses, norms)
        self.feed.advance()
