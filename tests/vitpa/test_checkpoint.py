"""Checkpoints: whole or not at all, the two newest, and a hash that any bit changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import load_newest
from vitpa import checkpoint
from vitpa.checkpoint import Checkpoint, Progress, weights_sha256
from vitpa.rundir import RunDir

SIGNATURE = "0123456789abcdef"
WEIGHTS = {
    "head.weight": torch.linspace(-1, 1, 12).view(3, 4),
    "head.bias": torch.tensor([0.0, -0.0, float("inf")]),
    "norm.steps": torch.tensor(3),
    "mask": torch.tensor([True, False]),
    "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 5),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run without checkpoints."""
    return RunDir(tmp_path, SIGNATURE)


def state(step: int, **changes: Any) -> Checkpoint:
    """A checkpoint of that run, which no model has to fit."""
    fields: dict[str, Any] = {
        "signature": SIGNATURE,
        "beton_sha256": {"train": "1" * 64, "val": "2" * 64},
        "progress": Progress(step=step, val={"val/top1": 0.1 + 0.2}, code_versions=["a"]),
        "window": torch.zeros(3, dtype=torch.float64),
        "optimizer": {"state": {}, "param_groups": [{"params": [], "lr": 1e-3, "fused": None}]},
        "model": WEIGHTS,
        "metrics": '{"step": 1}\n',
    }
    return Checkpoint(**{**fields, **changes})


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def newest_step(run: RunDir) -> int:
    found = load_newest(run)
    assert found is not None
    return found[1].progress.step


def test_without_checkpoints_there_is_no_newest(run: RunDir) -> None:
    assert load_newest(run) is None


def test_a_state_comes_back_bit_for_bit(run: RunDir) -> None:
    path = checkpoint.save(run, state(8))
    loaded, has_checksum = checkpoint.load(path, SIGNATURE)
    assert has_checksum
    for name in ("signature", "beton_sha256", "progress", "optimizer", "metrics"):
        assert getattr(loaded, name) == getattr(state(8), name)
    assert weights_sha256(loaded.model) == weights_sha256(WEIGHTS)
    assert loaded.model["head.bias"].signbit().tolist() == [False, True, False]
    assert set(torch.load(path, weights_only=True)) == set(Checkpoint.model_fields) - {"ema"}  # as any torch file


def test_the_two_newest_are_kept_by_number_not_by_name(run: RunDir) -> None:
    for step in (8, 90, 700, 100_000):
        checkpoint.save(run, state(step))
        assert newest_step(run) == step
    assert names(run) == ["step_000000700.pt", "step_000100000.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other"])
def test_a_damaged_newest_is_warned_about_and_passed_over(run: RunDir, damage: str, warned: Callable[[str], str]) -> None:
    checkpoint.save(run, state(1))
    path = checkpoint.save(run, state(2))
    size = path.stat().st_size
    if damage == "cut":
        os.truncate(path, size // 2)
    elif damage == "changed":
        path.write_bytes(path.read_bytes().replace(b"PK", b"KP"))
    else:
        path.write_text("" if damage == "empty" else "no checkpoint")
    assert newest_step(run) == 1
    warned(r"step_000000002\.pt: its? .+; it is passed over, and is passed_over_step_000000002\.pt now$")
    assert names(run) == ["passed_over_step_000000002.pt", "step_000000001.pt"]
    assert run.newest_step() == 1


def test_what_was_saved_last_stays_though_damaged_ones_have_higher_numbers(run: RunDir, warned: Callable[[str], str]) -> None:
    for step in (80, 88):
        checkpoint.save(run, state(step)).write_text("damaged")
    assert load_newest(run) is None
    warned("it is passed over")
    checkpoint.save(run, state(8))  # training starts again
    assert newest_step(run) == 8
    checkpoint.save(run, state(16))
    assert newest_step(run) == 16
    assert [name for name in names(run) if name.startswith("step_")] == ["step_000000008.pt", "step_000000016.pt"]


def test_code_in_a_checkpoint_is_not_run(run: RunDir, tmp_path: Path, warned: Callable[[str], str]) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    run.checkpoints.mkdir(parents=True)
    torch.save({"model": Harm()}, run.checkpoints / "step_000000001.pt")
    assert load_newest(run) is None
    warned(r"step_000000001\.pt: it is no checkpoint")
    assert not (tmp_path / "harm").exists()


def test_a_temporary_file_of_a_killed_process_is_no_checkpoint(run: RunDir) -> None:
    checkpoint.save(run, state(1))
    (run.checkpoints / ".step_000000002.pt.123.abcd").write_text("half")
    assert newest_step(run) == 1


def changed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**WEIGHTS, name: tensor}


