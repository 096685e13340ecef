"""The training step and the evaluation: of one run on one or several processes, or of several runs on one device.

R replicas are trained as if each were alone: with its own weights, order of images, augmentation, settings (those that
vitpa/together.py names) and optimiser state; only the arithmetic is shared, as products batched over the replicas. On one GPU
everything between two steps, from choosing or augmenting the images to the optimiser, is one CUDA graph, so that the host
only says "again". Several processes share the batches of a run and add up their gradients, once per step, in one buffer:
between two graphs, since with NCCL inside of one a process did not end.

Axes: R replicas, B images of a replica in a micro-batch of this process, N tokens, K classes, P purposes of random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.loader import Feed, StreamedFeed
from vitpa.data.rng import Purpose
from vitpa.distributed import Group
from vitpa.per_replica import setting
from vitpa.step.accumulator import MetricAccumulator
from vitpa.step.adamw import ReplicaAdamW
from vitpa.step.batches import EvalBatches, TrainBatches, kept_branches
from vitpa.step.ema import WeightAverage
from vitpa.step.functions import EvalFunctions, StepFunctions, compiled
from vitpa.step.losses import Targets, evaluation_sums, training_loss
from vitpa.step.networks import Networks

WARM_UP_STEPS = 3  # before a graph is captured: libraries choose their algorithms and take their workspace


class ReplicaSteps:
    """Training steps and evaluation of R models. The models' parameters become views of one stack."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        group: Group,
        *,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.AdamW],
        feed: Feed,
        learning_rates: Float64[Tensor, " steps #R"],
    ) -> None:
        """`learning_rates` are those of each step of the whole run, of all replicas or of each."""
        self.config = config = configs[0]  # of the others beside what may differ
        self.seeds = [each.seed for each in configs]
        self.group, self.feed = group, feed
        self.device, self.R, self.B = group.device, len(configs), feed.batch_size
        deepest = max(configs, key=lambda each: each.model.drop_path_rate)  # if one drops branches, all are scaled
        self.networks = networks = Networks(deepest, models, device=self.device, num_images=self.R * self.B)
        self.buffers = networks.buffers
        max_norms = [each.optim.grad_clip_norm for each in configs]
        self.adamw = ReplicaAdamW(models, optimizers, networks.copies_dtype, max_norms)
        values = self.adamw.by_name(self.adamw.values)
        self.weights = {name: value.detach().requires_grad_() for name, value in values.items()}
        self.copies = {} if self.adamw.copies is None else self.adamw.by_name(self.adamw.copies)  # for products
        self.ema = None
        if config.train.ema_decay:
            self.ema = WeightAverage(self.adamw, config.train.ema_decay, len(learning_rates))
        self.evaluated = [(each.weights, each.copies) for each in (self, self.ema) if each is not None]
        self.label_smoothing = setting([each.optim.label_smoothing for each in configs], self.device)

        self.accum_steps = config.runtime.accum_steps
        loss_scale = 1 / (self.accum_steps * group.world_size)  # the share of a micro-batch in the loss of the step
        self.loss_scale = torch.tensor(loss_scale).to(self.device).expand(self.R)
        self.keys = torch.zeros(self.R, max(Purpose) + 1, dtype=torch.int64, device=self.device)
        self.done = torch.zeros((), dtype=torch.int64, device=self.device)  # steps since the start of the run
        self.learning_rates = learning_rates.expand(-1, self.R)
        self.factors = self.adamw.factors(learning_rates)
        self.losses = self.adamw.losses  # of the step
        self.accumulator = MetricAccumulator(self.R, self.device)
        # loss, top-1, top-5, images; of the weights, then of their average
        self.eval_sums = torch.zeros(self.R, 4 * len(self.evaluated), dtype=torch.float64, device=self.device)

        self.configs, self.img_size = configs, config.model.img_size  # of training images
        self._functions = self._functions_of(self.img_size)
        self._other_functions: dict[int, StepFunctions] = {}  # of other image sizes, which have been used
        evaluated = Augmentation.of(configs, img_size=config.model.img_size, device=self.device)
        self._eval_functions = EvalFunctions(EvalBatches(feed, evaluated).make, networks.evaluate(), evaluation_sums)
        self._run_step, self._run_evaluation = self._step, self._evaluate_batch  # or CUDA graphs of them
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._noted: set[str] = set()  # what `prepare` has said

    def _functions_of(self, img_size: int) -> StepFunctions:
        """What a step on images of `img_size` pixels is made of, not compiled."""
        augmentation = Augmentation.of(self.configs, img_size=img_size, device=self.device)
        keep = kept_branches(self.configs, self.B, self.device)
        return StepFunctions(
            make_batch=TrainBatches(self.feed, augmentation, keep, self.R).make,
            network=self.networks.train(img_size),
            loss=self._compute_loss,
            count=self._count_batch,
            optimizer_step=self._optimizer_step,
        )

    def use_img_size(self, img_size: int) -> None:
        """Train on images of `img_size` pixels from the next epoch on; to be followed by `prepare`.

        Evaluations stay as they are. What was compiled for a size is kept, in case it comes again.
        """
        if img_size == self.img_size:
            return
        assert isinstance(self.feed, StreamedFeed)  # images that stay on the device have one size
        self.feed.close()
        self._drop_graphs()
        self.feed.use_img_size(img_size)
        self._other_functions[self.img_size] = self._functions
        self.img_size = img_size
        self._functions = self._other_functions.get(img_size) or self._functions_of(img_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of the graphs

    @property
    def compiles(self) -> bool:
        """Whether `prepare` compiles the step."""
        return self.config.runtime.compiles(self.device.type)

    @property
    def is_compiled(self) -> bool:
        """Whether it has."""
        return self._functions.is_compiled

    def prepare(self, step: int) -> list[str]:
        """Be ready for the step after `step` steps: compile and capture as `runtime.step` asks.

        Returns:
            what is unsupported here, and what is done instead; nothing that has been said before.
        """
        notes, wanted = list(self.networks.notes), self.config.runtime.step
        captures = wanted in ("auto", "graph") and self.device.type == "cuda"
        if wanted == "graph" and not captures:
            notes.append("runtime.step=graph: a CPU has no CUDA graphs; compiled instead")
        self.adamw.copy_values()
        if self.compiles:
            from vitpa.step.unfinished_builds import cache_folders, remove_unfinished  # noqa: PLC0415 - loads the compiler

            notes += [f"{path}: a killed run has left it unfinished; it is compiled again" for path in remove_unfinished()]
            if reason := self._compile():
                damaged = f"if files of the compiler's cache are damaged, delete {' and '.join(map(str, cache_folders()))}"
                notes.append(f"the step could not be compiled ({reason}); it runs uncompiled, slowly; {damaged}")
                captures = False
        if captures and (reason := self._capture()):
            notes.append(f"no CUDA graph of the step could be made ({reason}); it runs without")
        self.done.fill_(step)
        new = [note for note in notes if note not in self._noted]
        self._noted.update(new)
        return new

    def _compile(self) -> str | None:
        """Compile the functions, by running them once; why it failed, if it did: then they are as before."""
        eager = self._functions, self._eval_functions
        self._functions, self._eval_functions = compiled(self._functions), compiled(self._eval_functions)
        try:
            # a function is compiled once for each size of images, in training and in evaluation; 8 versions are the default
            limit = torch._dynamo.config.patch(cache_size_limit=8 + len(self._other_functions))
            with limit, warnings.catch_warnings():
                # Compilers warn their developers (torch 2.11 of a module that it imports itself) and that TF32 is off, as
                # it should be: noise for a user, and with `python -W error` the step would not be compiled at all.
                warnings.simplefilter("ignore")
                self._leaving_no_trace(self._step)
                self._leaving_no_trace(self._evaluate_batch)
        except TorchDynamoException as error:
            self._functions, self._eval_functions = eager
            return _first_line(error)
        return None

    def _capture(self) -> str | None:
        """Make CUDA graphs of a step and of an evaluation's batch; why it failed, if it did: then they run without.

        Raises:
            torch.OutOfMemoryError: there is too little memory.
        """
        try:
            self._run_step = self._captured_step()
            self._run_evaluation = self._leaving_no_trace(self._captured, self._evaluate_batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._run_step, self._run_evaluation = self._step, self._evaluate_batch
            return _first_line(error)
        return None

    def close(self) -> None:
        """Decode no more, and let go of the CUDA graphs: NCCL waits for those that hold its work before processes part."""
        self.feed.close()
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        """Let go of the CUDA graphs, when what they do is done; steps and evaluations then run without."""
        self._run_step, self._run_evaluation = self._step, self._evaluate_batch
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Take the order and the random numbers of `epoch`, from its step `step` on."""
        self.keys.copy_(epoch_keys(self.seeds, epoch))
        self.feed.begin_epoch(epoch, step)

    def load(self) -> None:
        """Put the images of the next step on the device.

        Raises:
            BetonError: an image cannot be decoded.
        """
        self.feed.load()

    def step(self) -> None:
        """One optimiser step of every replica on what `load` has put there; returns before the device has done it."""
        self._run_step()

    def learning_rate(self, replica: int, step: int) -> float:
        """The learning rate of a replica in the step after `step` steps."""
        return float(self.learning_rates[step, replica])

    def optimizer_state(self, replica: int, step: int) -> dict[str, Any]:
        """The optimiser's state of a replica after `step` steps, as torch.optim.AdamW's state_dict()."""
        return self.adamw.state_dict(replica, step)

    def load_optimizer(self, replica: int, state: dict[str, Any]) -> None:
        """Take over such a state."""
        self.adamw.load_state_dict(replica, state)

    def ema_state(self, replica: int) -> dict[str, Tensor] | None:
        """The moving average of a replica's parameters, by name: views; None without train.ema_decay."""
        return None if self.ema is None else self.ema.state(replica)

    def load_ema(self, replica: int, state: dict[str, Tensor] | None) -> None:
        """Take over such a state."""
        if self.ema is not None and state is not None:
            self.ema.load(replica, state)

    def freeze(self, replica: int) -> None:
        """Leave the weights and optimiser state of a replica as they are from now on."""
        self.adamw.frozen[replica] = True

    def evaluate(self) -> Float64[Tensor, "R S"]:
        """Sums over this process's share of the val split: cross-entropy, top-1, top-5, images.

        S = 4, or 8 with train.ema_decay: those of the weights, then those of their average.

        Raises:
            BetonError: an image cannot be decoded.
        """
        self.eval_sums.zero_()
        if self.ema is not None:
            self.ema.copy_values()
        self.feed.begin_evaluation()
        for _ in range(self.feed.num_eval_batches):
            self.feed.load_eval()
            self._run_evaluation()
        return self.eval_sums

    def _step(self) -> None:
        """A whole optimiser step. What has become a CUDA graph does the same; of several processes, without `_all_reduce`."""
        self._forward_backward()
        self._all_reduce()
        self._functions.optimizer_step()

    def _forward_backward(self) -> None:
        """Leave the gradients and losses of this process, summed over its micro-batches, in the optimiser's buffer."""
        functions = self._functions
        self.losses.zero_()
        for micro in range(self.accum_steps):
            images, targets, scales = functions.make_batch(self.feed.inputs(micro), self.keys)
            logits = functions.network(self.weights, self.copies, images, scales)  # R, B, K
            losses, correct = functions.loss(logits, targets)  # R; R
            gradients = torch.autograd.grad(losses, list(self.weights.values()), self.loss_scale)
            self.adamw.take_gradients(gradients, add=micro > 0)
            functions.count(losses.detach(), correct)
            self.feed.advance()

    def _all_reduce(self) -> None:
        """Sum the gradients over the processes; the losses, too, so that all agree on what is finite."""
        self.group.all_reduce_sum(self.adamw.shared)

    def _optimizer_step(self) -> None:
        """Clip and apply the gradients, and note whether they and the losses are finite."""
        norms = self.adamw.update(self.losses, self.factors.index_select(0, self.done.view(1))[0])
        if self.ema is not None:
            self.ema.update(self.done)
        self.done += 1
        self.accumulator.check(self.done, self.losses, norms)

    def _count_batch(self, losses: Float[Tensor, " R"], correct: Int64[Tensor, " R"]) -> None:
        """Note the mean losses and the numbers of correct predictions of a micro-batch."""
        self.losses += losses
        self.accumulator.add(losses, correct, self.B)

    def _compute_loss(
        self, logits: Float[Tensor, "R B K"], targets: Targets
    ) -> tuple[Float[Tensor, " R"], Int64[Tensor, " R"]]:
        """The mean loss, and the number of predictions of what an image shows most of."""
        return training_loss(logits, targets, self.label_smoothing)

    def _evaluate_batch(self) -> None:
        functions = self._eval_functions
        with torch.no_grad():
            images, labels = functions.make_batch(self.feed.eval_inputs())
            images = images.expand(self.R, *images.shape)
            logits = [functions.network(*weights, images) for weights in self.evaluated]
            self.eval_sums += torch.cat([functions.score(each, labels) for each in logits], dim=1)
            self.feed.advance_eval()

    def _leaving_no_trace(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function`, and put everything that a step or an evaluation changes back as it was."""
        changed = [*self.adamw.state_tensors(), *self.buffers, *self.feed.positions(), self.done, self.eval_sums]
        changed += [self.accumulator.sums, self.accumulator.grad_norm, self.accumulator.first_nonfinite_step]
        if self.ema is not None:
            changed.append(self.ema.values)
        before = [tensor.clone() for tensor in changed]
        try:
            return function(*arguments)
        finally:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            self.adamw.copy_values()

    def _captured_step(self) -> Callable[[], None]:
        """A step made of CUDA graphs."""
        if self.group.world_size == 1:
            whole: Callable[[], None] = self._leaving_no_trace(self._captured, self._step)
            return whole
        parts = self._forward_backward, self._functions.optimizer_step
        forward_backward, optimizer_step = (self._leaving_no_trace(self._captured, part) for part in parts)

        def step() -> None:
            forward_backward()
            self._all_reduce()
            optimizer_step()

        return step

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of `function`."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                for position in (self.done, *self.feed.positions()):  # an epoch may have fewer steps
                    position.zero_()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that asks for events meanwhile, which is no part of the graph
        with torch.cuda.graph(graph, capture_error_mode="global" if self.group.world_size == 1 else "thread_local"):
            function()
        self._graphs.append(graph)
        return graph.replay


def _first_line(error: Exception) -> str:
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first  # "backend='inductor' raised:" says little
