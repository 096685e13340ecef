"""The step of several seeds at once: R replicas of one configuration on one device, each as if it were alone.

Each replica has its own weights, order of images, augmentation, gradient clipping and optimiser state; only the arithmetic
is shared, as products batched over the replicas. On a GPU everything between two steps, from choosing the images to the
optimiser, is one CUDA graph, so that the host only says "again". A run alone is a group of one.

Axes: R replicas, B batch, N tokens, K classes, P purposes of random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

from vitpa.config import RunConfig
from vitpa.data import augment
from vitpa.data.counter_rng import Purpose, key, permutation
from vitpa.data.resident import ResidentImages
from vitpa.models.stacked import PLAIN, Operations, StackedViT
from vitpa.replica_adamw import ReplicaAdamW
from vitpa.window import Window

EVAL_BATCH_SIZE = 1000
WARM_UP_STEPS = 3  # before a graph is captured: libraries choose their algorithms and take their workspace


class ReplicaSteps:
    """Training steps and evaluation of R models over resident images. The models' parameters become views of one stack."""

    def __init__(
        self,
        config: RunConfig,
        *,
        seeds: Sequence[int],
        models: Sequence[VisionTransformer],
        optimizers: Sequence[torch.optim.AdamW],
        images: Mapping[str, ResidentImages],
        learning_rates: Tensor,
    ) -> None:
        """`learning_rates` (steps of the whole run,) float64: that of each step."""
        self.config, self.seeds, self.images = config, seeds, images
        self.device, self.R, self.B = images["train"].device, len(seeds), config.train.global_batch_size
        dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        self.network = StackedViT(
            config.model.attention,
            config.model.patch_size,
            config.model.depth,
            config.model.num_heads,
            fastest_operations(config, self.device, dtype),
        )
        self.adamw = ReplicaAdamW(models, optimizers, dtype, config.optim.grad_clip_norm)
        values = self.adamw.by_name(self.adamw.values)
        self.weights = {name: value.detach().requires_grad_() for name, value in values.items()}
        self.copies = {} if self.adamw.copies is None else self.adamw.by_name(self.adamw.copies)  # for products

        self.order = torch.zeros(self.R, len(images["train"].labels), dtype=torch.int64, device=self.device)
        self.keys = torch.zeros(self.R, max(Purpose) + 1, dtype=torch.int64, device=self.device)
        self.done = torch.zeros((), dtype=torch.int64, device=self.device)  # steps since the start of the run
        self.next = torch.zeros((), dtype=torch.int64, device=self.device)  # position in the order of the epoch
        self.learning_rate = learning_rates.tolist().__getitem__
        self.factors = self.adamw.factors(learning_rates)
        self.window = Window(self.R, self.device)
        self.eval_next = torch.zeros((), dtype=torch.int64, device=self.device)
        self.eval_sums = torch.zeros(self.R, 4, dtype=torch.float64, device=self.device)  # loss, top-1, top-5, images

        self._batch: Callable[..., Any] = self._make_batch
        self._loss: Callable[..., Any] = self._compute_loss
        self._score: Callable[..., Any] = self._compute_scores
        self._update: Callable[..., Any] = self.adamw.update
        self._run_step, self._run_evaluation = self._step, self._evaluate_batch

    @property
    def compiles(self) -> bool:
        """Whether `prepare` compiles the step."""
        step = self.config.runtime.step
        return step != "eager" and (step != "auto" or self.device.type == "cuda")

    def prepare(self, step: int, epoch_steps: int) -> list[str]:
        """Be ready for the step after `step` steps: compile and capture as `runtime.step` asks; what could not be had."""
        notes: list[str] = []
        captured = self.config.runtime.step in ("auto", "graph") and self.device.type == "cuda"
        if self.config.runtime.step == "graph" and not captured:
            notes.append("runtime.step=graph: a CPU has no CUDA graphs; compiled instead")
        self.adamw.copy_values()
        self.begin_epoch(min(step, len(self.factors) - 1) // epoch_steps, 0)
        if self.compiles:
            compiled = partial(torch.compile, dynamic=False, fullgraph=True)
            eager = self._batch, self._loss, self._score, self._update
            self._batch, self._loss, self._score, self._update = map(compiled, eager)
            try:
                self._leaving_no_trace(self._step)
                self._leaving_no_trace(self._evaluate_batch)
            except TorchDynamoException as error:
                notes.append(f"the step could not be compiled ({_first_line(error)}); it runs uncompiled")
                self._batch, self._loss, self._score, self._update = eager
                captured = False
        if captured:
            try:
                self._run_step = self._leaving_no_trace(self._captured, self._step)
                self._run_evaluation = self._leaving_no_trace(self._captured, self._evaluate_batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                notes.append(f"no CUDA graph of the step could be made ({_first_line(error)}); it runs without")
                self._run_step, self._run_evaluation = self._step, self._evaluate_batch
        self.done.fill_(step)
        return notes

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order and the random numbers of `epoch`, from its step `step` on."""
        for replica, seed in enumerate(self.seeds):
            self.order[replica] = permutation(key(seed, Purpose.ORDER, epoch), self.order.shape[1], self.device)
        self.keys.copy_(augment.epoch_keys(self.seeds, epoch))
        self.next.fill_(step * self.B)

    def step(self) -> None:
        """One optimiser step of every replica; returns before the device has done it."""
        self._run_step()

    def optimizer_state(self, replica: int, step: int) -> dict[str, Any]:
        """The optimiser's state of a replica after `step` steps, as torch.optim.AdamW's state_dict()."""
        return self.adamw.state_dict(replica, step)

    def load_optimizer(self, replica: int, state: dict[str, Any]) -> None:
        """Take over such a state."""
        self.adamw.load_state_dict(replica, state)

    def freeze(self, replica: int) -> None:
        """Leave the weights and optimiser state of a replica as they are from now on."""
        self.adamw.frozen[replica] = True

    def evaluate(self) -> Tensor:
        """Sums over the val split, every image once: cross-entropy, top-1, top-5, images; float64 (R, 4)."""
        self.eval_next.zero_()
        self.eval_sums.zero_()
        for _ in range(0, len(self.images["val"].labels), self._eval_batch_size()):
            self._run_evaluation()
        return self.eval_sums

    def _step(self) -> None:
        images, labels = self._batch(self.order, self.next, self.keys)
        losses, correct = self._loss(self.weights, self.copies, images, labels)
        self.adamw.take_gradients(torch.autograd.grad(losses.sum(), list(self.weights.values())))
        losses = losses.detach()
        norms = self._update(losses, self.factors.index_select(0, self.done.view(1))[0])
        self.done += 1
        self.window.check(self.done, losses, norms)
        self.window.add(losses, correct, self.B)
        self.next += self.B

    def _make_batch(self, order: Tensor, first: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The next images (R, B, 3, H, W), augmented and normalised, and their labels (R, B)."""
        images = self.images["train"]
        columns = first + torch.arange(self.B, device=self.device)
        samples = order.index_select(1, columns).flatten()  # R*B
        batch = images.augmentation(images.images[samples], samples, keys.repeat_interleave(self.B, dim=0))
        return batch.view(self.R, self.B, *batch.shape[1:]), images.labels[samples].view(self.R, self.B)

    def _compute_loss(
        self, weights: Mapping[str, Tensor], copies: Mapping[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean loss (R,) and number of correct predictions (R,)."""
        logits = self.network(weights, copies, images).float()  # R, B, K
        smoothing = self.config.optim.label_smoothing
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="none")
        return losses.view(labels.shape).mean(1), (logits.detach().argmax(2) == labels).sum(1)

    def _evaluate_batch(self) -> None:
        with torch.no_grad():
            self.eval_sums += self._score(self.weights, self.copies, self.eval_next)
            self.eval_next += self._eval_batch_size()

    def _eval_batch_size(self) -> int:
        return min(EVAL_BATCH_SIZE, len(self.images["val"].labels))

    def _compute_scores(self, weights: Mapping[str, Tensor], copies: Mapping[str, Tensor], first: Tensor) -> Tensor:
        """Sums over the val images from `first` on: cross-entropy, top-1, top-5, images; float64 (R, 4)."""
        val = self.images["val"]
        samples = first + torch.arange(self._eval_batch_size(), device=self.device)
        real = samples < len(val.labels)  # the others fill up the last batch
        samples = torch.where(real, samples, 0)
        images = val.augmentation.normalize(val.images[samples])
        logits = self.network(weights, copies, images.expand(self.R, *images.shape)).float()  # R, B, K
        labels = val.labels[samples]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(self.R), reduction="none").view(self.R, -1)
        hits = (logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None]) & real[:, None]  # R, B, 5
        images_counted = real.double().sum().expand(self.R)
        loss = torch.where(real, losses, 0).double().sum(1)
        return torch.stack([loss, hits[:, :, 0].sum(1).double(), hits.sum((1, 2)).double(), images_counted], dim=1)

    def _leaving_no_trace(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function`, and put everything that a step or an evaluation changes back as it was."""
        changed = [*self.adamw.state_tensors(), self.done, self.next, self.eval_next, self.eval_sums]
        changed += [self.window.sums, self.window.grad_norm, self.window.bad_step]
        kept = [tensor.clone() for tensor in changed]
        try:
            return function(*arguments)
        finally:
            for tensor, before in zip(changed, kept, strict=True):
                tensor.copy_(before)
            self.adamw.copy_values()

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of `function`."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                for position in (self.done, self.next, self.eval_next):  # an epoch may have fewer steps
                    position.zero_()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


def fastest_operations(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Our kernels for a GPU (from Ampere on) that take the sizes of `config`, first those for few tokens, else plain."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    # Here, as Triton is needed on a GPU only.
    from vitpa.kernels import attention, gelu, mixing, norm, tiled_attention, tiled_mixing  # noqa: PLC0415

    model = config.model
    tokens, head_dim = (model.img_size // model.patch_size) ** 2 + 1, model.embed_dim // model.num_heads
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    attend = PLAIN.attention if tiled_attention.unfit(tokens, head_dim, shared_memory) else tiled_attention.tiled_attention
    mix = PLAIN.mix if tiled_mixing.unfit(head_dim) else tiled_mixing.tiled_mix
    return Operations(
        attention=attend if attention.unfit(tokens, head_dim) else attention.attention,
        mix=mix if mixing.unfit(tokens, head_dim) else mixing.mix,
        add_norm=PLAIN.add_norm if norm.unfit(model.embed_dim) else norm.add_norm,
        bias_gelu=gelu.bias_gelu,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
