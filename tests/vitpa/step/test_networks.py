"""Training a network that is no ViT: the ResNet's steps, evaluation, resumption, and what it does not support."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.support.checkpoints import load_newest
from tests.support.trainings import arguments, config_of, metrics, start, trained
from tests.support.waiting import finish
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path
from vitpa.data.resident import decoded
from vitpa.data.rng import Purpose, key, permutation
from vitpa.datasets import facts_of
from vitpa.models import build_model, resnet
from vitpa.optim import adamw, learning_rates
from vitpa.train_command import main

RESNET = ["model.kind=resnet18", "runtime.cpu_threads=1"]
PHOTOS = [*RESNET, "dataset=photos", "model.img_size=16", "augment.crop=random_resized", "train.global_batch_size=4"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network with fewer and narrower layers, so that the tests are quick."""
    monkeypatch.setattr(resnet, "BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(resnet, "CHANNELS", (8, 8, 16, 16))


def trained_in_the_usual_way(config: RunConfig, data: Path) -> tuple[torch.nn.Module, float]:
    """The module and its mean loss on val."""
    splits = {split: decoded(Beton.open(beton_path(data, "digits", split)), 8) for split in ("train", "val")}
    augmentation = Augmentation([config.augment], facts_of("digits"), img_size=8, device=torch.device("cpu"))
    model = build_model(**dict(config.model), num_classes=10, seed=key(config.seed, Purpose.INIT))
    optim, batch_size, (images, labels) = config.optim, config.train.global_batch_size, splits["train"]
    optimizer = adamw(model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, fused=False)
    order, keys = permutation(key(config.seed, Purpose.ORDER, 0), len(labels)), epoch_keys([config.seed], 0)
    for step, rate in enumerate(learning_rates([config], len(labels) // batch_size)[:, 0].tolist()):
        samples = order[step * batch_size : (step + 1) * batch_size]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        logits = model.train()(augmentation(images[samples], samples, keys))
        F.cross_entropy(logits, labels[samples], label_smoothing=optim.label_smoothing).backward()
        assert optim.grad_clip_norm is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip_norm)
        optimizer.step()
    with torch.no_grad():
        images, labels = splits["val"]
        return model, float(F.cross_entropy(model.eval()(augmentation.evaluated(images)), labels))


def test_it_is_trained_and_evaluated_as_the_module_itself_would_be(digits: Path, tmp_path: Path) -> None:
    options = ["train.epochs=1", "train.global_batch_size=450", "augment.permute_block_px=2", "optim.warmup_epochs=0"]
    options += [
        "optim.lr=1e-2",
        "optim.eps=1e-4",
    ]  # at 1e-8 a gradient of rounding errors alone moves a weight by the whole rate
    words = arguments(digits, tmp_path, *RESNET, *options)
    result, config = trained(words), config_of(words)
    newest = load_newest(config.run_dir)
    assert newest is not None
    model, val_loss = trained_in_the_usual_way(config, digits)
    expected = model.state_dict()
    assert expected["bn1.num_batches_tracked"] == result.steps == 3
    assert newest[1].model.keys() == expected.keys()
    for name, value in newest[1].model.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3, msg=name)
    assert result.val_loss == pytest.approx(val_loss, rel=1e-3)
    assert result.attention == "content"
    assert not any(value.endswith("left.json") for value in map(str, config.run_dir.path.rglob("*")))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_it_ends_bit_identical(photos: Path, tmp_path: Path, precision: str) -> None:
    options = [*PHOTOS, "train.epochs=4", f"train.precision={precision}", "runtime.checkpoint_every_steps=5"]
    words = arguments(photos, tmp_path, *options, "runtime.log_every_steps=1", "runtime.tensorboard=true")
    undisturbed, run = trained(words), config_of(words).run_dir
    curve = metrics(run)
    run.result_json.unlink()
    assert run.checkpoint_steps() == {10, 12}
    (run.checkpoints / "step_000000012.pt").unlink()
    resumed = trained(words)
    assert resumed.attempts == 2
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    assert metrics(run) == curve


@pytest.mark.slow
def test_its_compiled_step_is_the_same_to_rounding(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*PHOTOS, "train.epochs=2", "optim.lr=1e-4"]
    eager, compiled = (
        trained(arguments(photos, tmp_path / step, *options, f"runtime.step={step}")) for step in ("eager", "compile")
    )
    assert "could not be compiled" not in capfd.readouterr().err
    assert compiled.val_loss == pytest.approx(eager.val_loss, rel=0.02)


@pytest.mark.slow
def test_several_processes_are_refused_in_a_line(digits: Path, tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vitpa.train")
    process = start(arguments(digits, tmp_path, *RESNET), *launcher)
    said = finish(process)[0]
    assert process.returncode != 0
    assert re.search(
        r"^vitpa train: model\.kind=resnet18: its batch norm .* whole batch, and 2 processes have a part", said, re.M
    )


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnGpu:
    """The CUDA graph, whose replays must update the running statistics, too."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_graph_compiled_and_eager_agree(
        self, digits: Path, tmp_path: Path, precision: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        options = [*RESNET, "runtime.device=cuda", f"train.precision={precision}", "train.epochs=2", "optim.warmup_epochs=0"]
        losses = {}
        for step in ("eager", "compile", "graph"):
            words = arguments(digits, tmp_path / step, *options, f"runtime.step={step}")
            result, newest = trained(words), load_newest(config_of(words).run_dir)
            assert newest is not None
            assert newest[1].model["bn1.num_batches_tracked"] == result.steps == 44
            losses[step] = result.val_loss
        error = capfd.readouterr().err
        assert "could not be compiled" not in error
        assert "no CUDA graph of the step could be made" not in error
        assert losses["compile"] == pytest.approx(losses["eager"], rel=0.2)
        assert losses["graph"] == pytest.approx(losses["compile"], rel=0.2)


def test_seeds_are_trained_one_by_one(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(digits, tmp_path, *RESNET), "--seeds", "0,1"]) == 1
    error = capsys.readouterr().err
    reason = "model.kind=resnet18: replicas are ViTs; train them one by one"
    assert error == f"vitpa train: 2 runs cannot be trained together: {reason}\n"
