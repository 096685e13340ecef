"""`vitpa bench` on the CPU with tiny models: the cases, the table, the file, and the arithmetic it counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from jobs.plan.speeds import Benchmark, load_benchmark, setup_of
from vitpa.arguments import ConfigError
from vitpa.bench import imagenet, measure, small
from vitpa.bench.command import main, parse
from vitpa.bench.measure import step_runner
from vitpa.bench.report import COLUMNS, Report, table, with_ratios
from vitpa.bench.schema import ATTENTIONS, Case, Line
from vitpa.config_file import load_config, shipped_configs
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path
from vitpa.distributed import Group
from vitpa.flops import gflop_per_image
from vitpa.step.step import ReplicaSteps

TINY = ["model.depth=1", "model.embed_dim=24", "train.global_batch_size=4", "runtime.step=eager"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make a step of this size take a hundred times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured_on_a_gpu(file: Path) -> Benchmark:
    """As `vitpa sweep plan --speeds` reads the file, once it says so: figures of a CPU are refused."""
    with pytest.raises(ConfigError, match="measured on a CPU"):
        load_benchmark(file)
    on_gpu = file.with_name("on_gpu.json")
    on_gpu.write_text(json.dumps({**json.loads(file.read_text()), "gpu": "NVIDIA X"}))
    return load_benchmark(on_gpu)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_it_names_the_kernels_that_take_most_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small, "NUM_IMAGES", {"train": 40, "val": 8})
    file = tmp_path / "figures.json"
    words = ["--only-graph", "--no-ablation", "--attention", "content", "--replicas", "1", "--window-s", "0.01"]
    assert main(["small", *TINY, *words, "--kernels", "10000", "--json", str(file)]) == 0
    (line,) = measured_on_a_gpu(file).results
    assert sum(kernel.share for kernel in line.kernels) == pytest.approx(1)
    assert [kernel.share for kernel in line.kernels] == sorted((kernel.share for kernel in line.kernels), reverse=True)
    by_name = {kernel.name: kernel for kernel in line.kernels}
    assert by_name["aten::gelu_backward"].calls_per_step == 1  # of the one block
    said = capsys.readouterr().err
    first = line.kernels[0]
    assert f"{first.share:6.1%} {first.us_per_step:9.1f} us {first.calls_per_step:6.1f} x {first.name[:20]}" in said


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_it_prints_a_table_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small, "NUM_IMAGES", {"train": 40, "val": 8})
    monkeypatch.setattr(measure, "WINDOWS", 2)
    file, link = tmp_path / "figures.json", tmp_path / "link.json"
    file.write_text("{}")
    link.symlink_to(file)
    assert main(["small", *TINY, "--replicas", "1,2", "--window-s", "0.01", "--json", str(link)]) == 0
    assert link.is_symlink()
    said = capsys.readouterr()
    document = json.loads(file.read_text())
    assert {"versions", "code_version", "gpu", "peak_matmul_tflops", "results"} <= set(document)
    assert "host" not in document and document["complete"]
    written = measured_on_a_gpu(file)
    assert (written.name, {setup_of(line.case) for line in written.results}) == ("small", {(1, 4, 1), (1, 4, 2)})
    assert written.network == load_config(shipped_configs()["cifar10"], TINY).network()
    assert written.augment == load_config(shipped_configs()["cifar10"]).augment.model_dump(mode="json")
    peak = document["peak_matmul_tflops"]
    assert peak > 0
    cases = [line.case for line in written.results]
    models: list[tuple[Literal["timm", "vitpa"], int]] = [("timm", 1), ("vitpa", 1), ("vitpa", 2)]
    assert cases == [  # runtime.step=eager is what is measured, of timm's module and of ours
        Case(model=model, attention=attention, step="eager", replicas=count, augmentation=augmentation, gpus=1, batch_size=4)
        for attention in ATTENTIONS
        for augmentation in (True, False)
        for model, count in models
    ]
    timm = {
        (case.attention, case.augmentation): line
        for case, line in zip(cases, written.results, strict=True)
        if case.model == "timm"
    }
    for line in written.results:
        assert line.spread >= 0
        assert line.start_s > 0
        assert line.peak_memory_gib is None  # not on a GPU
        assert line.notes == ()
        assert line.times_timm == line.images_per_s / timm[line.case.attention, line.case.augmentation].images_per_s
        assert (line.times_one_gpu, line.of_synthetic) == (None, None)
        gflop = gflop_per_image(load_config(shipped_configs()["cifar10"], [*TINY, f"model.attention={line.case.attention}"]))
        assert line.mfu == pytest.approx(line.images_per_s * gflop / 1000 / peak)
    assert said.out == table(written.results) + "\n"
    assert [line.split(":")[0] for line in said.err.splitlines()[-len(cases) :]] == [str(case) for case in cases]


def line(images_per_s: float, name: str = "vitpa", gpus: int = 1, batch_size: int = 4, **case: Any) -> Line:
    """Figures of which only the rate matters."""
    values = {"model": name, "attention": "content", "step": "auto", "replicas": 1, **case}
    if name == "loader":
        values |= {"model": None, "attention": None, "step": None}
    return Line(
        case=Case(gpus=gpus, batch_size=batch_size, **values),
        images_per_s=images_per_s,
        spread=0.015,
        peak_memory_gib=None,
        start_s=1.25,
        mfu=0.314,
    )


def test_ratios_are_to_timm_to_one_gpu_and_to_images_on_the_device() -> None:
    jpeg: dict[str, Any] = {"images": "JPEG", "decoder": "cpu"}
    lines = [
        line(10, "timm", step="compile", augmentation=False),
        line(15, augmentation=False),
        line(12),
        line(40, "loader", augmentation=False, **jpeg),
        line(9, **jpeg),
        line(1, attention="positional"),
        line(24, gpus=2, batch_size=4),
        line(30, gpus=2, batch_size=8),
        line(27, gpus=2, batch_size=8, **jpeg),
    ]
    found = [(each.times_timm, each.times_one_gpu, each.of_synthetic) for each in with_ratios(lines)]
    assert found == [
        (1, None, None), (1.5, None, None), (1.2, None, None), (None, None, None), (0.9, None, 0.75), (None, None, None),
        (2.4, 2, None), (3, 2.5, None), (2.7, 3, 0.9),
    ]  # fmt: skip
    eager, compiled = line(5, "timm", step="eager"), line(10, "timm", step="compile")
    bare = line(8, "timm", step="eager", augmentation=False)
    small_lines = [eager, compiled, line(50, replicas=5), bare, line(80, replicas=5, augmentation=False)]
    assert [each.times_timm for each in with_ratios(small_lines)] == [1, 2, 10, 1, 10]
    settings = [line(10), line(40, replicas=4), line(36, replicas=4, differing=("optim.lr",)), line(9, attention="positional")]
    assert [each.times_one_run for each in with_ratios(settings)] == [None, 4, 3.6, None]


def test_each_line_is_in_the_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["imagenet", "--json", str(tmp_path / "figures.json")])
    config = load_config(shipped_configs()["imagenet"])
    with pytest.raises(SystemExit), Report(options, config) as report:
        assert not options.json.exists()
        for count in (1, 2):
            report.add(line(100, "timm", step="compile"))
            document = json.loads(options.json.read_text())
            assert (len(document["results"]), document["complete"]) == (count, False)
        raise SystemExit
    assert not json.loads(options.json.read_text())["complete"]
    assert capsys.readouterr().out == table(with_ratios(report.lines)) + "\n"


def test_the_table_has_a_row_for_each_line() -> None:
    head, row = table([line(12345.6, images="JPEG", decoder="gpu", replicas=5)]).splitlines()
    assert re.split(r" {2,}", head.strip()) == list(COLUMNS)
    assert re.split(r" {2,}", row.strip()) == [
        "training, JPEG, gpu", "content", "auto", "5", "1", "4", "12,346", "1.5%", "-", "-", "-", "-", "-", "31.4%", "-", "-",
        "1.2",
    ]  # fmt: skip


def test_a_wrong_override_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["small", "model.dept=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vitpa bench: ")
    assert "did you mean model.depth?" in error


@pytest.mark.parametrize("name", ["small", "imagenet"])
def test_a_file_that_cannot_be_written_is_found_out_before_anything_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = {
        tmp_path / "none" / "x.json": "No such file or directory",
        tmp_path / "pipe" / "x.json": "Not a directory",
        tmp_path / "pipe": "not a regular file; name a file",
        tmp_path: "not a regular file; name a file",
    }
    for place, reason in places.items():
        assert main([name, "--json", str(place)]) == 1
        assert capsys.readouterr().err == f"vitpa bench: {place}: {reason}\n"
    (tmp_path / "x.json").write_text("what was there")
    assert main([name, "model.dept=1", "--json", str(tmp_path / "x.json")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "x.json"}
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "x.json").read_text() == "what was there"
    with pytest.raises(SystemExit, match="2"):
        main([name, "--json", ""])
    assert "argument --json: expected the name of a file" in capsys.readouterr().err


def test_the_cases_of_small() -> None:
    ways = [("timm", "eager", 1), ("timm", "compile", 1), ("vitpa", "graph", 1), ("vitpa", "graph", 5)]
    found = small.cases(parse(["small", "--replicas", "1,5"]))
    assert [(case.attention, case.augmentation, case.model, case.step, case.replicas) for case in found] == [
        (attention, augmentation, *way) for attention in ATTENTIONS for augmentation in (True, False) for way in ways
    ]
    for case, configs in found.items():
        assert [config.seed for config in configs] == list(range(case.replicas))
        assert {(config.augment.policy == "none") for config in configs} == {not case.augmentation}
        assert {(config.model.attention, config.runtime.step) for config in configs} == {(case.attention, case.step)}
    fewer = ["--attention", "positional", "--replicas", "5", "--no-ablation"]
    assert [str(case) for case in small.cases(parse(["small", *fewer]))] == [
        "timm, training, synthetic positional eager",
        "timm, training, synthetic positional compile",
        "training, synthetic positional graph R=5",
    ]
    assert [str(case) for case in small.cases(parse(["small", *fewer, "--only-graph"]))] == [
        "training, synthetic positional graph R=5"
    ]


def test_the_cases_of_settings() -> None:
    words = ["small", "--only-graph", "--no-ablation", "--attention", "content", "--replicas", "1"]
    found = small.cases(parse([*words, "optim.lr=5e-4,1e-3", "optim.weight_decay=0.02,0.1"]))
    assert [str(case) for case in found] == [
        "training, synthetic content graph",
        "training, synthetic content graph R=4",
        "training, synthetic, by optim.lr x optim.weight_decay content graph R=4",
    ]
    alone, equal, apart = found.values()
    assert {(each.optim.lr, each.optim.weight_decay) for each in (*alone, *equal)} == {(5e-4, 0.02)}
    assert [(each.optim.lr, each.optim.weight_decay, each.seed) for each in apart] == [
        (5e-4, 0.02, 0), (5e-4, 0.1, 0), (1e-3, 0.02, 0), (1e-3, 0.1, 0)
    ]  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_step_of_settings_has_the_settings_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_STEPS", 4)
    words = ["small", *TINY, "--only-graph", "--no-ablation", "--attention", "content", "--replicas", "1"]
    cases = small.cases(parse([*words, "optim.lr=5e-4,1e-3", "optim.label_smoothing=0.0,0.2"]))
    group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    found = []
    for case, configs in cases.items():
        feed = measure.synthetic_feed(case, configs[0], group, {"train": 40, "val": 8})
        steps = measure.make_steps(case, configs, group, feed)
        assert isinstance(steps, ReplicaSteps)
        found.append((steps.learning_rates[0].tolist(), torch.as_tensor(steps.label_smoothing).tolist()))
    assert found == [([5e-5], 0.0), ([5e-5] * 4, 0.0), ([5e-5, 5e-5, 1e-4, 1e-4], [0.0, 0.2, 0.0, 0.2])]


def test_the_cases_of_imagenet() -> None:
    options = parse(["imagenet", "--batch-size", "4", "--attention", "content", "--step", "compile"])
    found = imagenet.cases(options, 1, "raw", ["gpu", "cpu"])
    assert [str(case) for case in found] == [
        "timm, model content compile", "model content compile", "training, synthetic content compile",
        "loader, raw, gpu", "training, raw, gpu content compile", "loader, raw, cpu", "training, raw, cpu content compile",
    ]  # fmt: skip
    assert [config.augment.policy for config in found.values()][:3] == ["none", "none", "randaugment_timm"]
    assert [(case.name, case.gpus, case.batch_size) for case in imagenet.cases(options, 2)] == [
        (name, 2, size) for size in (4, 8) for name in ("model", "training, synthetic")
    ]


def test_arithmetic_of_the_papers_small_vit() -> None:
    """A step per image, 10^9 operations, summed layer by layer for 65 tokens of 384 in 7 blocks, MLP as wide as they are."""
    recipe = shipped_configs()["cifar10"]
    content = gflop_per_image(load_config(recipe))
    assert content == pytest.approx(2.55, rel=0.01)
    qkv, scores, mixing, projection, mlp = 65 * 384 * 1152, 65 * 65 * 384, 65 * 65 * 384, 65 * 384 * 384, 2 * 65 * 384 * 384
    patches = 64 * 48 * 384
    assert content == pytest.approx(6 * (7 * (qkv + scores + mixing + projection + mlp) + patches) / 1e9)
    positional = gflop_per_image(load_config(recipe, ["model.attention=positional"]))
    assert positional == pytest.approx(6 * (7 * (qkv / 3 + mixing + projection + mlp) + patches) / 1e9)
    pooled = gflop_per_image(load_config(recipe, ["model.global_pool=avg"]))  # 64 tokens
    by_token, by_pair = qkv + projection + mlp, scores + mixing
    assert pooled == pytest.approx(6 * (7 * (by_token * 64 / 65 + by_pair * (64 / 65) ** 2) + patches) / 1e9)


SMALL_IMAGENET = ["model.img_size=32", "model.depth=1", "model.embed_dim=24", "runtime.step=eager"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_imagenet_on_one_process_and_on_two(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = [*SMALL_IMAGENET, "--dataset", "photos", f"runtime.data_dir={photos}", "--gpus", "1,2", "--batch-size", "4"]
    assert main(["imagenet", *words, "--attention", "positional", "--window-s", "0.01", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert {"versions", "code_version", "gpu", "peak_matmul_tflops"} <= set(document) and document["complete"]
    written = measured_on_a_gpu(file)
    lines = written.results
    config = load_config(shipped_configs()["imagenet"], [*SMALL_IMAGENET, "model.attention=positional"])
    assert (written.name, written.dataset, written.network) == ("imagenet", "photos", config.network())
    assert written.augment == config.augment.model_dump(mode="json")
    one = ["timm, model", "model", "training, synthetic", "loader, JPEG, cpu", "training, JPEG, cpu"]
    found = [(line.case.name, line.case.gpus, line.case.batch_size) for line in lines]
    assert found == [
        (case, gpus, size) for gpus, size in ((1, 4), (2, 4), (2, 8)) for case in one if gpus == 1 or "timm" not in case
    ]
    rates = {place: line.images_per_s for place, line in zip(found, lines, strict=True)}
    for place, line in zip(found, lines, strict=True):
        no_model = "loader" in line.case.name
        assert line.case.attention == (None if no_model else "positional")
        assert line.case.step == (None if no_model else "eager")
        assert (line.mfu is None) == no_model
        expected = None if no_model else line.images_per_s / rates["timm, model", 1, 4]
        assert line.times_timm == expected
        assert line.times_one_gpu == (None if line.case.gpus == 1 else line.images_per_s / rates[line.case.name, 1, 4])
        synthetic = rates["training, synthetic", *place[1:]] if line.case.name.startswith("training, JPEG") else None
        assert line.of_synthetic == (line.images_per_s / synthetic if synthetic else None)
    assert capfd.readouterr().out == table(lines) + "\n"


def test_what_imagenet_cannot_measure_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL_IMAGENET, f"runtime.data_dir={tmp_path}", "--dataset", "photos", "--parts", "loader", "--batch-size", "4"]
    assert main(["imagenet", *words]) == 1
    error = capfd.readouterr().err
    assert "vitpa bench: " in error and "photos/train.beton: no such file" in error
    assert "Traceback" not in error.partition("ChildFailedError")[0].partition("vitpa bench: ")[2].splitlines()[0]


def test_a_data_set_of_less_than_a_batch_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL_IMAGENET, "--dataset", "photos", f"runtime.data_dir={photos}", "--gpus", "1,2", "--batch-size", "4096"]
    assert main(["imagenet", *words]) == 1
    said = capsys.readouterr().err.splitlines()
    assert re.search(r"--dataset photos: 12 images, less than a batch of 8192; say --batch-size$", said[-1])


class CountedSteps:
    """Steps of which only their order matters."""

    def __init__(self) -> None:
        self.said: list[int | str] = []
        self.loaded = False
        self.accumulator = self

    def begin_epoch(self, epoch: int, step: int) -> None:
        self.said.append(f"epoch {epoch} from {step}")

    def load(self) -> None:
        assert not self.loaded
        self.loaded = True

    def step(self) -> None:
        assert self.loaded
        self.loaded = False
        self.said.append(len([word for word in self.said if not isinstance(word, str)]))

    def take(self) -> None:
        self.said.append("window")


def test_measured_windows_go_on_where_the_last_one_ended() -> None:
    steps = CountedSteps()
    run = step_runner(steps, 3)  # type: ignore[arg-type]
    for count in (2, 1, 2):
        run(count)
    assert steps.said == ["epoch 0 from 0", 0, 1, 2, "epoch 1 from 0", 3, 4]
    run(45)
    assert steps.said.count("window") == 1 and steps.said[-1] == "window"


@pytest.mark.slow
def test_what_was_measured_before_a_failure_is_kept(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(photos / "photos", tmp_path / "photos")
    with Beton.open(beton_path(tmp_path, "photos", "train")) as beton, beton.path.open("r+b") as data:
        data.seek(int(beton.offsets[5]))
        data.write(bytes(int(beton.sizes[5])))
    file = tmp_path / "figures.json"
    words = [*SMALL_IMAGENET, f"runtime.data_dir={tmp_path}", "--dataset", "photos", "--parts", "timm,model,loader"]
    words += ["--attention", "positional", "--batch-size", "4", "--gpus", "1,2", "--window-s", "0.01", "--json", str(file)]
    assert main(["imagenet", *words]) == 1
    said = capfd.readouterr()
    assert "the JPEG of sample 5 cannot be decoded" in said.err and "measuring with 1 processes has failed" in said.err
    document = json.loads(file.read_text())
    results = document["results"]
    assert not document["complete"]
    assert [(line["case"]["model"], line["case"]["gpus"]) for line in results] == [("timm", 1), ("vitpa", 1)]
    assert said.out.splitlines()[-1].startswith("model ")


def descendants(pid: int | str) -> list[str]:
    """Processes that this one has started, and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(each for child in children for each in descendants(child))]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_what_was_measured_before_sigterm_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = [*SMALL_IMAGENET, "--parts", "model", "--attention", "positional", "--batch-size", "4", "--json", str(file)]
    command = [sys.executable, "-m", "vitpa.cli", "bench", "imagenet", *words, "--gpus", "1,2", "--window-s", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None and bench.stderr is not None
        line = next(line for line in bench.stderr if line.startswith("model positional eager: "))
        started = [Path("/proc", pid) for pid in descendants(bench.pid)]
        bench.terminate()
        time.sleep(0.2)  # the first one is being seen to
        bench.terminate()
        out, err = bench.stdout.read(), bench.stderr.read()
    assert err.strip().splitlines() == ["vitpa bench: ended by SIGTERM; what was measured is kept"]  # nothing of torchrun's
    assert bench.returncode == 128 + signal.SIGTERM
    assert len(started) >= 2 and not any(process.exists() for process in started)
    document = json.loads(file.read_text())
    assert not document["complete"]
    assert f"{document['results'][0]['images_per_s']:,.0f} images/s" in line
    assert out.splitlines()[-1].startswith("model ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "nope"], r"nope/train\.beton: no such file"),
        (["--batch-size", "7"], r"--batch-size 7 is not even for each of 1 processes$"),
        (["model.attention=positional"], r"model\.attention=positional: say it by --attention$"),
        (["train.global_batch_size=8", "--batch-size", "4"], r"train\.global_batch_size=8: say it by --batch-size$"),
        (["runtime.step=eager", "--step", "compile"], r"runtime\.step=eager and --step compile: say one of the two$"),
        (
            ["runtime.accum_steps=2", "--batch-size", "4"],
            r"runtime\.accum_steps=2: this benchmark does without; leave it out$",
        ),
        (["model.kind=resnet18", "--batch-size", "4"], r"model\.kind=resnet18: benchmarks measure ViTs; leave it out$"),
        (
            ["train.image_sizes=[[0,224]]", "--batch-size", "4"],
            r"train\.image_sizes=.*: benchmarks measure one size; ",
        ),
        (["--parts", "loader"], r"--parts loader: say with --dataset what is to be loaded$"),
        (["modle.depth=3", "--batch-size", "4"], r"command line: unknown key modle\.depth; did you mean model\.depth\?$"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["imagenet", *words, f"runtime.data_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(message, said[0])


def test_that_nothing_could_be_measured_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measures_nothing(gpus: int, *_: object) -> None:
        asked.append(gpus)

    monkeypatch.setenv("WORLD_SIZE", "1")  # as some containers have it: this is none of torchrun's processes
    monkeypatch.setattr(imagenet, "measure_with", measures_nothing)
    assert main(["imagenet", "--parts", "timm", "--gpus", "1,1", "--json", str(tmp_path / "figures.json")]) == 1
    assert asked == [1]
    assert capsys.readouterr().err.splitlines()[-1] == "vitpa bench: none of these parts could be measured here"


@pytest.mark.parametrize("word", ["model", "--gpu-count"])
def test_words_that_mean_nothing_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["small", "model.depth=1", "--replicas", "1", word])
    assert f"vitpa bench: error: unrecognized arguments: {word}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--batch-size", "4,8"], ["--window-s", "-1"], ["--gpus", "x"]])
def test_impossible_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["imagenet", *words])
    assert f"argument {words[0]}: {words[1]!r}" in capsys.readouterr().err
