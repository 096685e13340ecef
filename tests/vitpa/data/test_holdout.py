"""A part of train in the place of val: which samples, and that a run on it is a run on files with just these samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.groups import num_images
from tests.support.trainings import arguments, config_of, metrics, trained
from vitpa.analysis.images import val_images
from vitpa.data.beton import Beton
from vitpa.data.holdout import held_out, without_val
from vitpa.data.manifest import BetonError, beton_path
from vitpa.data.resident import decoded
from vitpa.datasets import num_held_out
from vitpa.trained import load_run

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


def test_a_run_is_that_on_files_of_these_samples(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference: data sets of just these samples, opened as files of their own are."""
    options = ["train.epochs=2", "runtime.cpu_threads=1", "runtime.log_every_steps=5"]
    words = arguments(digits, tmp_path / "held", HOLDOUT, *options)
    result = trained(words)
    parts = without_val(Beton.open(beton_path(digits, "digits", "train")), 0.2)
    monkeypatch.setattr("vitpa.data.open.open_splits", lambda *_: parts)
    plain = arguments(digits, tmp_path / "plain", *options)
    reference = trained(plain)
    assert result.weights_sha256 == reference.weights_sha256
    assert (result.val_top1, result.val_loss, result.steps) == (reference.val_top1, reference.val_loss, reference.steps)
    assert result.signature != reference.signature
    config = config_of(words)
    assert (num_images(config, "train"), num_images(config, "val")) == (len(parts["train"]), len(parts["val"]))
    top1 = result.val_top1 * len(parts["val"])
    assert top1 == pytest.approx(round(top1), abs=1e-6), "of the held-out images, each once"


@pytest.mark.parametrize("loader", ["runtime.loader=stream", "train.order=quasi_random"])
def test_streamed_is_as_resident(digits: Path, tmp_path: Path, loader: str) -> None:
    options = [HOLDOUT, "train.epochs=1", "runtime.cpu_threads=1"]
    resident, streamed = (
        trained(arguments(digits, tmp_path / name, *options, *more)) for name, more in (("a", []), ("b", [loader]))
    )
    assert resident.weights_sha256 == streamed.weights_sha256  # quasi_random has one shuffle buffer here
    assert resident.val_loss == streamed.val_loss


def test_seeds_and_processes_see_the_same_part(digits: Path, tmp_path: Path) -> None:
    words = arguments(digits, tmp_path, HOLDOUT, "train.epochs=1", "seed=3")
    trained(words)
    run = load_run(config_of(words).run_dir.path)
    batches = torch.cat(list(val_images(run.config, 10_000)))
    train = Beton.open(beton_path(digits, "digits", "train"))
    assert len(batches) == len(without_val(train, 0.2)["val"])
    rows = [row for row in metrics(run.directory) if "val/top1" in row]
    assert len(rows) == 1
    assert json.loads(run.directory.env_json.read_text())["beton_sha256"] == dict.fromkeys(
        ("train", "val"), train.manifest.beton_sha256
    )
