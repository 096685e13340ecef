"""maps.npz: it reads back as written, and whatever else it holds is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitpa.analysis.maps_file import SavedMaps, read_maps, write_maps
from vitpa.records import RunError

MAPS = SavedMaps(
    epochs=np.array([0.0, 2.0]),
    similarity=np.linspace(-1, 1, 32).reshape(2, 4, 4).astype(np.float16),
    attention=np.full((2, 3, 2, 4, 4), 0.25, dtype=np.float16),
    order=np.array([1, 0, 3, 2]),
    weights_sha256="0" * 64,
)


def test_it_reads_back_as_written(tmp_path: Path) -> None:
    assert read_maps(tmp_path) is None
    for maps in (MAPS, replace(MAPS, attention=None, order=None)):
        write_maps(tmp_path, maps)
        found = read_maps(tmp_path)
        assert found is not None
        for name, value in vars(maps).items():
            np.testing.assert_array_equal(getattr(found, name), value)
    first = (tmp_path / "maps.npz").read_bytes()
    write_maps(tmp_path, replace(MAPS, attention=None, order=None))
    assert (tmp_path / "maps.npz").read_bytes() == first


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": np.array([0.0])},
        {"similarity": np.zeros((2, 3, 3), np.float16)},
        {"similarity": np.full((2, 4, 4), np.nan, np.float16)},
        {"similarity": np.zeros((2, 4, 4), np.int64)},
        {"attention": np.zeros((2, 3, 2, 4, 5), np.float16)},
        {"order": np.array([0, 0, 1, 2])},
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_maps(tmp_path, replace(MAPS, **change))
    with pytest.raises(RunError, match=r"maps.npz: its arrays do not fit one another; make it again: vitpa analyze RUN$"):
        read_maps(tmp_path)


def test_damage_is_one_line(tmp_path: Path) -> None:
    write_maps(tmp_path, MAPS)
    whole = (tmp_path / "maps.npz").read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:60] + bytes(30) + whole[90:], b"\x93NUMPY"):
        (tmp_path / "maps.npz").write_bytes(damaged)
        with pytest.raises(RunError, match=r"maps.npz: cannot be read \(.*\); make it again: vitpa analyze RUN$"):
            read_maps(tmp_path)
