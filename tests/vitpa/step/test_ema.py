"""The moving average of the weights: against timm's, alone and together, stopped and resumed, evaluated and counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F

from tests.support.checkpoints import load_newest
from tests.support.trainings import EPOCH_STEPS, arguments, config_of, metrics, result_of, start
from tests.support.waiting import finish
from vitpa.checkpoint import load
from vitpa.checkpoint_file import CheckpointError
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation
from vitpa.data.open import open_data
from vitpa.distributed import Group
from vitpa.logs import Logs
from vitpa.records import RunError
from vitpa.resume import layout
from vitpa.step.ema import decays
from vitpa.train import set_up
from vitpa.train_command import main
from vitpa.trained import load_run
from vitpa.training import Training

OPTIONS = ["train.ema_decay=0.95", "train.epochs=3", "optim.lr=1e-2", "runtime.cpu_threads=1"]
GROUP = Group(0, 1, 0, 1, torch.device("cpu"))


def average_of(config: RunConfig) -> dict[str, Tensor]:
    newest = load_newest(config.run_dir)
    assert newest is not None
    assert newest[1].ema is not None
    return newest[1].ema


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], atol: float) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=name)


def test_decays_are_timms() -> None:
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.99, use_warmup=True)
    assert decays(0.99, 2000).tolist() == pytest.approx([theirs.get_decay(step + 1) for step in range(2000)])
    assert decays(0.99, 2000)[[0, -1]].tolist() == [0.0, 0.99]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_timms_average_of_each_replica(digits: Path, tmp_path: Path, precision: str) -> None:
    words = arguments(digits, tmp_path, *OPTIONS, f"train.precision={precision}")
    t = set_up([config_of([*words, f"seed={seed}"]) for seed in (0, 1)], GROUP)
    theirs = [ModelEmaV3(replica.model, decay=0.95, use_warmup=True) for replica in t.replicas]
    t.steps.prepare(0)
    t.steps.begin_epoch(0, 0)
    for step in range(1, EPOCH_STEPS):
        t.steps.load()
        t.steps.step()
        for number, replica in enumerate(t.replicas):
            theirs[number].update(replica.model, step=step)
            ours = t.steps.ema_state(number)
            assert ours is not None
            assert_close(ours, theirs[number].module.state_dict(), 1e-6)
    t.steps.freeze(0)
    before = [replica_average(t, number) for number in (0, 1)]
    t.steps.step()
    for number, stays in ((0, True), (1, False)):
        assert torch.equal(replica_average(t, number), before[number]) is stays


def replica_average(t: Training, number: int) -> Tensor:
    """All of it in one tensor, a copy."""
    state = t.steps.ema_state(number)
    assert state is not None
    return torch.cat([value.flatten() for value in state.values()])


def test_both_are_evaluated_and_the_average_counts(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = arguments(digits, tmp_path, *OPTIONS)
    assert main(words) == 0
    config, result = config_of(words), result_of(words)
    run, data = load_run(config.run_dir.path), open_data([config], GROUP)
    images, augmentation = data.feed.images["val"], Augmentation.of([config], img_size=8, device=GROUP.device)
    found = []
    for ema in (False, True):
        model = run.model(ema=ema)
        with torch.no_grad():
            logits = model(augmentation.evaluated(images.images))  # type: ignore[union-attr]
        hits = (logits.argmax(1) == images.labels).float().mean()  # type: ignore[union-attr]
        found.append((hits.item(), F.cross_entropy(logits, images.labels).item()))  # type: ignore[union-attr]
    assert found[0] != found[1]
    assert (result.val_top1, result.val_loss) == pytest.approx(found[0], rel=1e-2)  # bfloat16
    assert (result.ema_val_top1, result.ema_val_loss) == pytest.approx(found[1], rel=1e-2)
    assert (result.top1, result.top5, result.loss) == (result.ema_val_top1, result.ema_val_top5, result.ema_val_loss)
    last = metrics(config.run_dir)[-1]
    assert (last["val/top1"], last["ema_val/top1"]) == (result.val_top1, result.ema_val_top1)
    assert f"val top-1 (EMA) {100 * result.top1:.2f} % after 3 epochs" in capfd.readouterr().err


def test_without_it_nothing_is_averaged(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, "train.epochs=1")
    assert main(words) == 0
    config, result = config_of(words), result_of(words)
    assert (result.ema_val_top1, result.top1, result.loss) == (None, result.val_top1, result.val_loss)
    assert not any(name.startswith("ema") for row in metrics(config.run_dir) for name in row)
    newest = load_newest(config.run_dir)
    assert newest is not None
    assert "ema" not in newest[1].state()
    with pytest.raises(RunError, match=r"keeps no average of the weights; train it with train\.ema_decay"):
        load_run(config.run_dir.path).model(ema=True)


def test_stopped_and_resumed_it_ends_with_the_same_bits(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = ["runtime.poll_every_steps=1", "runtime.log_every_steps=1"]
    whole, halves = (arguments(digits, tmp_path / name, *OPTIONS, *often) for name in ("whole", "halves"))
    assert main(whole) == 0
    config, original = config_of(halves), Logs.row

    def row(logs: Logs, step: int, epoch: float, values: Mapping[str, float]) -> None:
        original(logs, step, epoch, values)
        if step == 31:
            config.run_dir.stop.touch()

    with monkeypatch.context() as patch:
        patch.setattr(Logs, "row", row)
        main(halves)
    assert config.run_dir.checkpoint_steps() == {32}
    config.run_dir.stop.unlink(missing_ok=True)
    assert main(halves) == 0
    assert result_of(halves).weights_sha256 == result_of(whole).weights_sha256
    assert_close(average_of(config), average_of(config_of(whole)), 0)
    assert metrics(config.run_dir) == metrics(config_of(whole).run_dir)


def test_a_checkpoint_without_it_does_not_fit(digits: Path, tmp_path: Path) -> None:
    with_it, without = (arguments(digits, tmp_path, *OPTIONS, f"train.ema_decay={decay}") for decay in (0.95, 0))
    t = set_up([config_of(with_it)], GROUP)
    assert main(without) == 0
    path = max(config_of(without).run_dir.checkpoints.iterdir())
    with pytest.raises(CheckpointError, match=r"does not fit the run: an evaluation of val/loss, val/top1, val/top5"):
        load(path, config_of(without).signature, layout(t))


@pytest.mark.slow
def test_replicas_and_processes_have_the_average_of_a_run_alone(digits: Path, tmp_path: Path) -> None:
    exact = [*OPTIONS, "train.precision=float32", "train.epochs=2"]
    alone, together, two = (arguments(digits, tmp_path / name, *exact) for name in ("alone", "together", "two"))
    assert main([*together, "--seeds", "0,1"]) == 0
    for seed in (0, 1):
        assert main([*alone, f"seed={seed}"]) == 0
        ours, theirs = (average_of(config_of([*words, f"seed={seed}"])) for words in (together, alone))
        assert_close(ours, theirs, 1e-6)
    process = start(two, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
    output = finish(process)[0]
    assert process.returncode == 0, output
    assert_close(average_of(config_of(two)), average_of(config_of([*alone, "seed=0"])), 1e-4)
    assert result_of(two).ema_val_top1 == pytest.approx(result_of([*alone, "seed=0"]).ema_val_top1, abs=0.01)


@pytest.mark.slow
def test_compiled_it_is_the_same_to_rounding(digits: Path, tmp_path: Path) -> None:
    eager, compiled = (arguments(digits, tmp_path / step, *OPTIONS, "train.precision=float32", "train.epochs=1",
                                 f"runtime.step={step}") for step in ("eager", "compile"))  # fmt: skip
    assert main(eager) == main(compiled) == 0
    assert_close(average_of(config_of(compiled)), average_of(config_of(eager)), 1e-4)
    assert result_of(compiled).ema_val_loss == pytest.approx(result_of(eager).ema_val_loss, rel=1e-3)
