"""`vitpa sweep plan --speeds FILE`: the forecast from a benchmark's file by hand, which line counts, and why none does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.plan.speeds import Benchmark, Rate, how_to_measure, load_benchmark
from jobs.scheduler.client import Scheduler, SchedulerError
from jobs.sweep import load_sweep
from tests.support.jobs_sweeps import write_result
from tests.support.repository import ROOT
from vitpa.bench import imagenet, small
from vitpa.bench.command import parse
from vitpa.cli import main
from vitpa.config import RunConfig
from vitpa.config_file import load_config, shipped_configs
from vitpa.records import write_json

IMAGENET = load_config(shipped_configs()["imagenet"])
SMALL = load_config(shipped_configs()["cifar10"])
JPEG = "training, JPEG, gpu"
IMAGES = 300 * 1_281_167 + 300 * 50_000 / 3  # of a run: 300 epochs, and 300 evaluations, each a third
SHIPPED = ROOT / "vitpa/bench/results/small_h200.json"


def line(name: str = JPEG, attention: str | None = "content", images_per_s: float = 1000.0, **case: Any) -> dict[str, Any]:
    """A line of `vitpa bench imagenet`, by the name of its case."""
    what, *of = name.removeprefix("timm, ").split(", ")
    model = None if what == "loader" else "timm" if name.startswith("timm") else "vitpa"
    values = {
        "model": model, "attention": attention, "step": "auto" if model else None, "augmentation": what == "training",
        "images": of[0] if of else "synthetic", "decoder": of[1] if of[1:] else None,
        "gpus": 1, "batch_size": 1024, "replicas": 1, **case,
    }  # fmt: skip
    return {
        "case": values, "images_per_s": images_per_s, "spread": 0.01, "peak_memory_gib": 20.5, "start_s": 30.0, "mfu": 0.1,
    }  # fmt: skip


def small_line(images_per_s: float, attention: str = "content", **case: Any) -> dict[str, Any]:
    """A line of `vitpa bench small`."""
    values = {"step": "graph", "replicas": 5, "batch_size": 128, **case}
    return line("training, synthetic", attention, images_per_s, **values)


def written(folder: Path, config: RunConfig, *lines: Mapping[str, Any], **values: Any) -> Path:
    """A file of the benchmark of that recipe, called bench.json."""
    name = "small" if config.dataset == "cifar10" else "imagenet"
    network, augment = config.network(), config.augment.model_dump(mode="json")
    facts = {"name": name, "device": "cuda", "gpu": "NVIDIA X", "network": network, "augment": augment, "dataset": None}
    path = folder / "bench.json"
    write_json(path, {**facts, "results": list(lines), **values})
    return path


def rate(benchmark: Benchmark, *changes: str, gpus: float = 1, nodes: int = 1, replicas: int = 1) -> Rate | str:
    """Of a job of the recipe with changes."""
    recipe = shipped_configs()[benchmark.recipe]
    return benchmark.rate(load_config(recipe, changes), gpus=gpus, nodes=nodes, replicas=replicas)


class Silent(Scheduler):
    """No SLURM."""

    def ask(self, program: str, *arguments: str, with_stderr: bool = False) -> str:
        raise SchedulerError(f"{program}: not found; is this a login node of the cluster, and SLURM in PATH?")


class Shell:
    """Types `vitpa sweep plan` on a machine without GPUs, SLURM and data, unless there is some in its folder `data`."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def text(self, sweep: str, *words: str | Path) -> tuple[int, str, str]:
        where = ["--root", str(self.root), "--data-dir", str(self.root / "data")]
        code = main(["sweep", "plan", sweep, *where, *map(str, words)])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def __call__(self, sweep: str, *words: str | Path) -> tuple[int, dict[str, Any]]:
        code, out, _ = self.text(sweep, *words, "--json")
        return code, json.loads(out)

    def prepared(self, dataset: str, **counts: int) -> None:
        """There is such a data set, with as many images in each split."""
        folder = self.root / "data" / dataset
        folder.mkdir(parents=True)
        for split in ("train", "val"):
            (folder / f"{split}.beton").touch()
            if split in counts:
                write_json(folder / f"{split}.json", {"num_samples": counts[split]})


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("jobs.context.Scheduler", Silent)
    return Shell(tmp_path, capsys)


