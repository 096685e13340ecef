"""`structure.json` and `maps.npz` of `<run>/analysis`: what was found, so that a sweep need not measure it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from vitpa.analysis import maps_file
from vitpa.analysis.findings import MEASURES, NAME, read_structure, unusable_reason
from vitpa.analysis.maps_file import SavedMaps, write_maps
from vitpa.analysis.structure import Structure, undone
from vitpa.records import RunError, write_json
from vitpa.trained import TrainedRun


def document_of(found: Structure) -> dict[str, Any]:
    """What is found about a run as plain data."""
    config, result = found.run.config, found.run.result
    return {
        "format": 1,
        "signature": found.run.directory.signature,
        "weights_sha256": result.weights_sha256 if result else None,
        "dataset": config.dataset,
        "attention": config.model.attention,
        "seed": config.seed,
        "permute_block_px": config.augment.permute_block_px,
        "grid": found.grid,
        "neighbours": found.neighbours,
        "images": found.images,
        "images_wanted": found.images_wanted,
        "images_of": config.evaluated_on,
        "images_sha256": found.images_sha256,
        "averaged_epochs": found.averaged_epochs,
        "block": found.block,
        "measures": MEASURES,
        "findings": [asdict(each) for each in found.findings],
    }


def write_record(found: Structure) -> None:
    """Write both into the run's folder `analysis`."""
    folder = found.run.path / "analysis"
    write_maps(folder, saved_maps(found))
    write_json(folder / NAME, document_of(found))


def saved_maps(found: Structure) -> SavedMaps:
    """The matrices of a run that was just measured, as they are kept."""
    maps, order, result = list(found.maps.values()), undone(found.run.config), found.run.result
    attention = [each.attention for each in maps if each.attention is not None]
    return SavedMaps(
        epochs=np.array(list(found.maps)),
        similarity=np.stack([each.similarity.numpy() for each in maps]).astype(np.float16),
        attention=np.stack([each.numpy() for each in attention]).astype(np.float16) if attention else None,
        order=None if order is None else order.numpy(),
        weights_sha256=result.weights_sha256 if result else "",
    )


def recorded(run: TrainedRun, *, neighbours: int, images: int, block: int) -> Structure | None:
    """What was found about a finished run before, without maps; None if it is not of the run, or was asked otherwise."""
    folder = run.path / "analysis"
    try:
        read = read_structure(folder)
        if read is None or run.result is None or not (folder / maps_file.NAME).is_file():
            return None
        record, found = read
        kept = set(run.kept_epochs())
    except RunError:  # it is written anew
        return None
    if unusable_reason(record, run.config, run.result):
        return None
    needed = images or None if run.config.model.attention == "content" else None
    images_wanted = record.images if record.images_wanted is None else record.images_wanted
    fits = (record.neighbours, record.block, images_wanted) == (neighbours, block, needed)
    if not fits or not kept <= {each.epoch for each in found}:
        return None
    return Structure(
        run,
        record.grid,
        neighbours,
        record.images,
        images_wanted,
        record.images_sha256,
        block,
        found,
        {},
        record.averaged_epochs,
    )