def one_bit(tensor: Tensor) -> Tensor:
    """The same with the lowest bit of its last byte's neighbour turned."""
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[-4] ^= 1
    return other


@pytest.mark.parametrize(
    "weights",
    [
        changed("head.weight", one_bit(WEIGHTS["head.weight"])),
        changed("head.bias", torch.tensor([0.0, 0.0, float("inf")])),  # equal numbers, other bits
        changed("norm.steps", torch.tensor(4)),
        changed("norm.steps", torch.tensor([3])),
        changed("norm.steps", torch.tensor(3, dtype=torch.int32)),
        changed("head.weight", WEIGHTS["head.weight"].view(4, 3)),
        changed("head.weight", WEIGHTS["head.weight"].view(torch.int32)),
        changed("mask", torch.tensor([True, True])),
        changed("half", torch.tensor([1.0, 2.0], dtype=torch.bfloat16).view(torch.float16)),
        changed("none", torch.empty(5, 0)),
        changed("more", torch.tensor(0)),
        {name: tensor for name, tensor in WEIGHTS.items() if name != "mask"},
        {"head.w" if name == "head.weight" else name: tensor for name, tensor in WEIGHTS.items()},
        {**WEIGHTS, "head.weight": WEIGHTS["half"], "half": WEIGHTS["head.weight"]},
    ],
)
def test_any_difference_changes_the_hash(weights: dict[str, Tensor]) -> None:
    assert weights_sha256(weights) != weights_sha256(WEIGHTS)


def test_the_hash_is_of_the_values_alone() -> None:
    expected = weights_sha256(WEIGHTS)
    assert len(expected) == 64
    assert weights_sha256(dict(reversed(WEIGHTS.items()))) == expected
    assert weights_sha256(changed("head.weight", torch.nn.Parameter(WEIGHTS["head.weight"]))) == expected
    strided = WEIGHTS["head.weight"].T.contiguous().T
    assert not strided.is_contiguous()
    assert weights_sha256(changed("head.weight", strided)) == expected


def test_the_writer_takes_the_state_as_it_is_at_the_call(run: RunDir) -> None:
    weights = {"weight": torch.zeros(1000)}
    progress = Progress(code_versions=["a"])
    with checkpoint.Writer() as writer:
        for step in (1, 2, 3):
            weights["weight"].fill_(step)
            progress.step = step
            writer.save(run, state(1, model=weights, progress=progress))
            weights["weight"].fill_(-1)
            progress.step = -1
            writer.wait()
            found = load_newest(run)
            assert found is not None
            assert found[1].progress == Progress(step=step, code_versions=["a"])
            assert torch.equal(found[1].model["weight"], torch.full((1000,), float(step)))


def test_leaving_the_writer_waits_for_what_is_under_way(run: RunDir) -> None:
    with checkpoint.Writer() as writer:
        for step in range(1, 9):
            writer.save(run, state(step))
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step_000000007.pt", "step_000000008.pt"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_the_writer(run: RunDir) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.checkpoints.write_text("a file where the folder should be")
    with checkpoint.Writer() as writer:
        writer.save(run, state(1))
        with pytest.raises(OSError, match="checkpoints"):
            writer.wait()
        writer.wait()  # it has been said