def findings(document: Mapping[str, Any], about: str) -> list[str]:
    return [finding["text"] for finding in document["findings"] if finding["about"] == about]


# --- the whole command


def test_the_papers_imagenet_by_hand(plan: Shell, tmp_path: Path) -> None:
    """10,000 s a content run and 5,000 s a positional one, five each, on one GPU: 75,000 s."""
    file = written(
        tmp_path, IMAGENET, line(images_per_s=IMAGES / 10_000), line(attention="positional", images_per_s=IMAGES / 5_000)
    )
    code, found = plan("paper_imagenet", "--speeds", file, "--gpu-hour-price", "3.60")
    assert (code, found["missing"], found["unmeasured"], found["measured"]) == (1, 10, [], {})
    assert "imagenet/train.beton: no such file; run `vitpa prep imagenet` first" in found["problem"]
    assert "`vitpa prep cifar10`, `vitpa prep cifar100`, `vitpa prep svhn`" in plan("paper_small")[1]["problem"]
    assert found["estimated_train_s"] == pytest.approx(75_000)
    assert found["wall_s"] == pytest.approx(75_000)
    assert found["gpu_hours"] == pytest.approx(75_000 / 3600)
    assert (found["gpu_hour_price"], found["cost"]) == (3.6, pytest.approx(75))
    (group,) = found["groups"]
    assert (group["jobs"], group["gpus_per_run"], group["longest_run_s"]) == (10, 1, pytest.approx(10_000))
    content, positional = found["benchmark"]
    assert (content["dataset"], content["attention"], positional["attention"]) == ("imagenet", "content", "positional")
    assert (content["case"], content["hardware"], content["gpus"], content["batch_size"]) == (JPEG, "NVIDIA X", 1, 1024)
    assert findings(found, "nodes") == ["no GPU is visible here: planned as if there were 1 x NVIDIA X"]
    assert findings(found, "speeds") == []


def test_what_people_read(plan: Shell, tmp_path: Path) -> None:
    lines = [line(images_per_s=IMAGES / 10_000), line("training, synthetic", "positional", images_per_s=IMAGES / 5_000)]
    file = written(tmp_path, IMAGENET, *lines, dataset="photos")
    _, out, _ = plan.text("paper_imagenet", "--speeds", file, "--gpu-hour-price", "3.60")
    assert (
        "about 20.8 GPU-hours (75.00 at 3.60 each), 20.8 h of training one after the other (the longest job: 2.8 h), 20.8 h "
        "once they start"
    ) in out
    assert f"{file}: imagenet content: 38,935 images/s on 1 x NVIDIA X at batch 1024 (`{JPEG}` with images of photos)" in out
    assert (
        f"{file}: imagenet positional: 77,870 images/s on 1 x NVIDIA X at batch 1024 (`training, synthetic`, without the "
        "loader: the real rate is lower, or the same at best)"
    ) in out
    assert "an evaluation is an estimate (an image of it as a third of one in training), and start, compilation and" in out
    assert f"warning: {file} was measured with images of photos, not of imagenet" in out


def test_a_prepared_data_set_counts_by_its_manifest(plan: Shell, tmp_path: Path) -> None:
    plan.prepared("imagenet", train=900, val=300)
    file = written(tmp_path, IMAGENET, line(images_per_s=1000 * 300), line(attention="positional", images_per_s=1000 * 300))
    code, found = plan("paper_imagenet", "--speeds", file, "seed=0")
    assert (code, found["problem"]) == (0, "")
    assert found["estimated_train_s"] == pytest.approx(2)  # 300 x (900 + 300 / 3) images each


