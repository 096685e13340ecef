"""A part of train in the place of val: which samples, and that a run on it is a run on files with just these samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.groups import num_images
from tests.support.betons import Sample, jpeg_sample, write_data
from tests.support.staging import ALONE
from tests.support.trainings import arguments, config_of, result_of, trained
from vitpa.analysis.command import run_table
from vitpa.analysis.images import val_images
from vitpa.analysis.record import document_of
from vitpa.analysis.structure import structure
from vitpa.data.beton import RAW, Beton
from vitpa.data.holdout import held_out, without_val
from vitpa.data.manifest import BetonError, beton_path
from vitpa.data.open import open_data
from vitpa.data.prefetch import extents
from vitpa.data.resident import decoded
from vitpa.data.rng import Purpose, key, random_bits
from vitpa.datasets import num_held_out
from vitpa.train_command import main
from vitpa.trained import TrainedSweep, load_run

HOLDOUT = "train.holdout=0.2"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5])
def test_each_class_gives_its_share(share: float) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 1000)
    chosen = held_out(labels, share)
    for label in range(7):
        count = int((labels == label).sum())
        assert chosen[labels == label].sum() == num_held_out(count, share) == max(1, round(share * count))
    assert np.array_equal(chosen, held_out(labels, share))


def test_classes_of_any_size_and_in_order_of_the_file() -> None:
    assert [num_held_out(count, 0.5) for count in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 2]
    labels = np.repeat(np.arange(3), 200)
    chosen = held_out(labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [20] * 3
    positions = np.flatnonzero(chosen) % 200
    assert 60 < positions.mean() < 140, "spread over the class"
    more = held_out(labels, 0.2)
    assert (more | ~chosen).all(), "a larger part has the smaller one in it"


def test_the_parts_are_all_of_train(digits: Path) -> None:
    train = Beton.open(beton_path(digits, "digits", "train"))
    parts = without_val(train, 0.2)
    numbers = np.concatenate([parts["train"].numbers, parts["val"].numbers])
    assert sorted(numbers.tolist()) == list(range(len(train)))
    images, labels = decoded(train, 8)
    for part in parts.values():
        assert part.manifest.class_counts == tuple(np.bincount(part.labels).tolist())
        assert part.manifest.num_samples == len(part)
        own_images, own_labels = decoded(part, 8)
        assert torch.equal(own_images, images[part.numbers])
        assert torch.equal(own_labels, labels[part.numbers])


def test_a_class_of_one_image_is_an_error(digits: Path) -> None:
    train = Beton.open(beton_path(digits, "digits", "train"))
    first = np.flatnonzero(train.labels == 3)[:1]
    few = train.part(np.sort(np.concatenate([first, np.flatnonzero(train.labels != 3)])))
    with pytest.raises(BetonError, match=r"the class 3 has one image, .*; set train\.holdout=0$"):
        without_val(few, 0.1)


@pytest.fixture(scope="module")
def written(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: files of just these samples, which are drawn class by class, one after another."""
    folder, train = tmp_path_factory.mktemp("written"), Beton.open(beton_path(digits, "digits", "train"))
    bits = random_bits(key(0, Purpose.HOLDOUT), torch.arange(len(train))).tolist()
    chosen: set[int] = set()
    for label in range(10):
        members = sorted(np.flatnonzero(train.labels == label).tolist(), key=bits.__getitem__)
        chosen |= set(members[: round(0.2 * len(members))])
    for split, wanted in (("train", False), ("val", True)):
        numbers = [number for number in range(len(train)) if (number in chosen) == wanted]
        samples = [Sample(train.stored(each).tobytes(), 8, 8, RAW, int(train.labels[each])) for each in numbers]
        write_data(folder, samples, dataset="digits", splits=[split])
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["augment.crop_padding_px=1"],
        ["runtime.loader=stream"],
        ["train.order=quasi_random"],
        ["runtime.stage_dir=/"],
        ["--seeds", "0,1"],
    ],
    ids=["resident", "streamed", "shards", "staged", "replicas"],
)
def test_a_run_is_that_on_files_of_these_samples(
    digits: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Bit for bit, also when it goes on in the middle of its second epoch."""
    monkeypatch.setattr("vitpa.data.sampler.BUFFER_BYTES", 1150 * 192 // 4)  # four shuffle buffers and a bit
    monkeypatch.setattr("vitpa.data.sampler.SHARD_BYTES", 16 * 192)
    seeds = ["--seeds", "0,1"] if "--seeds" in options else []
    settings = [each.replace("=/", f"={tmp_path}/disk") for each in options if not seeds]
    settings += ["train.epochs=2", "runtime.cpu_threads=1", "runtime.checkpoint_every_steps=7"]
    ours, theirs = arguments(digits, tmp_path / "held", HOLDOUT, *settings), arguments(written, tmp_path / "plain", *settings)
    assert main([*ours, *seeds]) == 0
    if not seeds:
        run = config_of(ours).run_dir
        run.result_json.unlink()
        (run.checkpoints / "step_000000034.pt").unlink()
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_000000028.pt"]
        assert main(ours) == 0
    assert main([*theirs, *seeds]) == 0
    for seed in (0, 1) if seeds else (0,):
        result, reference = (result_of([*words, f"seed={seed}"]) for words in (ours, theirs))
        assert result.weights_sha256 == reference.weights_sha256
        for name in ("val_top1", "val_top5", "val_loss", "steps"):
            assert getattr(result, name) == getattr(reference, name)
        assert (result.holdout, reference.holdout) == (0.2, 0)
        assert result.signature != reference.signature


@pytest.mark.parametrize("loader", ["runtime.loader=stream", "train.order=quasi_random"])
def test_streamed_is_as_resident(digits: Path, tmp_path: Path, loader: str) -> None:
    options = [HOLDOUT, "train.epochs=1", "runtime.cpu_threads=1"]
    resident, streamed = (
        trained(arguments(digits, tmp_path / name, *options, *more)) for name, more in (("a", []), ("b", [loader]))
    )
    assert resident.weights_sha256 == streamed.weights_sha256  # quasi_random has one shuffle buffer here
    assert resident.val_loss == streamed.val_loss


@pytest.mark.parametrize("options", [[], ["runtime.loader=stream"], ["train.order=quasi_random"]])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_shares_the_same_parts(digits: Path, options: list[str], processes: int) -> None:
    config = config_of(arguments(digits, digits, HOLDOUT, "train.global_batch_size=66", *options))
    parts = without_val(Beton.open(beton_path(digits, "digits", "train")), 0.2)
    trained_on, evaluated = [], []
    for rank in range(processes):
        group = replace(ALONE, rank=rank, world_size=processes)
        feed = open_data([config], group).feed
        feed.begin_epoch(1, 0)
        for _ in range(len(parts["train"]) // 66):
            feed.load()
            trained_on.append(feed.gather(*feed.inputs(0)))
            trained_on[-1] = trained_on[-1]._replace(**{k: v.clone() for k, v in trained_on[-1]._asdict().items()})
            feed.advance()
        feed.begin_evaluation()
        for _ in range(feed.num_eval_batches):
            feed.load_eval()
            batch = feed.gather_eval(*feed.eval_inputs())
            evaluated.append(batch._replace(**{k: v[batch.labels >= 0] for k, v in batch._asdict().items()}))
            feed.advance_eval()
        feed.close()
    seen = torch.cat([batch.samples for batch in trained_on])
    assert len(seen.unique()) == len(seen) == len(parts["train"]) // 66 * 66
    for split, batches in (("train", trained_on), ("val", evaluated)):
        images, labels = decoded(parts[split], 8)
        for batch in batches:
            assert torch.equal(batch.images, images[batch.samples])
            assert torch.equal(batch.labels, labels[batch.samples])
    assert torch.cat([batch.samples for batch in evaluated]).sort().values.tolist() == list(range(len(parts["val"])))


def test_what_is_read_ahead_is_the_part(digits: Path) -> None:
    part = without_val(Beton.open(beton_path(digits, "digits", "train")), 0.2)["train"]
    wanted = {at for begin in part.offsets.tolist() for at in range(begin, begin + 192)}
    found = [at for begin, end in extents(part, np.arange(len(part))) for at in range(begin, end)]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_an_image_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    made = Beton.open(write_data(tmp_path, [jpeg_sample(8, 8, seed) for seed in range(4)]))
    assert "the JPEG of sample 3 cannot be decoded" in str(made.part(np.array([1, 3])).undecodable(1))


def test_a_run_says_on_which_images_it_was_evaluated(
    digits: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, HOLDOUT, "train.epochs=1", "seed=3")
    result, config = trained(words), config_of(words)
    said = capsys.readouterr().err
    num_val = len(Beton.open(beton_path(written, "digits", "val")))
    assert f"(resident images, evaluated on {num_val} held-out images, 20 % of train)" in said
    assert f"seed 3 finished: held-out top-1 {100 * result.val_top1:.2f} % after 1 epochs" in said
    assert result.holdout == 0.2
    assert config.contradiction_of(result.model_copy(update={"holdout": 0.0})) == "says holdout 0.0, its configuration 0.2"
    assert config.contradiction_of(result.model_copy(update={"holdout": None})) == ""
    environment = json.loads(config.run_dir.env_json.read_text())
    counts = {split: len(Beton.open(beton_path(written, "digits", split))) for split in ("train", "val")}
    assert environment["num_samples"] == counts
    assert (num_images(config, "train"), num_images(config, "val")) == (counts["train"], counts["val"])
    assert environment["evaluated_on"] == "held-out 20 % of train"
    train = Beton.open(beton_path(digits, "digits", "train"))
    assert environment["beton_sha256"] == dict.fromkeys(("train", "val"), train.manifest.beton_sha256)
    run = load_run(config.run_dir.path)
    assert TrainedSweep(tmp_path, [run], []).frame()["evaluated_on"].tolist() == ["held-out 20 % of train"]


def test_a_log_counts_the_held_out_images_of_a_small_share(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(digits, tmp_path, "train.holdout=0.0001", "train.epochs=1")
    trained(words)
    train = Beton.open(beton_path(digits, "digits", "train"))
    assert held_out(train.labels, 0.0001).sum() == 10
    assert f"evaluated on 10 held-out images, {1000 / len(train):.3g} % of train)" in capsys.readouterr().err
    assert config_of(words).evaluated_on == "held-out 0.01 % of train, at least 1 image of each class"


def test_what_is_analysed_is_what_was_evaluated(digits: Path, written: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, HOLDOUT, "train.epochs=1", "model.patch_size=2")
    trained(words)
    run = load_run(config_of(words).run_dir.path)
    plain = config_of(arguments(written, tmp_path))
    for count in (7, 10_000):
        assert torch.equal(torch.cat(list(val_images(run.config, count))), torch.cat(list(val_images(plain, count))))
    found = structure(run, images=7)
    assert "7 images of held-out 20 % of train" in run_table(found)
    assert document_of(found)["images_of"] == "held-out 20 % of train"
