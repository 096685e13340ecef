"""`vitpa export` of real, small trainings: what others load is the run's model, and the card tells the truth about it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from data_prep.prep import Options, image_settings
from tests.support.trainings import arguments, config_of
from vitpa.cli import parser
from vitpa.config import RunConfig
from vitpa.config_file import load_config, record_config, shipped_configs
from vitpa.data.manifest import ImageSettings, Manifest
from vitpa.export.card import prep_command
from vitpa.export.command import export
from vitpa.export.command import main as vitpa_export
from vitpa.export.files import check, check_images, write_network
from vitpa.records import RunError, write_json
from vitpa.rundir import Result
from vitpa.train_command import main as train
from vitpa.trained import TrainedRun, load_run

SMALL = ["runtime.cpu_threads=1", "runtime.step=eager"]
KINDS = {
    "content": ["model.global_pool=avg"],
    "positional": ["model.attention=positional", "train.ema_decay=0.9", "augment.permute_block_px=4"],
    "resnet18": ["model.kind=resnet18"],
}


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedRun]:
    """A finished run of each kind; of content there is one more seed, in the same sweep."""
    root, found, pair = tmp_path_factory.mktemp("export"), {}, []
    for kind, changes in KINDS.items():
        words = arguments(
            digits, root, "train.epochs=1", "optim.warmup_epochs=0", "runtime.cpu_threads=1", "runtime.step=eager", *changes
        )
        seeds = (1, 2) if kind == "content" else (0,)
        assert train([*words, "--seeds", ",".join(map(str, seeds))]) == 0
        configs = [config_of([*words, f"seed={seed}"]) for seed in seeds]
        found[kind] = load_run(configs[0].run_dir.path)
        pair += [{"signature": each.signature, "label": "a label"} for each in configs if kind == "content"]
    folder = root / "sweeps" / "pair"
    folder.mkdir(parents=True)
    write_json(folder / "runs.json", {"name": "pair", "runs": pair})
    return found


def result_of(run: TrainedRun) -> Result:
    assert run.result is not None
    return run.result


BARE = """import os, sys, torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.path[0] = folder
    exec(open("python.txt").read())
    torch.save(model(torch.load("images.pt")), "logits.pt")
