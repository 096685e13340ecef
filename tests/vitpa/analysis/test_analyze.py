"""`vitpa analyze` and the Python API over real, small trainings of the digits: numbers, files, and clear ends."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch

import vitpa
from tests.support.repository import ROOT
from tests.support.trainings import arguments, config_of
from vitpa.analysis.attention import attention_scores, patch_attention
from vitpa.analysis.command import main as analyze
from vitpa.analysis.maps_file import read_maps
from vitpa.analysis.record import recorded, write_record
from vitpa.analysis.structure import Structure, structure
from vitpa.config_file import record_config
from vitpa.models import build_model
from vitpa.records import CHECKSUM, RunError, with_checksum, write_json
from vitpa.train_command import main as train
from vitpa.trained import TrainedRun, TrainedSweep, differing_settings

EPOCHS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KEPT = f"runtime.keep_epochs=[1,{EPOCHS}]"


@pytest.fixture(scope="module")
def sweep(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of both attentions and two seeds, all finished, with snapshots."""
    root = tmp_path_factory.mktemp("analysis")
    runs = []
    for attention in ("content", "positional"):
        words = arguments(digits, root, f"train.epochs={EPOCHS}", KEPT, f"model.attention={attention}", "model.patch_size=2")
        assert train([*words, "--seeds", "0,1"]) == 0
        configs = [config_of([*words, f"seed={seed}"]) for seed in (0, 1)]
        runs += [{"signature": each.signature, "label": f"digits-{attention}-s{each.seed}"} for each in configs]
    folder = root / "sweeps" / "demo"
    folder.mkdir(parents=True)
    write_json(folder / "runs.json", {"name": "demo", "runs": runs})
    return folder


def signature(sweep: Path, number: int) -> str:
    return str(json.loads((sweep / "runs.json").read_text())["runs"][number]["signature"])


def run_folder(sweep: Path, number: int) -> Path:
    return sweep.parent.parent / "runs" / signature(sweep, number)


@pytest.mark.slow
def test_a_run_is_loaded_with_configuration_weights_result_and_metrics(sweep: Path) -> None:
    run = vitpa.load_run(run_folder(sweep, 0))
    assert (run.name, run.config.model.attention, run.config.seed) == ("digits-content-s0", "content", 0)
    assert run.result is not None
    assert run.metrics["val/top1"].dropna().iloc[-1] == run.result.val_top1
    assert run.epochs() == [0, 1, EPOCHS]
    logits = run.model()(torch.zeros(2, 3, 8, 8))
    assert logits.shape == (2, 10)
    # the weights are those that the result is about; those of the last snapshot are the same
    for name, tensor in run.model(EPOCHS).state_dict().items():
        assert torch.equal(tensor, run.model().state_dict()[name])


@pytest.mark.slow
def test_epoch_0_is_the_initialisation_of_the_training(sweep: Path, digits: Path, tmp_path: Path) -> None:
    from vitpa import train as training

    run = vitpa.load_run(run_folder(sweep, 2))
    words = arguments(digits, tmp_path, f"train.epochs={EPOCHS}", KEPT, "model.attention=positional", "model.patch_size=2")
    config = config_of([*words, "seed=0"])
    assert config.signature == run.directory.signature
    from vitpa.distributed import Group

    set_up = training.set_up([config], Group(0, 1, 0, 1, torch.device("cpu")))
    for name, tensor in set_up.replicas[0].model.state_dict().items():
        assert torch.equal(tensor, run.model(0).state_dict()[name])
    set_up.steps.close()


