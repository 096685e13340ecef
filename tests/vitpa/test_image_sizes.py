"""Progressive image size, trained for real on photos: against timm's module, resumed anywhere, compiled once for each size."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch.nn import functional as F

from tests.support.checkpoints import load_newest
from tests.support.trainings import arguments, config_of, metrics, result_of, trained
from vitpa.analysis.images import val_images
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path
from vitpa.data.rng import Purpose, key, permutation
from vitpa.data.stream import StreamedImages
from vitpa.distributed import Group
from vitpa.models import build_model
from vitpa.optim import adamw, learning_rates
from vitpa.train import set_up
from vitpa.train_command import main
from vitpa.trained import load_run

CPU = torch.device("cpu")
EPOCH_STEPS = 3  # 12 photos at batch 4
PHOTOS = [
    "dataset=photos",
    "model.img_size=32",
    "model.patch_size=8",
    "augment.crop=random_resized",
    "augment.policy=randaugment_timm",  # shifts are shares of the size
    "train.global_batch_size=4",
    "train.image_sizes=[[0,16],[1,24],[2,32]]",
    "runtime.cpu_threads=1",
    "runtime.log_every_steps=1",
]


def trained_in_the_usual_way(config: RunConfig, data: Path) -> VisionTransformer:
    """timm's module, which resamples its positional encodings by itself, with autograd and torch's AdamW."""
    beton = Beton.open(beton_path(data, "photos", "train"))
    init = build_model(**dict(config.model), num_classes=2, seed=key(config.seed, Purpose.INIT))
    sizes = {name: getattr(config.model, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    model = VisionTransformer(**sizes, mlp_ratio=config.model.mlp_ratio, num_classes=2, dynamic_img_size=True)
    model.load_state_dict(init.state_dict())
    optim = config.optim
    optimizer = adamw(model, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, fused=False)
    rates = iter(learning_rates([config], EPOCH_STEPS)[:, 0].tolist())
    for epoch in range(config.train.epochs):
        img_size = [16, 24, 32, 32][epoch]
        images = StreamedImages(beton, config.augment, img_size=img_size, seed=config.seed, device=CPU, workers=1)
        augmentation = Augmentation.of([config], img_size=img_size, device=CPU)
        order = permutation(key(config.seed, Purpose.ORDER, epoch), len(beton)).split(4)
        for batch, rate in zip(images.train_batches(order, epoch), itertools.islice(rates, EPOCH_STEPS), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            logits = model(augmentation(batch.images, batch.samples, epoch_keys([config.seed], epoch)))
            F.cross_entropy(logits, batch.labels, label_smoothing=optim.label_smoothing).backward()
            assert optim.grad_clip_norm is not None
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip_norm)
            optimizer.step()
    return model


def test_it_trains_as_timms_module_of_any_size_does_and_is_evaluated_at_full_size(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = arguments(photos, tmp_path, *PHOTOS, "train.precision=float32", "optim.lr=1e-3")
    result, config = trained(words), config_of(words)
    said = capfd.readouterr().err
    assert "(streamed images of 16 px, evaluated on val)" in said
    assert [line for line in said.splitlines() if line.startswith("image size")] == [
        "image size 16 -> 24 px from epoch 1",
        "image size 24 -> 32 px from epoch 2",
    ]
    newest = load_newest(config.run_dir)
    assert newest is not None
    ours, theirs = newest[1].model, trained_in_the_usual_way(config, photos).state_dict()
    for name, value in ours.items():
        if name.endswith(".qkv.bias"):
            value[16:32] = theirs[name][16:32]  # of the keys, whose gradient is 0 but for rounding
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=name)
    model = load_run(config.run_dir.path).model()
    labels = torch.from_numpy(Beton.open(beton_path(photos, "photos", "val")).labels)
    with torch.no_grad():
        logits = torch.cat([model(images) for images in val_images(config, len(labels))])
    assert logits.shape == (7, 2)
    assert result.val_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.slow
def test_resumed_at_a_change_or_amid_an_epoch_it_ends_bit_identical(photos: Path, tmp_path: Path) -> None:
    options = [*PHOTOS, "model.attention=positional", "runtime.checkpoint_every_steps=1"]
    whole, words = (arguments(photos, tmp_path / name, *options) for name in ("whole", "parts"))
    undisturbed, run = trained(whole), config_of(words).run_dir
    for epoch in (1, 2):
        assert main([*words, f"runtime.stop_after_epoch={epoch}"]) == 0
        assert run.checkpoint_steps() == {epoch * EPOCH_STEPS - 1, epoch * EPOCH_STEPS}
    (run.checkpoints / "step_000000006.pt").unlink()  # the last step of 24 px comes again
    assert trained(words).weights_sha256 == undisturbed.weights_sha256
    assert metrics(run) == metrics(config_of(whole).run_dir)


@pytest.mark.slow
def test_a_size_is_compiled_once_also_if_it_comes_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = {"forward": 0, "backward": 0}

    def counted(kind: str, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs[kind] += 1
        return nop(graph, examples)

    backend = aot_autograd(fw_compiler=partial(counted, "forward"), bw_compiler=partial(counted, "backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    options = [*PHOTOS, "model.attention=positional", "train.image_sizes=[[0,16],[1,32],[2,16],[3,32]]"]
    weights, found = {}, []
    for step in ("eager", "compile"):
        words = arguments(photos, tmp_path, *options, "train.precision=float32", f"runtime.step={step}")
        t = set_up([config_of(words)], Group(0, 1, 0, 1, CPU))
        for epoch, img_size in enumerate((16, 32, 16, 32)):
            t.steps.use_img_size(img_size)
            assert t.steps.prepare(EPOCH_STEPS * epoch) == []
            found.append(dict(graphs))
            t.steps.begin_epoch(epoch, 0)
            for _ in range(EPOCH_STEPS):
                t.steps.load()
                t.steps.step()
            assert t.steps.evaluate()[0, 3] == 7
        t.steps.close()
        weights[step] = t.replicas[0].model.state_dict()
    # the batch, the network's three parts, loss, count and update; without the last two, and without gradients; then of 32 px
    # the batch and the three parts
    assert found[4:] == [{"forward": 7 + 5, "backward": 4}, *[{"forward": 7 + 5 + 4, "backward": 4 + 3}] * 3]
    for name, value in weights["compile"].items():  # compiling amid a training leaves no trace
        torch.testing.assert_close(value, weights["eager"][name], rtol=0, atol=1e-5, msg=name)


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnGpu:
    """A CUDA graph for each size."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("attention", ["content", "positional"])
    def test_graph_compiled_and_eager_agree(
        self, photos: Path, tmp_path: Path, attention: str, precision: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        options = [*PHOTOS, "runtime.device=cuda", f"model.attention={attention}", f"train.precision={precision}"]
        losses = {}
        for step in ("eager", "compile", "graph"):
            words = arguments(photos, tmp_path / step, *options, f"runtime.step={step}", "train.epochs=8")
            losses[step] = trained(words).val_loss
        said = capfd.readouterr().err
        assert said.count("image size 24 -> 32 px from epoch 2") == 3
        assert "could not be compiled" not in said
        assert "no CUDA graph of the step could be made" not in said
        bound = 1e-3 if precision == "float32" else 0.02
        assert losses["compile"] == pytest.approx(losses["eager"], rel=bound)
        assert losses["graph"] == pytest.approx(losses["compile"], rel=1e-3)  # the same kernels

    @pytest.mark.parametrize("decoder", ["cpu", "gpu"])
    def test_resumed_it_ends_bit_identical(self, photos: Path, tmp_path: Path, decoder: str) -> None:
        options = [*PHOTOS, "runtime.device=cuda", f"runtime.decoder={decoder}"]
        whole, parts = (arguments(photos, tmp_path / name, *options) for name in ("whole", "parts"))
        assert main([*parts, "runtime.stop_after_epoch=1"]) == 0
        assert main([*parts, "runtime.stop_after_epoch=2"]) == 0
        assert trained(parts).weights_sha256 == trained(whole).weights_sha256
        assert result_of(parts).attempts == 3
