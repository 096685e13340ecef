"""`<run>/analysis/structure.json`: what was found about a run, for programs, and so that a sweep need not measure it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import TypeAdapter

from vitpa.analysis.structure import ASSOCIATION, TITLES, Finding, Structure
from vitpa.checkpoint_file import files_by_step
from vitpa.records import Record, RunError, read_record, write_json
from vitpa.trained import TrainedRun

MEASURES = {name: {"what": title, "unit": unit} for name, (title, unit) in {**TITLES, **ASSOCIATION}.items()}


class StructureRecord(Record):
    """What is read of the file."""

    format: Literal[1]
    weights_sha256: str | None  # of the run's result; None: it was not finished
    grid: int
    neighbours: int
    images: int | None
    images_wanted: int | None = None  # files of earlier versions say here what was asked for as `images`
    block: int
    findings: list[dict[str, Any]]


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
        "block": found.block,
        "measures": MEASURES,
        "findings": [asdict(each) for each in found.findings],
    }


def write_record(found: Structure) -> None:
    """Write it into the run's folder."""
    write_json(found.run.path / "analysis" / "structure.json", document_of(found))


def recorded(run: TrainedRun, *, neighbours: int, images: int, block: int) -> Structure | None:
    """What was found about a finished run before, without maps; None if it was of other weights or asked otherwise."""
    try:
        record = read_record(StructureRecord, run.path / "analysis" / "structure.json")
        if record is None or run.result is None:
            return None
        found = TypeAdapter(list[Finding]).validate_python(record.findings)
        kept = {step / run.steps_per_epoch for step in files_by_step(run.directory.snapshots)}
    except (RunError, ValueError):  # it is written anew
        return None
    wanted = (run.result.weights_sha256, neighbours, block)
    needed = images or None if run.config.model.attention == "content" else None
    images_wanted = record.images if record.images_wanted is None else record.images_wanted
    fits = (record.weights_sha256, record.neighbours, record.block) == wanted and images_wanted == needed
    if not fits or not kept <= {each.epoch for each in found}:
        return None
    return Structure(run, record.grid, neighbours, record.images, images_wanted, block, found, {})