def test_four_gpus_without_slurm(plan: Shell, tmp_path: Path) -> None:
    """The line of as many GPUs counts, whatever one GPU could; and SLURM need not be there to say what it would cost."""
    plan.prepared("imagenet")
    lines = [line(attention=attention, images_per_s=IMAGES / 3600, gpus=4) for attention in ("content", "positional")]
    file = written(tmp_path, IMAGENET, line(images_per_s=1.0), *lines, line(gpus=4, batch_size=4096))
    profile = tmp_path / "profile.yaml"
    resources = {"executor": "slurm", "time": "0:40:00", "array_parallelism": 5, "gpus_per_node": 4}
    profile.write_text(yaml.safe_dump(resources))
    code, out, err = plan.text("paper_imagenet", "--profile", profile, "--speeds", file, "--json")
    found = json.loads(out)
    assert (code, found["problem"]) == (3, "")
    assert "warning: scontrol: not found; is this a login node of the cluster" in err
    assert findings(found, "limits") == ["SLURM does not answer: what it allows, and how many jobs at a time, is not known"]
    assert found["gpu_hours"] == pytest.approx(40)
    assert found["wall_s"] == pytest.approx(2 * 3600)  # ten runs, five at a time
    assert found["groups"][0]["attempts"] == 2
    assert findings(found, "time")
    profile.write_text(yaml.safe_dump({**resources, "gpus_per_node": 2}))
    code, out, _ = plan.text("paper_imagenet", "--profile", profile, "--speeds", file)
    assert code == 3
    assert (
        f"warning: {file} says nothing of imagenet content: it has no line for 2 GPUs at batch 1024 (it has: 1 GPU at batch "
        "1024; 4 GPUs at batch 1024; 4 GPUs at batch 4096); to measure that: vitpa bench imagenet --gpus 2 --batch-size 1024 "
        "--json FILE\n"
    ) in out
    assert "GPU-hours and time: unknown" in out


def test_seeds_that_train_together(plan: Shell, tmp_path: Path) -> None:
    """Five seeds of CIFAR-10, 300 x (50,000 + 10,000 / 3) images each, at 80,000 images/s of all together: 1,000 s a job."""
    file = written(tmp_path, SMALL, small_line(80_000), small_line(160_000, "positional"), small_line(1, replicas=1))
    _, found = plan("cifar10", "--speeds", file)
    assert found["estimated_train_s"] == pytest.approx(1_500)
    assert found["gpu_hours"] == pytest.approx(1_500 / 3600)
    assert [(each["attention"], each["replicas"]) for each in found["benchmark"]] == [("content", 5), ("positional", 5)]
    assert found["groups"][0]["gpus_per_run"] == pytest.approx(1 / 5)
    _, found = plan("cifar10", "--speeds", file, "seed=0,1,2")  # nothing is scaled
    assert (found["gpu_hours"], found["unmeasured"]) == (None, ["cifar10 content", "cifar10 positional"])
    assert "no line for 1 GPU at batch 128, 3 seeds in a step" in findings(found, "speeds")[0]
    assert findings(found, "speeds")[0].endswith("to measure that: vitpa bench small --replicas 3 --json FILE")
    _, out, _ = plan.text("cifar10", "--speeds", file, "seed=0,1,2", "--gpu-hour-price", "2")
    assert "GPU-hours and time: unknown until a run of each kind has finished" in out
    assert "--speeds FILE" not in out  # it was given
    assert "--gpu-hour-price is not used: there is no forecast of GPU-hours\n" in out


def test_other_data_sets_of_the_same_network_have_the_rate_in_common(plan: Shell, tmp_path: Path) -> None:
    file = written(tmp_path, SMALL, small_line(80_000), small_line(160_000, "positional"))
    _, out, _ = plan.text("paper_small", "--speeds", file)
    assert (
        f"{file}: cifar10 content, cifar100 content, svhn content: 80,000 images/s on 1 x NVIDIA X at batch 128, 5 seeds"
        in out
    )
    assert f"warning: {file} was measured with another augmentation than that of svhn (" in out
    assert "policy=autoaugment_cifar10, here autoaugment_svhn" in out
    assert "augmentation than that of cifar10" not in out


def test_finished_runs_are_better_evidence(plan: Shell, tmp_path: Path) -> None:
    file = written(tmp_path, IMAGENET, line(images_per_s=IMAGES / 3600), line(attention="positional", images_per_s=1.0))
    run = next(run for run in load_sweep("paper_imagenet", tmp_path).runs if run.attention == "positional" and run.seed == 4)
    speed = 300 * 1_281_167 / 7200  # two hours
    write_result(tmp_path, run, attention="positional", seed=4, images_per_s=speed, train_time_s=7200.0, gpu_hours=2.0)
    _, found = plan("paper_imagenet", "--speeds", file)
    assert found["measured"].keys() == {"imagenet positional"}
    assert [each["attention"] for each in found["benchmark"]] == ["content"]
    assert found["estimated_train_s"] == pytest.approx(5 * 3600 + 4 * 7200)


