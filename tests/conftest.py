"""Data shared by tests: real .beton files, converted once per session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from data_prep.prep import Options, prepare
from tests.cluster import cluster

__all__ = ["cluster", "digits", "fresh_compiler", "photos"]

# The same examples in every run of CI; `make fuzz` draws new ones, many more.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", _PATIENT, derandomize=True, database=None, max_examples=25)
settings.register_profile("long", _PATIENT, max_examples=2000, print_blob=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, and those on SLURM, which mostly wait, in turn with the others, which compute."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    waiting = [file for file in marks if "slurm" in marks[file]]
    computing = sorted((file for file in marks if "slurm" not in marks[file]), key=lambda file: "slow" not in marks[file])
    place = {file: (number, files is computing) for files in (waiting, computing) for number, file in enumerate(files)}
    items.sort(key=lambda item: place[item.path])


def quiet(_line: str) -> None:
    """Take what `prepare` says."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """The compiler keeps eight versions of a function, and refuses a ninth: tests start without those of others."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with scikit-learn's digits as .beton files."""
    out = tmp_path_factory.mktemp("digits")
    assert prepare(Options(dataset="digits", out=out), quiet)
    return out


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with `photos`: JPEGs of different sizes in two classes, 12 to train on and 7 to validate."""
    source, out = tmp_path_factory.mktemp("photos_source"), tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = source / split / name
            folder.mkdir(parents=True)
            for index in range(count - (split == "val" and label)):
                height, width = (int(side) for side in rng.integers(40, 90, 2))
                coarse = rng.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(120 * label)
                Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    assert prepare(Options(dataset="photos", source=source, out=out, short_side_px=48, jpeg_quality=95), quiet)
    return out