assert not [name for name in sys.modules if name.partition(".")[0] == "vitpa"]
"""


@pytest.mark.slow
def test_the_cards_python_loads_the_judged_weights_without_vitpa(runs: dict[str, TrainedRun], tmp_path: Path) -> None:
    for kind, run in runs.items():
        out = tmp_path / kind
        assert vitpa_export([str(run.path), "--out", str(out)]) == 0
        (python,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        (out / "python.txt").write_text(python)
        torch.save(check_images(run.config.model.img_size), out / "images.pt")
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", BARE, *(str(tmp_path / kind) for kind in KINDS)], env=bare, check=True)
    for kind, run in runs.items():
        out, is_average = tmp_path / kind, run.config.train.ema_decay > 0
        images, expected = torch.load(out / "images.pt"), run.model(ema=is_average)
        assert (torch.load(out / "logits.pt") - expected(images)).abs().max() <= 1e-6
        assert load_file(out / "model.safetensors").keys() == expected.state_dict().keys()  # timm's, by tests of the models
        if is_average:
            assert (run.model()(images) - expected(images)).abs().max() > 1e-4
        card, document = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
        assert ("moving average" in card) == is_average
        assert document["pretrained_cfg"]["mean"] == [0.3058] * 3
        assert ("permute_block_order" in document) == bool(run.config.augment.permute_block_px) == ("permuted images" in card)


@pytest.mark.slow
def test_the_card_has_the_interval_over_seeds_and_the_command(runs: dict[str, TrainedRun]) -> None:
    run = runs["content"]
    out, difference = export(run, run.path / "export")
    assert difference <= 1e-6
    card, result = (out / "README.md").read_text(), result_of(run)
    pair = [path for path in run.path.parent.iterdir() if load_run(path).config.model == run.config.model]
    top1 = [100 * result_of(load_run(path)).top1 for path in pair]
    assert len(top1) == 2
    mean, std = statistics.mean(top1), statistics.stdev(top1)
    half = 12.7062047 * std / 2**0.5  # Student's t, 97.5 %, 1 degree of freedom
    assert f"seeds 1, 2 of the sweep pair (2 of 2): top-1 {mean:.2f} ± {std:.2f} %" in card
    found = re.findall(r"by Student's t \[(-?[\d.]+), ([\d.]+)\] %", card)[0]
    assert [float(number) for number in found] == pytest.approx([mean - half, mean + half], abs=0.01)
    for digest in (*result.beton_sha256.values(), result.weights_sha256):
        assert digest in card
    assert load_config(out / "run.yaml").signature == result.signature
    (command,) = re.findall(r"it is `vitpa train ([^`]*)`", card)
    recipe, *changes = shlex.split(command)
    assert load_config(shipped_configs()[recipe], changes).signature == result.signature
    assert "runtime" not in (out / "run.yaml").read_text()
    assert export(run, out)[0] == out  # again, over itself


@pytest.mark.slow
def test_the_card_says_which_seeds_it_has_not(
    runs: dict[str, TrainedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "theirs"
    shutil.copytree(runs["content"].path.parent.parent, root)
    run = load_run(root / "runs" / runs["content"].path.name)
    configs = [seeded(run, seed, root) for seed in range(1, 6)]
    for config in configs[2:4]:  # 3 is begun, 4 is damaged, 5 is not there
        record_config(config)
    (configs[3].run_dir.path / "result.json").write_text("{")
    listed = [{"signature": each.signature, "label": f"s{each.seed}", "config": {"seed": each.seed}} for each in configs]
    shutil.rmtree(root / "sweeps" / "pair")
    (root / "sweeps" / "five").mkdir()
    write_json(root / "sweeps" / "five" / "runs.json", {"name": "five", "runs": listed})
    out = tmp_path / "out"
    assert vitpa_export([str(run.path), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "Over the seeds 1, 2 of the sweep five (2 of 5): top-1 " in card
    assert "Not in the mean, as they had not finished: s3.\nNot in the mean, as their records are damaged: s4.\n" in card
    assert "Not in the mean, as they had not been started: s5." in card
    assert str(root) not in card
    assert f"s4 is not in the card: {configs[3].run_dir.result_json}: " in capsys.readouterr().err
    (seeded(run, 3 - run.config.seed, root).run_dir.result_json).write_text("{")
    assert vitpa_export([str(run.path), "--out", str(out)]) == 0
    assert "One seed (1 of 5 of the sweep five), so that there is no interval.\n" in (out / "README.md").read_text()
    assert "how much another would differ is not known" not in (out / "README.md").read_text()
    (root / "sweeps" / "five" / "runs.json").write_text(f"{{ {run.path.name}")
    assert vitpa_export([str(run.path), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "One seed, so that there is no interval.\nNot looked at for other seeds, as the record cannot be " in card
    assert "the seeds of the sweep five are not in the card: " in capsys.readouterr().err


def seeded(run: TrainedRun, seed: int, root: Path) -> RunConfig:
    """The configuration of a run with another seed, below another root."""
    runtime = run.config.runtime.model_copy(update={"root": str(root)})
    return run.config.model_copy(update={"seed": seed, "runtime": runtime})


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_in_one_line(
    runs: dict[str, TrainedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["positional"]
    write_network(run.config, run.model(), 10, tmp_path)  # not the average
    with pytest.raises(RunError, match="not exported: reloaded, the weights give other logits"):
        check(run.model(ema=True), run.config.model.img_size, tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "__pycache__").mkdir(exist_ok=True)  # as Python makes it where it may
    assert vitpa_export([str(run.path), "--out", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"vitpa export: {tmp_path}: holds notes.txt, which is not of an export; name a new folder with --out\n"
    )
    assert (tmp_path / "notes.txt").exists()
    assert vitpa_export([str(run.path.parent.parent / "sweeps" / "pair")]) == 1
    assert "is a sweep; name one of its runs, such as" in capsys.readouterr().err
    with pytest.raises(RunError, match="is not finished; train it to its end"):
        export(TrainedRun(run.directory, run.config, None), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match="not exported: the files do not load"):
        check(run.model(), run.config.model.img_size, tmp_path)


def folder_of(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    path.mkdir()
    for name in names:
        (path / name).write_text(f"my {name}")
    return {name: f"my {name}" for name in names}


UNREAD = cast("Result", object())  # a result of which nothing is looked at


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("README.md",), r"holds README.md, but no run.yaml, so that it is not an export to be replaced; name a new folder"),
        (("README.md", "config.json", "model.safetensors"), "holds README.md, but no run.yaml"),  # another tool's
        (("README.md", "config.json", "run.yaml"), "holds README.md, but no model.safetensors"),
        ((".git", "config.json", "model.safetensors", "run.yaml"), "holds .git, which is not of an export"),
    ],
)
def test_a_folder_that_holds_no_export_is_left_as_it_is(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    files = folder_of(tmp_path / "mine", names)
    config = config_of(["digits"])
    run = TrainedRun(config.run_dir, config, UNREAD)
    with pytest.raises(RunError, match=re.escape(says)):
        export(run, tmp_path / "mine")
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_or_a_folder_with_a_file_s_name_is_not_replaced(tmp_path: Path) -> None:
    config = config_of(["digits"])
    run = TrainedRun(config.run_dir, config, UNREAD)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is not a folder; name a new folder with --out"):
        export(run, tmp_path / "file")
    folder_of(tmp_path / "mine", ("config.json", "model.safetensors", "run.yaml"))
    (tmp_path / "mine" / "README.md").mkdir()
    with pytest.raises(RunError, match=r"holds README\.md, which is not of an export"):
        export(run, tmp_path / "mine")


OWN = {"resize": "short_side", "size_px": 256, "jpeg_share": 1.0, "jpeg_quality": 90, "white_level": None}
RAW = {"resize": "none", "size_px": None, "jpeg_share": 0.0, "jpeg_quality": None}


@pytest.mark.parametrize(
    ("dataset", "images", "skipped", "command"),
    [
        ("digits", RAW, (), "vitpa prep digits"),
        ("pets", {}, (), "vitpa prep pets --source DIR"),
        ("imagenet", {}, (), "vitpa prep imagenet --source DIR"),
        ("pets", RAW, (), "vitpa prep pets --source DIR"),  # small images
        (
            "pets",
            {"resize": "max_side", "size_px": 500, "jpeg_share": 0.5},
            ("a.jpg",),
            "vitpa prep pets --source DIR --max-side-px 500 --jpeg-share 0.5 --jpeg-quality 90 --skip-corrupt",
        ),
        ("pets", {"size_px": 64, "jpeg_share": 0.0, "jpeg_quality": None}, (),
         "vitpa prep pets --source DIR --short-side-px 64 --jpeg-share 0"),
        ("pets", {"white_level": 4095}, (), "vitpa prep pets --source DIR --white-level 4095"),
    ],
)  # fmt: skip
def test_the_cards_prep_makes_the_runs_data(
    tmp_path: Path, dataset: str, images: dict[str, object], skipped: tuple[str, ...], command: str
) -> None:
    settings = ImageSettings.model_validate({**OWN, **images})
    config = config_of(["digits", f"dataset={dataset}", f"runtime.data_dir={tmp_path}"])
    for split in ("train", "val"):
        its = Manifest(
            dataset=dataset, split=split, num_samples=1, class_names=("a",), class_counts=(1,), images=settings, source="DIR",
            source_sha256="", beton_sha256=f"of {split}", file_size_bytes=1, skipped=skipped, tools={},
            created_utc="", duration_s=0,
        )  # fmt: skip
        path = tmp_path / dataset / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(its.model_dump_json())
    found, more = prep_command(config, {"train": "of train", "val": "of val"})
    assert found == command
    assert ("DIR holds the images of" in more) == ("DIR" in command)
    options = parser().parse_args(shlex.split(command)[1:])
    assert (options.dataset, options.source is None) == (dataset, dataset == "digits")
    if dataset != "digits":  # the defaults have not moved away from what the card takes them to be
        asked = Options(**{name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__})
        assert image_settings(asked, small_images=settings.resize == "none") == settings
        other = {"train": "of another train", "val": "of val"}
        assert prep_command(config, other)[0].startswith(f"vitpa prep {dataset} --source DIR")
        assert "Other settings than the defaults of `vitpa prep` are not known here." in prep_command(config, other)[1]