def test_evaluations_are_as_rare_as_the_profile_says(plan: Shell, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"executor": "local", "runtime": {"eval_every_epochs": 7}}))  # 43 in 300 epochs
    file = written(tmp_path, IMAGENET, line(), line(attention="positional"))
    _, found = plan("paper_imagenet", "--profile", profile, "--speeds", file, "seed=0", "attention=content")
    assert found["estimated_train_s"] == pytest.approx((300 * 1_281_167 + 43 * 50_000 / 3) / 1000)


def test_a_users_own_images_have_to_be_counted_first(plan: Shell, tmp_path: Path) -> None:
    recipe = yaml.safe_load(shipped_configs()["imagenet"].read_text())
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump({**recipe, "dataset": "pets"}))
    grid = {"name": "pets", "recipes": ["pets.yaml"], "attentions": ["content"], "seeds": [0]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(grid))
    _, out, _ = plan.text(str(tmp_path / "own.yaml"), "--speeds", written(tmp_path, IMAGENET, line()))
    assert "GPU-hours and time: unknown until the number of images is known: run `vitpa prep` first" in out


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "much"])
def test_a_price_is_a_positive_number(plan: Shell, price: str) -> None:
    with pytest.raises(SystemExit) as left:
        plan.text("demo", f"--gpu-hour-price={price}")
    assert left.value.code == 2


# --- files


def test_the_shipped_figures_are_read(plan: Shell) -> None:
    """They are older than the key `network`."""
    _, found = plan("cifar10", "--speeds", SHIPPED)
    rates = {each["attention"]: each["images_per_s"] for each in found["benchmark"]}
    results = {str(entry.case): entry.images_per_s for entry in load_benchmark(SHIPPED).results}
    assert rates == {name: results[f"training, synthetic {name} graph R=5"] for name in ("content", "positional")}
    expected_s = sum(5 * 300 * (50_000 + 10_000 / 3) / each for each in rates.values())
    assert found["gpu_hours"] == pytest.approx(expected_s / 3600)
    minutes = [5 * 300 * (50_000 + 10_000 / 3) / rates[name] / 60 for name in ("content", "positional")]
    readme = " ".join((ROOT / "jobs/README.md").read_text().split())
    assert f"{found['gpu_hours']:.2f} GPU-hours, {minutes[0]:.1f} minutes for the five seeds of content" in readme
    assert f"and {minutes[1]:.1f} for those of positional" in readme
    assert f"{plan('paper_small', '--speeds', SHIPPED)[1]['gpu_hours']:.2f} GPU-hours on one H200 for the 30 runs" in readme
    of_imagenet = plan("paper_imagenet", "--speeds", SHIPPED.with_name("imagenet_h100.json"), "--gpu-hour-price", "2.5")[1]
    assert f"is {of_imagenet['gpu_hours']:.1f} GPU-hours on H100s" in readme
    assert f"at 2.50 an hour that is {2.5 * of_imagenet['gpu_hours']:.0f}." in readme
    assert findings(found, "speeds") == [
        f"{SHIPPED} does not say what network it was measured with: taken for that of cifar10"
    ]


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ("{", "not valid JSON"),
        (
            '{"runs": []}',
            "name is missing; gpu is missing; results is missing; expected a file that vitpa bench imagenet or small wrote",
        ),
        ({"results": []}, "results=[]: List should have at least 1 item"),
        ({"results": [{**line(), "images_per_s": "fast"}]}, "results.0: images_per_s=fast: Input should be a valid number"),
        ({"results": [{**line(), "images_per_s": 0}]}, "results.0: images_per_s=0: Input should be greater than 0"),
        ({"results": [line(), *[line(images_per_s=-1.0)] * 9]}, "greater than 0; and 8 more lines with a problem; expected a"),
        ({"network": {"depth": 12, "dept": 6}}, "unknown key network.dept; known keys: kind, img_size, patch_size, "),
        ({"results": [line(gpus=0)]}, "results.0: case.gpus=0: Input should be greater than or equal to 1; expected a file"),
        (
            {"results": [{**line(), "case": JPEG}]},
            f"results.0: case={JPEG}: Input should be an object; expected a file that vitpa bench",
        ),
        (
            {"gpu": None, "device": "cpu"},
            "was measured on a CPU, whose speed depends on the cores a run has; measure on a GPU",
        ),
    ],
)
def test_what_is_no_benchmark_is_one_line(plan: Shell, tmp_path: Path, document: str | dict[str, Any], error: str) -> None:
    file = written(tmp_path, IMAGENET, line(), **(document if isinstance(document, dict) else {}))
    if isinstance(document, str):
        file.write_text(document)
    code, out, err = plan.text("paper_imagenet", "--speeds", file)
    assert (code, out) == (1, "")
    assert err.startswith(f"vitpa sweep: {file}: ")
    assert error in err
    assert err.count("\n") == 1


