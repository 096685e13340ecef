"""A checkpoint's fields, small and of every kind; the newest checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitpa.checkpoint import Checkpoint, Layout, Progress, in_step
from vitpa.rundir import RunDir

SIGNATURE = "0123456789abcdef"
EVALUATION = {"val/top1": 0.5, "val/top5": 0.9, "val/loss": 1.0}


def fields(step: int) -> dict[str, Any]:
    """The content of a checkpoint of a small model after one step of AdamW, said to be `step` steps."""
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for moments in state["state"].values():
        moments["step"].fill_(step)
    return {
        "signature": SIGNATURE,
        "beton_sha256": {"train": "1" * 64, "val": "2" * 64},
        "progress": {**Progress(step=step, code_versions=["g1"], val=EVALUATION).model_dump()},
        "window": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "optimizer": state,
        "model": dict(model.state_dict()),
        "metrics": '{"step": 1}\n',
    }


def load_newest(run: RunDir, layout: Layout | None = None) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that is believed, with its path; None if there is none."""
    return in_step([run], layout)[0]
