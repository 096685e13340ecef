"""Searches for tests: a sweep's file with `search`, over the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from jobs.sweep import Sweep, load_sweep
from tests.support.jobs_sweeps import RECIPE

SPACE = {
    "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.drop_path_rate": {"low": 0.0, "high": 0.2, "step": 0.1},
    "augment.randaugment_magnitude": {"low": 0, "high": 9},
    "augment.mixup_alpha": [0.0, 0.2, 0.8],
}


def make_search(
    root: Path, *, epochs: int = 9, seeds: int = 1, overrides: dict[str, Any] | None = None, **search: Any
) -> Sweep:
    """A search `small` below `root` for the stand-in: an epoch is 50 ms, accuracies follow from names, data is pretended."""
    root.mkdir(exist_ok=True)
    recipe = {**RECIPE, "train": {"epochs": epochs}, "optim": {"warmup_epochs": 0}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    document = {
        "name": "small",
        "recipes": ["recipe.yaml"],
        "attentions": ["content"],
        "seeds": list(range(seeds)),
        "overrides": {"train.holdout": 0.1} if overrides is None else overrides,
        "search": {"space": SPACE, "budget": {"runs": 4}, "trials_at_once": 4, **search},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(document))
    (root / "score-by-name").touch()
    for split in ("train", "val"):
        path = root / "data" / "digits" / f"{split}.beton"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return load_sweep(str(root / "small.yaml"), root)


def ledger_of(root: Path, name: str = "small") -> list[Any]:
    """The records of a ledger, in order."""
    return [json.loads(path.read_text()) for path in sorted((root / "sweeps" / name / "search").glob("*.json"))]
