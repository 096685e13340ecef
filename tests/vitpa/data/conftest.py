"""What the tests of reading images share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vitpa.data.beton import Beton
from vitpa.data.manifest import beton_path, manifest_path


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Beton:
    """The training images, sample 5 of which is no JPEG any more."""
    path = tmp_path / "photos" / "train.beton"
    path.parent.mkdir()
    shutil.copy(beton_path(photos, "photos", "train"), path)
    shutil.copy(manifest_path(beton_path(photos, "photos", "train")), manifest_path(path))
    with Beton.open(path) as whole:
        offset, size = int(whole.offsets[5]), int(whole.sizes[5])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return Beton.open(path)