@pytest.mark.slow
def test_a_sweep_is_analysed_over_seeds_and_in_pairs(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze([str(sweep), "--images", "20", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((sweep / "analysis" / "structure.json").read_text())
    cells = {(row["attention"], row["measure"], row["layer"], row["head"], row["epoch"]): row for row in document["cells"]}
    singles = [structure(run, images=20).value("attention_distance") for run in vitpa.load_sweep(sweep)]
    mean = cells["content", "attention_distance", None, None, EPOCHS]
    assert (mean["n"], mean["mean"]) == (2, pytest.approx(sum(singles[:2]) / 2))
    difference = next(
        row
        for row in document["differences_content_minus_positional"]
        if (row["measure"], row["layer"], row["epoch"]) == ("attention_distance", None, EPOCHS)
    )
    assert difference["mean"] == pytest.approx((singles[0] - singles[2] + singles[1] - singles[3]) / 2)
    for folder, names in (
        (sweep, ["structure.csv", "differences.csv", "training.svg", "training.png", "layers.svg"]),
        (run_folder(sweep, 0), ["structure.csv", "similarity.svg", "attention.png", "layers.svg", "training.png", "tb"]),
    ):
        assert not [name for name in names if not (folder / "analysis" / name).exists()]
    table = pd.read_csv(run_folder(sweep, 0) / "analysis" / "structure.csv")
    assert sorted(table["epoch"].unique()) == [0, 1, EPOCHS]
    for number in (0, 2):  # what a report shows is what was measured
        run = vitpa.load_run(run_folder(sweep, number))
        saved, found = read_maps(run.path / "analysis"), structure(run, images=20)
        assert saved is not None
        assert saved.attention is not None
        assert saved.epochs.tolist() == list(found.maps) == [0, 1, EPOCHS]
        for index, its in enumerate(found.maps.values()):
            assert its.attention is not None
            assert np.abs(saved.similarity[index] - its.similarity.numpy()).max() < 3e-4
            assert np.abs(saved.attention[index] - its.attention.numpy()).max() < 3e-4


@pytest.mark.slow
def test_what_was_found_before_is_read_if_it_was_asked_in_the_same_way(sweep: Path) -> None:
    content, positional = (vitpa.load_run(run_folder(sweep, number)) for number in (1, 3))
    for run in (content, positional):
        (run.path / "analysis").mkdir(exist_ok=True)
        write_record(structure(run, neighbours=3, images=4))
        assert recorded(run, neighbours=2, images=4, block=0) is None
        assert recorded(run, neighbours=3, images=4, block=2) is None
        read = recorded(run, neighbours=3, images=4, block=0)
        assert read is not None
        assert read.findings == structure(run, neighbours=3, images=4).findings
    assert recorded(content, neighbours=3, images=5, block=0) is None
    assert recorded(positional, neighbours=3, images=5, block=0) is not None  # it needs no images
    (positional.path / "analysis" / "maps.npz").unlink()
    assert recorded(positional, neighbours=3, images=4, block=0) is None  # a report needs them
    path = content.path / "analysis" / "structure.json"
    path.write_text(path.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    assert recorded(content, neighbours=3, images=4, block=0) is None
    path.write_text("{")
    assert recorded(content, neighbours=3, images=4, block=0) is None


@pytest.mark.slow
def test_more_images_than_there_are_mean_all_of_them(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(sweep, 0)
    assert analyze([str(folder), "--images", "1000"]) == 0
    assert "360 val images" in capsys.readouterr().out
    assert json.loads((folder / "analysis" / "structure.json").read_text())["images"] == 360
    run = vitpa.load_run(folder)
    again = recorded(run, neighbours=4, images=1000, block=0)
    assert again is not None
    assert again.images == 360
    assert recorded(run, neighbours=4, images=360, block=0) is None


@pytest.mark.slow
def test_weights_that_are_not_finite_are_one_line(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TrainedRun.model

    def diverged(run: TrainedRun, epoch: float | None = None) -> torch.nn.Module:
        model = right(run, epoch)
        if epoch == EPOCHS:
            model.get_parameter("pos_embed").data[0, 0, 0] = float("nan")
        return model

    monkeypatch.setattr(TrainedRun, "model", diverged)
    assert analyze([str(run_folder(sweep, 2))]) == 1
    assert f"its weights after epoch {EPOCHS} are not finite numbers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 3, 4])
def test_squares_have_to_be_several_of_several_patches(sweep: Path, capsys: pytest.CaptureFixture[str], block: int) -> None:
    assert analyze([str(run_folder(sweep, 2)), "--block", str(block)]) == 1
    assert "sides that do: 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_without_positions_is_left_out(
    sweep: Path, digits: Path, warned: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = sweep.parent.parent
    config = config_of(arguments(digits, root, f"train.epochs={EPOCHS}", "model.kind=resnet18"))
    record_config(config)  # and what another run has left behind: the weights are not asked for
    other = vitpa.load_run(run_folder(sweep, 0))
    for name in ("env.json", "metrics.jsonl"):
        shutil.copy(other.path / name, config.run_dir.path)
    assert other.result is not None
    config_sha256 = hashlib.sha256(config.run_dir.config_yaml.read_bytes()).hexdigest()
    result = other.result.model_copy(update={"signature": config.signature, "config_sha256": config_sha256})
    write_json(config.run_dir.result_json, with_checksum(result.model_dump()))
    resnet = {"signature": config.signature, "label": "digits-resnet18-s0"}
    folder = sweep.parent / "kinds"
    folder.mkdir()
    write_json(folder / "runs.json", {"runs": [json.loads((sweep / "runs.json").read_text())["runs"][2], resnet]})
    assert analyze([str(folder)]) == 4
    assert warned("digits-resnet18-s0 is left out: .*its network has no positional encodings to analyse")
    assert vitpa.load_sweep(folder).frame()["attention"].isna().tolist() == [False, True]
    capsys.readouterr()
    assert analyze([resnet["signature"], "--root", str(root)]) == 1
    assert "its network has no positional encodings to analyse" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_for_people(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(sweep.parent.parent)]
    assert analyze(["demo", "--images", "20", *root]) == 0
    printed = capsys.readouterr().out
    assert "digits content - positional" in printed
    assert "(2 seeds)" in printed
    assert analyze([signature(sweep, 2), *root]) == 0
    printed = capsys.readouterr().out
    assert "digits-positional-s0" in printed
    assert "chance [95 %]" in printed


def changed_result(run: TrainedRun, **changes: object) -> None:
    """Write the run's result anew with other facts, and env.json as if it had been made with these."""
    assert run.result is not None
    environment = json.loads(run.directory.env_json.read_text())
    facts = {name: value for name, value in environment.items() if name != CHECKSUM}
    write_json(run.directory.env_json, with_checksum({**facts, **changes}))
    write_json(run.directory.result_json, with_checksum({**run.result.model_dump(), **changes}))


def copied(sweep: Path, folder: Path) -> Path:
    """The sweep in a root of its own, to be changed."""
    shutil.copytree(sweep.parent.parent, folder, symlinks=True)
    return folder / "sweeps" / sweep.name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["code_version", "beton_sha256"])
def test_runs_of_different_code_or_data_are_averaged_on_request_only(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    theirs = copied(sweep, tmp_path / "theirs")
    run = vitpa.load_run(run_folder(theirs, 1))
    assert run.result is not None
    other = {"code_version": "of-before", "beton_sha256": {**run.result.beton_sha256, "train": "0" * 64}}
    changed_result(run, **{what: other[what]})
    shutil.rmtree(theirs / "analysis", ignore_errors=True)
    assert analyze([str(theirs), "--images", "0"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert f"vitpa analyze: digits: runs of different {what}: " in told.err
    assert " (content-s0 positional-s0 positional-s1), " in told.err
    assert " (content-s1). Train the older ones again" in told.err
    assert "or average all the same with --allow-mixed" in told.err
    assert not (theirs / "analysis").exists()
    assert analyze([str(theirs), "--images", "0", "--allow-mixed"]) == 0
    assert "MIXED: runs of different code or data are averaged for digits." in capsys.readouterr().out
    assert json.loads((theirs / "analysis" / "structure.json").read_text())["mixed"] == ["digits"]


@pytest.fixture
def other_images(digits: Path, tmp_path: Path) -> Path:
    """A folder of data sets whose digits are, by their manifest, others than those of the trainings."""
    folder = tmp_path / "others"
    shutil.copytree(digits / "digits", folder / "digits")
    path = folder / "digits" / "val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beton_sha256": "0" * 64}))
    return folder


@pytest.mark.slow
def test_attention_is_not_measured_on_other_images_than_the_runs(
    sweep: Path, other_images: Path, tmp_path: Path, warned: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = copied(sweep, tmp_path / "theirs")
    for number in range(4):
        shutil.rmtree(run_folder(theirs, number) / "analysis", ignore_errors=True)
    content, others = run_folder(theirs, 0), ["--data-dir", str(other_images)]
    says = f"{other_images}/digits/val.beton: holds other images than those that run {content.name} was evaluated on"
    assert analyze([str(content), *others]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vitpa analyze: {says} (beton_sha256 000000000000, the run's is ")
    assert error.endswith("name their folder with --data-dir, or leave out the attention that depends on images: --images 0\n")
    assert not (content / "analysis").exists()
    run = vitpa.load_run(content)
    with pytest.raises(RunError, match="holds other images"):  # by env.json
        structure(TrainedRun(run.directory, run.config, None), images=4, data_dir=str(other_images))
    assert analyze([str(theirs), *others]) == 4
    warned(f"digits-content-s0 is left out: {re.escape(says)}")
    document = json.loads((theirs / "analysis" / "structure.json").read_text())
    assert document["runs"] == [signature(theirs, 2), signature(theirs, 3)]
    assert analyze([str(content), *others, "--images", "0"]) == 0


@pytest.mark.slow
def test_what_was_measured_on_other_images_is_measured_again(sweep: Path, tmp_path: Path) -> None:
    theirs = copied(sweep, tmp_path / "theirs")
    content, positional = (vitpa.load_run(run_folder(theirs, number)) for number in (0, 2))
    for run in (content, positional):
        (run.path / "analysis").mkdir(exist_ok=True)
        write_record(structure(run, images=4))
    path = content.path / "analysis" / "structure.json"
    written = json.loads(path.read_text())
    assert content.result is not None
    assert written["images_sha256"] == content.result.beton_sha256["val"]
    assert recorded(content, neighbours=4, images=4, block=0) is not None
    write_json(path, {**written, "images_sha256": "0" * 64})
    assert recorded(content, neighbours=4, images=4, block=0) is None
    del written["images_sha256"]  # as earlier versions wrote it
    write_json(path, written)
    assert recorded(content, neighbours=4, images=4, block=0) is None
    path = positional.path / "analysis" / "structure.json"
    written = json.loads(path.read_text())
    assert written.pop("images_sha256") is None
    write_json(path, written)
    assert recorded(positional, neighbours=4, images=4, block=0) is not None


@pytest.mark.slow
def test_of_an_average_of_the_weights_that_is_measured_which_counts(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(
        digits, tmp_path, "train.epochs=2", "runtime.keep_epochs=[1,2]", "train.ema_decay=0.99", "model.attention=positional"
    )
    assert train(words) == 0
    run = vitpa.load_run(config_of(words).run_dir.path)
    assert [run.is_averaged(epoch) for epoch in run.epochs()] == [False, False, True]
    found = structure(run)
    assert found.averaged_epochs == [2]
    for epoch, model in ((1, run.model(1)), (2, run.model(ema=True))):
        assert (found.maps[epoch].similarity - similarity_of(model)).abs().max() < 1e-6
    assert (found.maps[2].similarity - similarity_of(run.model())).abs().max() > 1e-4
    capsys.readouterr()
    assert analyze([str(run.path)]) == 0
    assert "epoch 2 (the weights' average)" in capsys.readouterr().out
    path = run.path / "analysis" / "structure.json"
    written = json.loads(path.read_text())
    assert written["averaged_epochs"] == [2]
    again = recorded(run, neighbours=4, images=256, block=0)
    assert again is not None
    assert again.averaged_epochs == [2]
    del written["averaged_epochs"]  # as earlier versions wrote it, which measured the weights
    write_json(path, written)
    assert recorded(run, neighbours=4, images=256, block=0) is None
    folder = tmp_path / "sweeps" / "averaged"
    folder.mkdir(parents=True)
    write_json(folder / "runs.json", {"runs": [{"signature": run.directory.signature, "label": run.name}]})
    assert analyze([str(folder)]) == 0
    assert "at the end are those of the average, which counts, those before of the weights" in capsys.readouterr().out
    document = json.loads((folder / "analysis" / "structure.json").read_text())
    assert document["averaged_epochs"] == {run.directory.signature: [2]}


def similarity_of(model: torch.nn.Module) -> torch.Tensor:
    """Cosines of the positional encodings of the patches."""
    vectors = torch.nn.functional.normalize(model.get_parameter("pos_embed").detach()[0, 1:].double(), dim=-1)
    return vectors @ vectors.T


@pytest.mark.slow
def test_the_readmes_notebook_runs(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in script.splitlines() if line]) <= 10
    (tmp_path / "outputs").symlink_to(sweep.parent.parent)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    printed = capsys.readouterr().out
    assert re.search(r"^content( +[0-9.]+){6}$", printed, re.MULTILINE)
    assert re.search(r"^positional( +[0-9.]+){6}$", printed, re.MULTILINE)


@pytest.mark.slow
def test_what_cannot_be_written_is_printed(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of runs that belong to somebody else."""
    shutil.copytree(sweep.parent.parent, tmp_path / "theirs", symlinks=True)
    theirs = tmp_path / "theirs" / "sweeps" / sweep.name
    in_the_way = run_folder(theirs, 0) / "analysis"
    shutil.rmtree(in_the_way, ignore_errors=True)
    in_the_way.touch()
    for target in (in_the_way.parent, theirs):
        assert analyze([str(target), "--images", "0", "--json"]) == 1
        printed = capsys.readouterr()
        assert json.loads(printed.out)
        assert f"{in_the_way}: File exists; what was found is printed, but not written; for files" in printed.err


@pytest.mark.slow
def test_a_run_that_is_missing_makes_it_partial(sweep: Path, tmp_path: Path, warned: Callable[[str], str]) -> None:
    listed = json.loads((sweep / "runs.json").read_text())["runs"]
    folder = sweep.parent / "partial"
    folder.mkdir()
    write_json(folder / "runs.json", {"runs": [listed[2], {"signature": "0" * 16, "label": "digits-content-s7"}]})
    assert analyze([str(folder)]) == 4
    assert warned("digits-content-s7 is left out: not started")


@pytest.mark.slow
def test_runs_that_cannot_be_trusted_are_left_out_and_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    theirs = copied(sweep, tmp_path / "theirs")
    result, config = run_folder(theirs, 1) / "result.json", run_folder(theirs, 2) / "config.yaml"
    result.write_text(result.read_text().replace('"val_top1": 0.', '"val_top1": 0.9'))
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    assert analyze([str(theirs), "--images", "0", "--json"]) == 4
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["runs"] == [signature(theirs, 0), signature(theirs, 3)]
    assert list(document["left_out"]) == ["digits-content-s1", "digits-positional-s0"]
    assert f"digits-content-s1 is left out: {result}: was changed after it was written" in printed.err
    assert f"digits-positional-s0 is left out: {config}: is the configuration of run" in printed.err
    loaded = vitpa.load_sweep(theirs)
    assert list(loaded.broken) == ["digits-content-s1", "digits-positional-s0"]
    assert list(loaded.frame().index) == document["runs"]
    assert f"digits-content-s1 is left out: {result}" in caplog.records[-2].message
    for number in (0, 3):
        (run_folder(theirs, number) / "result.json").write_text("{")
    assert analyze([str(theirs)]) == 1
    assert "none of its runs can be analysed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_snapshot_is_one_line(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted((run_folder(sweep, 3) / "snapshots").iterdir())[0]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    try:
        assert analyze([str(run_folder(sweep, 3))]) == 1
        assert f"{path}: its checksum does not fit" in capsys.readouterr().err
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
def test_weights_that_the_result_is_not_about_are_refused(sweep: Path) -> None:
    folder = run_folder(sweep, 3)
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    checkpoint.rename(checkpoint.with_suffix(".away"))
    try:
        with pytest.raises(RunError, match="cannot be read"):
            vitpa.load_run(folder).model()
    finally:
        checkpoint.with_suffix(".away").rename(checkpoint)


def test_what_is_no_run_is_refused_with_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze(["nothing", "--root", str(tmp_path)]) == 1
    assert "neither a run's folder nor a sweep's" in capsys.readouterr().err
    with pytest.raises(RunError, match="holds no run"):
        vitpa.load_run(tmp_path)
    with pytest.raises(RunError, match="holds no sweep"):
        vitpa.load_sweep(tmp_path)


def test_settings_that_differ_have_the_values_of_defaults_and_only_those_that_count(tmp_path: Path) -> None:
    words = ["augment.permute_block_px=2", "model.patch_size=4", "model.kind=resnet18", "train.order=quasi_random"]
    configs = [config_of(["digits", *changes]) for changes in ([], words[:1], words[1:2], words[2:3], words[3:])]
    runs = [TrainedRun(config.run_dir, config, None) for config in configs]
    assert differing_settings(runs[:2]) == [{"augment.permute_block_px": 0}, {"augment.permute_block_px": 2}]
    assert differing_settings([runs[0], runs[3]]) == [{"model.kind": "vit"}, {"model.kind": "resnet18"}]
    of_three = differing_settings([runs[0], *runs[2:4]])
    assert [each["model.patch_size"] for each in of_three] == [2, 4, None]
    assert differing_settings([runs[0], runs[4]]) == [{"train.order": "random"}, {"train.order": "quasi_random"}]
    assert TrainedSweep(tmp_path, runs[:2], []).frame()["augment.permute_block_px"].tolist() == [0, 2]
    lists = [config_of(["digits", f"optim.betas=[0.9,{beta}]"]) for beta in (0.95, 0.999)]
    frame = TrainedSweep(tmp_path, [TrainedRun(config.run_dir, config, None) for config in lists], []).frame()
    assert list(frame.groupby("optim.betas").groups) == [(0.9, 0.95), (0.9, 0.999)]


@pytest.mark.parametrize(("block_px", "undone"), [(0, False), (2, False), (4, True), (8, True)])
def test_only_blocks_of_whole_patches_are_put_back(block_px: int, undone: bool) -> None:
    config = config_of(["digits", f"augment.permute_block_px={block_px}", "model.patch_size=4"])
    found = Structure(TrainedRun(config.run_dir, config, None), 2, 1, None, None, None, 0, [], {})
    assert found.permuted is undone


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("attention", ["content", "positional"])
def test_attention_is_what_the_model_mixes_with(attention: str, global_pool: Literal["token", "avg"]) -> None:
    """Against the output of timm's own attention: the matrices times the values, projected."""
    model = build_model(
        attention=attention,  # type: ignore[arg-type]
        num_classes=3, img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1.0, drop_path_rate=0.0,
        pos_embed_std=1.0, global_pool=global_pool, seed=0,
    ).eval()  # fmt: skip
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = patch_attention(model, [images[:2], images[2:]])
    assert found is not None
    matrices, entropies = found
    assert matrices.shape == (2, 2, 16, 16)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
    assert (entropies <= math.log(16) + 1e-9).all()
    if attention == "positional":
        return
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attn = model.blocks[1].attn
    attn.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad(), attention_scores(model) as layers:
        model(images)
        x, output = seen[0]
        v = attn.qkv(x)[..., 16:].view(3, -1, 2, 4).transpose(1, 2)
        mixed = attn.proj((layers[1].softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert layers[1].shape[-1] == (17 if global_pool == "token" else 16)
    torch.testing.assert_close(mixed, output)
    assert patch_attention(model, []) is None
