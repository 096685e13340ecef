"""What a step and an evaluation are made of: functions of tensors, as they are written or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from vitpa.step.losses import Targets
from vitpa.step.networks import Network


@dataclass(frozen=True)
class StepFunctions:
    """Those of a training step."""

    make_batch: Callable[..., tuple[Tensor, Targets, Tensor | None]]
    network: Network
    loss: Callable[..., tuple[Tensor, Tensor]]
    count: Callable[..., None]
    optimizer_step: Callable[..., None]
    is_compiled: bool = False


@dataclass(frozen=True)
class EvalFunctions:
    """Those of an evaluation."""

    make_batch: Callable[..., tuple[Tensor, Tensor]]
    network: Network
    score: Callable[..., Tensor]
    is_compiled: bool = False


Functions = TypeVar("Functions", StepFunctions, EvalFunctions)


def compiled(functions: Functions) -> Functions:
    """The same, each of which is compiled when it is first called."""
    if functions.is_compiled:
        return functions
    compiler = partial(torch.compile, dynamic=False, fullgraph=True)
    names = {field.name for field in fields(functions)} - {"network", "is_compiled"}
    others = {name: compiler(getattr(functions, name)) for name in names}
    return replace(functions, network=functions.network.compiled(compiler), is_compiled=True, **others)
