"""The step of one run on one or several processes: timm's module, DistributedDataParallel, gradient accumulation.

What vitpa/replicas.py does not do: any image size, images decoded as they are needed, stochastic depth, several GPUs.

Axes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vitpa.config import RunConfig
from vitpa.data.augment import epoch_keys
from vitpa.data.batches import Batch, eval_batches, train_batches
from vitpa.data.counter_rng import Purpose, key
from vitpa.data.resident import ResidentImages
from vitpa.data.stream import StreamedImages
from vitpa.distributed import Group
from vitpa.optim import load_moments
from vitpa.window import Window

EVAL_BATCH_SIZE = 512


class ModuleSteps:
    """Training steps and evaluation of one model."""

    def __init__(
        self,
        config: RunConfig,
        group: Group,
        *,
        model: VisionTransformer,
        optimizer: torch.optim.AdamW,
        images: Mapping[str, ResidentImages | StreamedImages],
        num_samples: Mapping[str, int],
        learning_rate: Callable[[int], float],
    ) -> None:
        """`learning_rate` is that of a step, from its number on; `images` and `num_samples` are by split."""
        self.config, self.group, self.model, self.optimizer = config, group, model, optimizer
        self.images, self.num_samples, self.learning_rate = images, num_samples, learning_rate
        self.compiles = config.runtime.step != "eager" and (config.runtime.step != "auto" or group.device.type == "cuda")
        self.forward: Any = torch.compile(model, dynamic=False) if self.compiles else model
        self.network: Any = DistributedDataParallel(self.forward) if group.world_size > 1 else self.forward
        self.window = Window(1, group.device)
        self.done = 0
        self.batches: Iterator[Batch] = iter(())
        self.keys = torch.zeros(1, max(Purpose) + 1, dtype=torch.int64, device=group.device)

    def prepare(self, step: int, epoch_steps: int) -> list[str]:
        """Be ready for the step after `step` steps; what could not be had as `runtime.step` asks."""
        self.done = step
        if isinstance(self.network, DistributedDataParallel):
            self._lay_out_buckets()
        if self.config.runtime.step == "graph":
            return ["runtime.step=graph: only for resident images on one process, without accumulation; compiled instead"]
        return []

    def _lay_out_buckets(self) -> None:
        """Let DDP settle the order in which it adds up gradients, before the first step of this attempt.

        It lays out its buckets anew after the first backward pass of a process, and with more than two processes the place
        in a bucket decides the order of a sum: without this the first step after a resume would round otherwise than in one
        go.
        """
        config, size = self.config, self.config.model.img_size
        local_batch_size = config.train.global_batch_size // (self.group.world_size * config.runtime.accum_steps)
        self.model.train()
        with self._autocast():
            logits = self.network(torch.zeros(local_batch_size, 3, size, size, device=self.group.device))  # B, K
        logits.float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order of `epoch`, from its step `step` on."""
        config, group = self.config, self.group
        indices = train_batches(
            seed=config.seed,
            epoch=epoch,
            num_samples=self.num_samples["train"],
            global_batch_size=config.train.global_batch_size,
            accum_steps=config.runtime.accum_steps,
            rank=group.rank,
            world_size=group.world_size,
            start_step=step,
        )
        self.keys.copy_(epoch_keys([config.seed], epoch))
        self.batches = self.images["train"].train_batches((micro for step in indices for micro in step), epoch)
        self.model.train()

    def step(self) -> None:
        """One optimiser step over the next `accum_steps` micro-batches."""
        config, accum_steps = self.config, self.config.runtime.accum_steps
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.learning_rate(self.done)
        for micro in range(accum_steps):
            batch = next(self.batches)
            images, labels = self.images["train"].augmentation(batch.images, batch.samples, self.keys), batch.labels
            if config.model.drop_path_rate:
                torch.manual_seed(key(config.seed, Purpose.DROP_PATH, self.done, micro, self.group.rank))
            more = isinstance(self.network, DistributedDataParallel) and micro + 1 < accum_steps
            with self.network.no_sync() if more else nullcontext():  # the processes exchange gradients once per step
                with self._autocast():
                    logits = self.network(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.optim.label_smoothing)
                (loss / accum_steps).backward()
            loss = loss.detach()[None]
            self.window.add(loss, (logits.detach().argmax(dim=1) == labels).sum()[None], len(labels))
        bound = config.optim.grad_clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if bound is None else bound).detach()
        self.window.check(self.done + 1, loss, norm[None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Sums over this process's part of the val split: cross-entropy, top-1, top-5, images; float64 (1, 4)."""
        group, num_samples = self.group, self.num_samples["val"]
        batch_size = min(EVAL_BATCH_SIZE, -(-num_samples // group.world_size))
        indices = eval_batches(num_samples=num_samples, batch_size=batch_size, rank=group.rank, world_size=group.world_size)
        sums = torch.zeros(1, 4, dtype=torch.float64, device=group.device)
        self.model.eval()
        val = self.images["val"]
        for batch in val.eval_batches(indices):
            labels = batch.labels
            with self._autocast():
                logits = self.forward(val.augmentation.normalize(batch.images))
            real = labels >= 0  # the others fill up the last batch
            loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # B, 5
            sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double(), real.sum().double()])
        return sums

    def optimizer_state(self, replica: int, step: int) -> dict[str, Any]:
        """The optimiser's state_dict()."""
        return self.optimizer.state_dict()

    def load_optimizer(self, replica: int, state: dict[str, Any]) -> None:
        """Take over such a state."""
        load_moments(self.optimizer, state)

    def freeze(self, replica: int) -> None:
        """Nothing: a run alone ends when it is not finite."""

    def _autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        bfloat16 = self.config.train.precision == "bfloat16"
        return torch.autocast(self.group.device.type, dtype=torch.bfloat16, enabled=bfloat16)
