"""`vitpa bench ablation` on the CPU with tiny models: what is measured, the ratios, other loaders, and torch.func's step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitpa.bench import ablation, measure
from vitpa.bench.command import main, parse
from vitpa.bench.vmap_steps import VmapSteps
from vitpa.config_file import load_config, shipped_configs
from vitpa.distributed import Group
from vitpa.step.step import ReplicaSteps

TINY = ["model.depth=1", "model.embed_dim=24", "train.global_batch_size=4", "runtime.step=eager"]
CPU = torch.device("cpu")


def test_each_mechanism_is_off_once() -> None:
    found = ablation.cases(parse(["ablation", "--replicas", "3"]))
    content = [str(case) for case in found if case.attention == "content"]
    assert content == [
        "timm, training, synthetic content compile",
        "vmap, training, synthetic content compile R=3",
        "training, synthetic content auto R=3",
        "training, synthetic, without the CUDA graph content compile R=3",
        "training, synthetic, without compilation content eager R=3",
        "training, synthetic, without the shared step content auto",
        "training, synthetic, without the attention kernel content auto R=3",
        "training, synthetic, without the add_norm kernel content auto R=3",
        "training, synthetic, without the bias_gelu kernel content auto R=3",
        "training, synthetic, without reading rows later content auto R=3",
    ]
    assert sum("mix kernel" in str(case) for case in found) == 1  # of positional
    off = {case.without: configs[0].runtime.torch_operations for case, configs in found.items() if case.attention == "content"}
    assert off["the attention kernel"] == ("attention",) and off["the CUDA graph"] == off[None] == ()


def test_a_recipe_that_streams_and_mixes() -> None:
    options = parse(["ablation", "--recipe", "imagenet", "--attention", "positional"])
    names = [str(case) for case in ablation.cases(options, "JPEG", on_gpu=True)]
    assert names[:3] == [
        "timm, model positional compile", "vmap, model positional compile", "training, JPEG, gpu positional auto"
    ]  # fmt: skip
    assert {name.partition("without ")[2].partition(" positional")[0] for name in names[3:]} == {
        "the CUDA graph", "compilation", "the mix kernel", "the add_norm kernel", "the bias_gelu kernel", "the policy kernel",
        "the erase kernel", "reading rows later", "the decoder on the GPU",
    }  # fmt: skip
    assert names[-1] == "training, JPEG, cpu, without the decoder on the GPU positional auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_the_table_has_each_rate_over_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "NUM_IMAGES", {"train": 40, "val": 8})
    monkeypatch.setattr(measure, "WINDOWS", 2)
    file, words = tmp_path / "figures.json", ["--attention", "content", "--replicas", "2", "--window-s", "0.01"]
    assert main(["ablation", *TINY, *words, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["complete"] and document["recipe"] == "cifar10"
    rates = {line["case"]["without"]: line["images_per_s"] for line in document["results"] if line["case"]["model"] == "vitpa"}
    assert len(rates) == 6
    for line in document["results"]:
        without = line["case"]["without"]
        assert line["of_whole"] == (None if without is None else rates[without] / rates[None])
        assert line["cpu_cores"] > 0 and line["memory_gib"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_other_loaders_on_the_same_photos(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WINDOWS", 2)
    monkeypatch.setattr(measure, "MIN_LOADER_BATCHES", 3)
    file = tmp_path / "figures.json"
    words = ["--recipe", "imagenet", "--dataset", "photos", f"runtime.data_dir={photos}", "model.img_size=32"]
    assert main(["ablation", *TINY, *words, "--parts", "loaders", "--window-s", "0.01", "--json", str(file)]) == 0
    lines = json.loads(file.read_text())["results"]
    assert [(line["case"]["loader"], line["case"]["decoder"]) for line in lines] == [
        ("vitpa", "cpu"), ("ffcv", None), ("torchvision", None)
    ]  # fmt: skip
    assert lines[2]["notes"] == ["pixels differ from Pillow's by 0.00 grey levels, 0 at most"]  # both are libjpeg-turbo here


def test_what_makes_no_sense_is_one_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (
            ["--dataset", "photos"],
            "--dataset photos: the images of --recipe cifar10 lie on the device, where random ones do; leave",
        ),
        (
            ["--recipe", "imagenet", "--dataset", "photos", f"runtime.data_dir={photos}"],
            "12 images, less than a batch of 1024; say",
        ),
        (["model.kind=resnet18", "--attention", "content"], "model.kind=resnet18: benchmarks measure ViTs"),
    ):
        assert main(["ablation", *words]) == 1
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["content", "positional"])
def test_torch_func_trains_as_our_step_does(attention: str) -> None:
    """The same seeds, order and augmentation: the same losses in float32, clipping at work."""
    words = ["model.depth=2", "model.embed_dim=24", "model.num_heads=4", "train.global_batch_size=4", "runtime.step=eager"]
    changes = [*words, f"model.attention={attention}", "train.precision=float32", "optim.grad_clip_norm=0.5"]
    config, slower = (load_config(shipped_configs()["cifar10"], [*changes, f"optim.lr={lr}"]) for lr in ("1e-3", "1e-4"))
    options = parse(["ablation", *changes[:-3], "--replicas", "2", "--attention", attention])
    vmap, ours = [
        case for case in ablation.cases(options) if case.model == "vmap" or str(case).startswith("training, synthetic ")
    ]
    group, found = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU), []
    for case, kind, its in ((vmap, VmapSteps, slower), (ours, ReplicaSteps, config)):  # ours takes a tenth of the rate
        feed = measure.synthetic_feed(case, its, group, {"train": 40, "val": 8})
        steps = measure.make_steps(case, measure.replicas_of(its, 2), group, feed)
        assert isinstance(steps, kind)
        steps.prepare(0)
        measure.step_runner(steps, 10)(12)
        found.append(steps.accumulator.take().result())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0][0, 0] != found[0][1, 0]