def test_no_file(plan: Shell, tmp_path: Path) -> None:
    code, _, err = plan.text("paper_imagenet", "--speeds", tmp_path / "none.json")
    assert (code, err.count("\n")) == (1, 1)
    assert "none.json: no such file; vitpa bench imagenet --json FILE writes one" in err


def test_only_a_file_without_its_network_is_taken_for_the_recipes(plan: Shell, tmp_path: Path) -> None:
    lines = [small_line(80_000), small_line(160_000, "positional")]
    file = written(tmp_path, SMALL, *lines, augment=None)
    assert findings(plan("cifar10", "--speeds", file)[1], "speeds") == []
    written(tmp_path, SMALL, *lines, network=None)
    (found,) = findings(plan("cifar10", "--speeds", file)[1], "speeds")
    assert found == f"{file} does not say what network it was measured with: taken for that of cifar10"


# --- which line


@pytest.mark.parametrize(
    ("cases", "decoder", "expected"),
    [
        (["training, raw, cpu", "training, raw, gpu", "training, synthetic", "model"], "auto", "training, raw, gpu"),
        (["training, raw, gpu", "training, raw, cpu", "training, synthetic", "model"], "cpu", "training, raw, cpu"),
        (["model", "training, synthetic", "training, JPEG, cpu"], "auto", "training, JPEG, cpu"),
        (["model", "training, synthetic", "training, JPEG, cpu"], "gpu", "training, synthetic"),
        (["timm, model", "model"], "auto", "model"),
    ],
)
def test_the_line_nearest_to_a_training_counts(tmp_path: Path, cases: list[str], decoder: str, expected: str) -> None:
    file = written(tmp_path, IMAGENET, line("loader, JPEG, gpu", None), *map(line, cases))
    found = rate(load_benchmark(file), f"runtime.decoder={decoder}")
    assert isinstance(found, Rate)
    assert found.case == expected
    assert bool(found.caveat) == (expected in ("training, synthetic", "model"))


@pytest.mark.parametrize(
    ("changes", "job", "reason"),
    [
        ([], {"gpus": 0}, "a job has no GPU, which is not measured"),
        ([], {"gpus": 0.1}, "a job has a share of a GPU, which is not measured"),
        ([], {"gpus": 2, "nodes": 2}, "a job has 2 nodes, which is not measured"),
        (["runtime.accum_steps=2"], {}, "a job has runtime.accum_steps=2, which is not measured"),
        (["runtime.step=eager"], {}, "a job has runtime.step=eager, which is not measured"),
        (["model.depth=6", "train.precision=float32"], {}, "(depth=12, here 6; precision=bfloat16, here float32)"),
        (["model.attention=positional"], {}, "it has no line for 1 GPU at batch 1024 (it has: none of this attention)"),
        (["train.global_batch_size=512"], {}, "it has no line for 1 GPU at batch 512 (it has: 1 GPU at batch 1024)"),
    ],
)
def test_why_there_is_no_rate(tmp_path: Path, changes: list[str], job: dict[str, Any], reason: str) -> None:
    found = rate(load_benchmark(written(tmp_path, IMAGENET, line())), *changes, **job)
    assert isinstance(found, str)
    assert reason in found


