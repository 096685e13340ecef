"""`vitpa bench small` on the CPU with a tiny model: the table, the file, and the arithmetic it counts."""

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

import pytest
import torch

from jobs.plan.speeds import Benchmark, load_benchmark
from vitpa.arguments import ConfigError
from vitpa.bench import imagenet, main, measure, small
from vitpa.bench.measure import step_runner
from vitpa.config_file import load_config, shipped_configs
from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path

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
def test_it_prints_a_table_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small, "NUM_IMAGES", {"train": 40, "val": 8})
    monkeypatch.setattr(measure, "MIN_WINDOW_S", 0.01)
    monkeypatch.setattr(measure, "WINDOWS", 2)
    file, link = tmp_path / "figures.json", tmp_path / "link.json"
    file.write_text("{}")
    link.symlink_to(file)
    assert main(["small", *TINY, "--replicas", "1,2", "--json", str(link)]) == 0
    assert link.is_symlink()
    head, *rows = capsys.readouterr().out.splitlines()
    document = json.loads(file.read_text())
    assert {"versions", "code_version", "gpu", "product_limit_tflops", "results"} <= set(document)
    assert "host" not in document and document["complete"]
    written = measured_on_a_gpu(file)
    assert (written.name, {line.setup for line in written.results}) == ("small", {(1, 4, 1), (1, 4, 2)})
    assert written.network == load_config(shipped_configs()["cifar10"], TINY).network()
    assert written.augment == load_config(shipped_configs()["cifar10"]).augment.model_dump(mode="json")
    limit = document["product_limit_tflops"]
    assert limit > 0
    lines = document["results"]
    expected = [
        (attention, step, count, augmentation)
        for attention in ("content", "positional")
        for augmentation in (True, False)
        for step, count in (("eager", 1), ("compile", 1), ("graph", 1), ("graph", 2))
    ]
    assert [(line["attention"], line["step"], line["replicas"], line["augmentation"]) for line in lines] == expected
    eager = {(line["attention"], line["augmentation"]): line["images_per_s"] for line in lines if line["step"] == "eager"}
    for line in lines:
        assert line["images_per_s"] > 0
        assert line["spread"] >= 0
        assert line["start_s"] > 0
        assert line["peak_memory_gib"] is None  # not on a GPU
        assert line["notes"] == []
        assert line["times_eager"] == line["images_per_s"] / eager[line["attention"], line["augmentation"]]
        assert line["batch_size"] == 4
        gflop = measure.gflop_per_image(
            load_config(shipped_configs()["cifar10"], [*TINY, f"model.attention={line['attention']}"])
        )
        assert line["of_limit"] == pytest.approx(line["images_per_s"] * gflop / 1000 / limit)
    assert head.split()[:2] == ["case", "images/s"]
    assert [row[:52].strip() for row in rows] == [line["case"] for line in lines]
    assert [row[52:].split()[0] for row in rows] == [f"{line['images_per_s']:,.0f}" for line in lines]


def test_a_wrong_override_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "product_limit_tflops", lambda group: 1.0)
    monkeypatch.setattr(small, "random_images", dict)
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


def test_fewer_lines_on_request() -> None:
    assert [str(case) for case in small.cases(["positional"], [5], ablation=False)] == [
        "positional eager R=1", "positional compile R=1", "positional graph R=5",
    ]  # fmt: skip


def test_arithmetic_of_the_papers_small_vit() -> None:
    """A step per image, 10^9 operations, summed layer by layer for 65 tokens of 384 in 7 blocks, MLP as wide as they are."""
    recipe = shipped_configs()["cifar10"]
    content = measure.gflop_per_image(load_config(recipe))
    assert content == pytest.approx(2.55, rel=0.01)
    qkv, scores, mixing, projection, mlp = 65 * 384 * 1152, 65 * 65 * 384, 65 * 65 * 384, 65 * 384 * 384, 2 * 65 * 384 * 384
    patches = 64 * 48 * 384
    assert content == pytest.approx(6 * (7 * (qkv + scores + mixing + projection + mlp) + patches) / 1e9)
    positional = measure.gflop_per_image(load_config(recipe, ["model.attention=positional"]))
    assert positional == pytest.approx(6 * (7 * (qkv / 3 + mixing + projection + mlp) + patches) / 1e9)


SMALL_IMAGENET = ["model.img_size=32", "model.depth=1", "model.embed_dim=24", "runtime.step=eager"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_imagenet_on_one_process_and_on_two(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = [*SMALL_IMAGENET, "--dataset", "photos", f"runtime.data_dir={photos}", "--gpus", "1,2", "--batch-size", "4"]
    assert main(["imagenet", *words, "--attention", "positional", "--window-s", "0.01", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    lines = document["results"]
    assert {"versions", "code_version", "gpu"} <= set(document) and document["complete"]
    assert document["step"] == "eager"
    written = measured_on_a_gpu(file)
    config = load_config(shipped_configs()["imagenet"], [*SMALL_IMAGENET, "model.attention=positional"])
    assert (written.name, written.dataset, written.network) == ("imagenet", "photos", config.network())
    assert written.augment == config.augment.model_dump(mode="json")
    one = ["timm, compiled", "model", "training, synthetic", "loader, JPEG, cpu", "training, JPEG, cpu"]
    found = [(line["case"], line["gpus"], line["batch_size"]) for line in lines]
    assert found == [
        (case, gpus, size) for gpus, size in ((1, 4), (2, 4), (2, 8)) for case in one if gpus == 1 or "timm" not in case
    ]
    rates = {place: line["images_per_s"] for place, line in zip(found, lines, strict=True)}
    for place, line in zip(found, lines, strict=True):
        assert line["images_per_s"] > 0
        assert line["attention"] == (None if "loader" in line["case"] else "positional")
        expected = None if "loader" in line["case"] else line["images_per_s"] / rates["timm, compiled", 1, 4]
        assert line["times_timm"] == expected
        assert line["times_one_gpu"] == (None if line["gpus"] == 1 else line["images_per_s"] / rates[line["case"], 1, 4])
        synthetic = rates["training, synthetic", *place[1:]] if line["case"].startswith("training, JPEG") else None
        assert line["of_synthetic"] == (line["images_per_s"] / synthetic if synthetic else None)
    rows = capfd.readouterr().out.splitlines()[-len(lines) :]
    assert [row[:22].strip() for row in rows] == [line["case"] for line in lines]


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
    assert [(line["case"], line["gpus"]) for line in results] == [("timm, compiled", 1), ("model", 1)]
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
        line = next(line for line in bench.stderr if line.startswith("model positional: "))
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

    def measures_nothing(gpus: int, *_: object) -> bool:
        asked.append(gpus)
        return True

    monkeypatch.setattr(imagenet, "measure", measures_nothing)
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
