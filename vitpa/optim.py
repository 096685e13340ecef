"""The optimiser's parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpa.arguments import ConfigError
from vitpa.config import RunConfig

MAX_STEPS = 20_000_000  # of a run: a table of this length is made in seconds


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
) -> torch.optim.AdamW:
    """AdamW that decays weight matrices only: not biases, norms, nor what the model's no_weight_decay() names."""
    # timm's ViTs have it: pos_embed, cls_token, ...
    spared: Collection[str] = model.no_weight_decay() if isinstance(model, VisionTransformer) else ()
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decay if parameter.ndim >= 2 and name not in spared else no_decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """The optimiser of a configuration."""
    optim, fused = config.optim, next(model.parameters()).device.type == "cuda"
    return adamw(model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, fused=fused)


def load_moments(optimizer: torch.optim.AdamW, state: dict[str, Any]) -> None:
    """Restore the running averages and step counts from another optimiser's state_dict(), but none of its settings.

    Those belong to the machine (fused, capturable), to the configuration, or to the step (the learning rate).
    """
    own = optimizer.state_dict()["param_groups"]
    groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a half cosine from `peak` down to `minimum`.

    Step 0 has peak / warmup_steps, step warmup_steps - 1 has `peak`, step total_steps - 1 has `minimum`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / (total_steps - warmup_steps)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


def learning_rates(configs: Sequence[RunConfig], epoch_steps: int) -> Tensor:
    """The learning rate of each step of whole runs of one length: (steps, R) float64, or (steps, 1) if all have the same.

    Raises:
        ConfigError: more than MAX_STEPS.
    """
    train = configs[0].train
    total_steps = train.epochs * epoch_steps
    if total_steps > MAX_STEPS:
        raise ConfigError(
            f"train.epochs={train.epochs} are {total_steps:,} steps at "
            f"train.global_batch_size={train.global_batch_size}; at most {MAX_STEPS:,}: lower one or raise the other"
        )
    schedules = [(config.optim.lr, config.optim.min_lr, config.optim.warmup_epochs) for config in configs]
    rates = {each: _learning_rates(*each, epoch_steps, total_steps) for each in dict.fromkeys(schedules)}
    return torch.stack([rates[each] for each in schedules] if len(rates) > 1 else list(rates.values()), dim=1)


def _learning_rates(peak: float, minimum: float, warmup_epochs: float, epoch_steps: int, total_steps: int) -> Tensor:
    warmup_steps = round(warmup_epochs * epoch_steps)
    rate = partial(learning_rate, peak=peak, minimum=minimum, warmup_steps=warmup_steps, total_steps=total_steps)
    return torch.tensor([rate(step) for step in range(total_steps)], dtype=torch.float64)