def test_steps_made_another_way_do_not_count(tmp_path: Path) -> None:
    benchmark = load_benchmark(written(tmp_path, IMAGENET, line(step="compile")))
    assert rate(benchmark) == "its steps were made by runtime.step=compile, and the run has runtime.step=auto"
    assert isinstance(rate(benchmark, "runtime.step=compile"), Rate)
    assert isinstance(rate(load_benchmark(written(tmp_path, IMAGENET, line(step="auto")))), Rate)
    found = rate(load_benchmark(written(tmp_path, IMAGENET, line(step="eager"), line("model", images_per_s=2.0))))
    assert isinstance(found, Rate) and found.images_per_s == 2  # though it leaves out more


@pytest.mark.parametrize(
    ("recipe", "changes", "gpus", "replicas", "words"),
    [
        ("cifar10", ["train.global_batch_size=256"], 1, 5, "small --replicas 5 train.global_batch_size=256 --json FILE"),
        ("cifar10", ["model.depth=9"], 1, 5, "small --replicas 5 model.depth=9 --json FILE"),
        ("cifar10", ["model.mlp_ratio=2", "train.precision=float32"], 1, 2, None),
        ("cifar10", ["train.order=quasi_random"], 1, 1, None),
        ("cifar10", ["runtime.loader=stream"], 4, 1, None),
        ("imagenet", ["model.drop_path_rate=1e-5"], 2, 1, None),
        ("imagenet", [], 1, 1, "imagenet --gpus 1 --batch-size 1024 --json FILE"),
    ],
)
def test_what_it_says_to_measure_is_of_the_network_and_batch_of_the_job(
    recipe: str, changes: list[str], gpus: int, replicas: int, words: str | None
) -> None:
    config = load_config(shipped_configs()[recipe], changes)
    command = how_to_measure(config, gpus=gpus, replicas=replicas).removeprefix("to measure that: vitpa bench ")
    assert words in (None, command)
    options = parse(shlex.split(command))
    wanted = (config.model.attention, gpus, replicas, config.train.global_batch_size)
    of_small = {case: configs[0] for case, configs in small.cases(options).items()} if options.name == "small" else {}
    (measured,) = [
        config
        for case, config in (of_small or imagenet.cases(options, gpus)).items()
        if (case.attention, case.gpus, case.replicas, case.batch_size) == wanted
        and (case.model, case.augmentation, case.images) == ("vitpa", True, "synthetic")
    ]
    assert options.name == "small" or options.gpus == [gpus]
    assert measured.network() == config.network()
    assert str(options.json) == "FILE"


def test_what_no_benchmark_measures() -> None:
    config = load_config(shipped_configs()["cifar10"], ["model.img_size=64"])
    assert how_to_measure(config, gpus=1, replicas=5) == "no benchmark measures that"
    config = load_config(shipped_configs()["cifar10"], ["model.kind=resnet18"])
    assert how_to_measure(config, gpus=1, replicas=1) == "no benchmark measures that"


@pytest.mark.parametrize(
    "change", ["runtime.loader=stream", "train.order=quasi_random", "augment.crop=random_resized", "augment.eval_crop_pct=0.5"]
)
def test_streamed_runs_are_not_as_fast_as_those_on_the_device(tmp_path: Path, change: str) -> None:
    benchmark = load_benchmark(written(tmp_path, SMALL, small_line(1.0, replicas=1)))
    assert isinstance(rate(benchmark), Rate)
    found = rate(benchmark, change)
    assert isinstance(found, str)
    assert found.startswith(f"vitpa bench small measures images on the device, and this run streams them ({change}); ")


def test_a_network_of_an_earlier_version_lacks_keys_and_is_the_recipes_in_them(tmp_path: Path) -> None:
    benchmark = load_benchmark(written(tmp_path, SMALL, small_line(1.0, replicas=1), network={"depth": 9}))
    assert isinstance(rate(benchmark, "model.depth=9"), Rate)
    found = rate(benchmark, "model.depth=9", "model.embed_dim=24")
    assert isinstance(found, str)
    assert "another network (embed_dim=384, here 24)" in found


def test_of_the_small_ones_only_whole_steps_of_ours_count(tmp_path: Path) -> None:
    others = [
        small_line(1.0, model="timm", step="compile"),
        small_line(2.0, augmentation=False),
        small_line(3.0, step="eager"),
        small_line(4.0),
    ]
    found = rate(load_benchmark(written(tmp_path, SMALL, *others)), replicas=5)
    assert isinstance(found, Rate)
    assert (found.images_per_s, found.caveat) == (4, "")
