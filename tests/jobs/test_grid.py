"""The cells of a sweep: keys that move together, what is excluded and included, and errors in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.errors import SweepError
from jobs.sweep import Sweep, SweepDir, load_sweep

MIXING = {
    "none": {},
    "mixup": {"augment.mixup_alpha": 0.8},
    "both": {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1},
}


def sweep_of(folder: Path, **changes: Any) -> Sweep:
    document = {"name": "small", "recipes": ["digits"], "attentions": ["content"], "seeds": [0, 1], **changes}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_sweep(str(path), folder)


def labels(sweep: Sweep, seed: int = 0) -> list[str]:
    return [run.label.removeprefix("digits-").removesuffix(f"-s{seed}") for run in sweep.runs if run.seed == seed]


def test_keys_that_move_together_have_labels(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, axes={"optim.lr": [1e-3, 2e-3], "mixing": MIXING})
    assert labels(sweep) == [f"content-lr{rate}-{label}" for rate in ("0.001", "0.002") for label in MIXING]
    both = sweep.runs[2]
    assert both.settings == {"optim.lr": "0.001", "mixing": "both"}
    assert (both.config.augment.mixup_alpha, both.config.augment.cutmix_alpha) == (0.8, 1.0)
    assert sweep.runs[0].config.augment.mixup_alpha == 0
    directory = SweepDir(tmp_path, "small")
    directory.record(sweep)
    assert directory.recorded() == sweep.runs
    assert directory.recorded(sweep.runs) == sweep.runs


def test_cells_that_hold_out_the_same_part_are_a_grid(tmp_path: Path) -> None:
    how = {name: {"train.holdout": 0.1, "optim.lr": rate} for name, rate in (("slow", 1e-3), ("fast", 2e-3))}
    assert labels(sweep_of(tmp_path, axes={"how": how})) == ["content-slow", "content-fast"]


def test_excluded_cells_are_left_out(tmp_path: Path) -> None:
    axes = {"optim.lr": [1e-3, 2e-3], "mixing": MIXING}
    exclude = [{"optim.lr": 0.0020, "mixing": ["mixup", "both"]}, {"mixing": "none", "attention": "positional"}]
    sweep = sweep_of(tmp_path, axes=axes, exclude=exclude, attentions=["content", "positional"])
    mixed = [f"{each}-lr0.001-{how}" for how in ("mixup", "both") for each in ("content", "positional")]
    assert labels(sweep) == labels(sweep, 1) == ["content-lr0.001-none", *mixed, "content-lr0.002-none"]


def test_included_cells_are_added_also_with_new_values(tmp_path: Path) -> None:
    axes = {"optim.lr": [1e-3], "optim.betas": [[0.9, 0.95], [0.9, 0.999]]}
    include = [{"optim.lr": [3e-3, 4e-3], "optim.betas": [0.9, 0.95]}, {"optim.lr": 9e-3}]
    sweep = sweep_of(tmp_path, axes=axes, include=include)
    first, second = "betas0.9_0.95", "betas0.9_0.999"
    pairs = [("0.001", first), ("0.001", second), ("0.003", first), ("0.004", first), ("0.009", first), ("0.009", second)]
    assert labels(sweep) == [f"content-lr{rate}-{betas}" for rate, betas in pairs]


def test_labels_are_texts(tmp_path: Path) -> None:
    """They are what names of runs have; the values of a key are numbers, however they are written."""
    axes = {"mixing": {label: {"optim.weight_decay": float(i)} for i, label in enumerate(("1", "01", "1.0"))}}
    assert labels(sweep_of(tmp_path, axes=axes, exclude=[{"mixing": "01"}])) == ["content-1", "content-1.0"]
    assert labels(sweep_of(tmp_path, axes=axes, exclude=[{"mixing": ["01", "1.0"]}])) == ["content-1"]
    assert labels(sweep_of(tmp_path, axes=axes, exclude=[{"mixing": 1}])) == ["content-01", "content-1.0"]
    include = [{"mixing": "1.0"}]
    everything = ["content-1", "content-01", "content-1.0"]
    assert labels(sweep_of(tmp_path, axes=axes, exclude=include, include=include)) == everything
    with pytest.raises(SweepError, match="exclude: mixing has no value 001; it has 1, 01, "):
        sweep_of(tmp_path, axes=axes, exclude=[{"mixing": "001"}])
    with pytest.raises(SweepError, match="exclude: mixing: 01 is given 2 times"):
        sweep_of(tmp_path, axes=axes, exclude=[{"mixing": ["01", "01"]}])
    how = {label: {"optim.weight_decay": float(i)} for i, label in enumerate(("1e3", "2e3"))}
    assert labels(sweep_of(tmp_path, axes={"how": how}, exclude=[{"how": 1e3}])) == ["content-2e3"], "without quotes"
    rates = {"optim.lr": [5e-4, 1e-3]}
    assert labels(sweep_of(tmp_path, axes=rates, exclude=[{"optim.lr": "5e-4"}])) == ["content-lr0.001"]


def test_grid_can_be_written_point_by_point(tmp_path: Path) -> None:
    points = [{"optim.lr": 1e-3, "train.epochs": 3}, {"optim.lr": 2e-3, "train.epochs": 6}]
    axes = {"optim.lr": [1e-3, 2e-3], "train.epochs": [3, 6]}
    crossed = [{"optim.lr": 1e-3, "train.epochs": 6}, {"optim.lr": 2e-3, "train.epochs": 3}]
    assert labels(sweep_of(tmp_path, axes=axes, exclude=crossed)) == ["content-lr0.001-epochs3", "content-lr0.002-epochs6"]
    with pytest.raises(SweepError, match="nothing is left of the grid"):
        sweep_of(tmp_path, axes=axes, exclude=[*points, *crossed])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"optim.lr": 1e-3}}, "axes.optim.lr: expected a list of values, such as [0.001], or labels"),
        ({"axes": {"optim.lr": [1, 1.0]}}, "axes.optim.lr: 1 is given 2 times; once is enough"),
        ({"axes": {"optim.lr": {"a": {}}}}, "axes.optim.lr: optim.lr is a key; its values are a list"),
        ({"axes": {"seed": {"a": {}}}}, "axes.seed: seed is a key"),
        (
            {"axes": {"state": {"a": {}}}},
            "axes.state: state is reserved, as are attention, dataset, runtime, seed",
        ),
        ({"axes": {"Mixing": {"a": {}}}}, "axes.Mixing: no name for keys that move together; take lower-case letters"),
        ({"axes": {"mixing": {"a-b": {}}}}, "axes.mixing: the label 'a-b' becomes a part of names"),
        ({"axes": {"mixing": {"a": 3}}}, "axes.mixing.a: expected settings, such as {augment.mixup_alpha: 0.8}, or"),
        ({"axes": {"mixing": {"a": {"seed": 3}}}}, "axes.mixing: seed: say it by seeds, which is an axis of every sweep"),
        ({"axes": {"mixing": {"a": {"runtime.step": "eager"}}}}, "axes.mixing: runtime.step: it does not change the numbers"),
        (
            {"axes": {"mixing": {"a": {"optim.lr": 3}}}, "overrides": {"optim.lr": 1}},
            "axes.mixing: optim.lr is in the overrides, too; say it once",
        ),
        (
            {"axes": {"optim.lr": [1e-3], "mixing": {"a": {"optim.lr": 3}}}},
            "axes.mixing: optim.lr: the axis optim.lr sets it, too; one axis for a key",
        ),
        (
            {"axes": {"train.holdout": [0, 0.1]}},
            "evaluates digits-content-holdout0-s0 on val and digits-content-holdout0.1-s0 on held-out 10 % of train, which",
        ),
        (
            {"axes": {"train.holdout": [0.1]}, "include": [{"train.holdout": 0.2}]},
            "evaluates digits-content-holdout0.1-s0 on held-out 10 % of train and digits-content-holdout0.2-s0 on",
        ),
        ({"axes": {"mixing": {"a": {}, "b": {}}}}, "digits-content-a-s0 and digits-content-b-s0 are the same run"),
        ({"exclude": [{"optim.lr": 1}]}, "exclude: optim.lr is no axis of the sweep; it has dataset, attention"),
        ({"exclude": [{"seed": 1}]}, "exclude: seed: every cell has the seeds of the sweep"),
        ({"exclude": [{"attention": "none"}]}, "exclude: attention has no value none; it has content"),
        ({"axes": {"optim.lr": [1, 2]}, "exclude": [{"optim.lr": 3}]}, "exclude: optim.lr has no value 3; it has 1, 2"),
        (
            {"axes": {"optim.lr": [1, 2]}, "exclude": [{"optim.lr": 2}, {"optim.lr": 2}]},
            'exclude: {"optim.lr": 2}: no cell is left like this; leave the entry out',
        ),
        (
            {"axes": {"optim.lr": [1e-3, 2e-3]}, "include": [{"optim.lr": 1e-3}]},
            'include: {"optim.lr": 0.001} is in the grid already; leave the entry out',
        ),
        ({"axes": {"optim.lr": [1e-3, "1e-3"]}}, "axes.optim.lr: 0.001 is given 2 times; once is enough"),
        (
            {"axes": {"optim.lr": [1e-3]}, "include": [{"optim.lr": "0.0010"}]},
            'include: {"optim.lr": "0.0010"} is in the grid already; leave the entry out',
        ),
        (
            {"axes": {"optim.lr": [1e-3]}, "include": [{"optim.lr": [3e-3, 0.003]}]},
            "include: optim.lr: 0.003 is given 2 times; once is enough",
        ),
        ({"axes": {"optim.lr": [1e-3]}, "include": [{"optim.lr": []}]}, 'include: {"optim.lr": []} adds no cell; leave the'),
        ({"axes": {"mixing": MIXING}, "include": [{"mixing": "more"}]}, "include: mixing has no value more; it has none,"),
    ],
)
def test_what_contradicts_itself_is_an_error_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=f"small.yaml: {re.escape(message)}") as caught:
        sweep_of(tmp_path, **changes)
    assert "\n" not in str(caught.value)
