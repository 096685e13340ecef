"""What `vitpa analyze` measures, and the file in which it stands: `<run>/analysis/structure.json`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from vitpa.config import RunConfig
from vitpa.records import Record, RunError, read_record
from vitpa.rundir import Result

NAME = "structure.json"
TITLES = {  # what is measured, and its unit
    "similarity_recall": ("neighbour recall of similarity", "share"),
    "similarity_correlation": ("correlation of similarity with distance", "Pearson's r"),
    "attention_recall": ("neighbour recall of attention", "share"),
    "attention_correlation": ("correlation of attention with distance", "Pearson's r"),
    "attention_distance": ("mean attention distance", "patches"),
    "attention_entropy": ("entropy of attention", "nats"),
}
ASSOCIATION = {  # of the definition 2.2, where a partition of the patches is given
    "association_share": ("patches whose set similarity finds", "share"),
    "association_gap": ("similarity within sets less that between", "cosine"),
    "attention_association_share": ("patches whose set attention finds", "share"),
    "attention_association_gap": ("attention within sets less that between", "attention"),
}
MEASURES = {name: {"what": title, "unit": unit} for name, (title, unit) in {**TITLES, **ASSOCIATION}.items()}
MEANINGS = {  # for readers of a report
    "similarity_recall": "of the patches whose encodings are most like a patch's, the share that is nearest; high is local",
    "similarity_correlation": "of the likeness of two patches' encodings with the distance between them; negative is local",
    "attention_recall": "of the patches that a patch attends to most, the share that is nearest; high is local",
    "attention_correlation": "of the attention between two patches with the distance between them; negative is local",
    "attention_distance": "how far a patch is from those that it attends to, weighted by attention; low is local",
    "attention_entropy": "how widely a patch's attention is spread: 0 on one patch, the logarithm of their number if even",
    "association_share": "share of patches for which similarity finds the set of the partition that they are in",
    "association_gap": "how much more alike the encodings within a set of the partition are than those of different sets",
    "attention_association_share": "share of patches for which attention finds the set of the partition that they are in",
    "attention_association_gap": "how much more patches attend to those of their set of the partition than to others",
}


@dataclass(frozen=True)
class Finding:
    """One number.

    Attributes:
        epoch: After how many epochs.
        measure: A key of TITLES.
        layer: From 0; None: the mean over all layers, or no attention's.
        head: From 0; None: the mean over all heads, or no attention's.
        value: What it is.
        initial: The same at initialisation.
        chance: The same expected if the patches changed places at random; None where that changes nothing.
        chance_low: 2.5 % of such orders are below.
        chance_high: 2.5 % are above.
    """

    epoch: float
    measure: str
    layer: int | None
    head: int | None
    value: float
    initial: float
    chance: float | None = None
    chance_low: float | None = None
    chance_high: float | None = None


AVERAGED = (  # which weights were measured, for people
    "Of runs with train.ema_decay the values at the end are those of the average, which counts, those before of the weights."
)


class StructureRecord(Record):
    """What is read of the file."""

    format: Literal[1]
    weights_sha256: str | None  # of the run's result; None: it was not finished
    grid: int
    neighbours: int
    images: int | None
    images_wanted: int | None = None  # files of earlier versions say here what was asked for as `images`
    images_sha256: str | None = None  # of the file that they are in; earlier versions did not say
    averaged_epochs: list[float] = Field(default_factory=list)  # at which train.ema_decay's average was measured
    block: int
    findings: list[dict[str, Any]]

    def parsed(self) -> list[Finding]:
        """Its numbers.

        Raises:
            ValueError: they are not of this form.
        """
        return TypeAdapter(list[Finding]).validate_python(self.findings)


def split_of(config: RunConfig) -> str:
    """The split whose file holds the images that a run is evaluated on."""
    return "train" if config.train.holdout else "val"


def unusable_reason(record: StructureRecord, config: RunConfig, result: Result) -> str:
    """Why a record is not what is to be found of a finished run; empty if it is.

    Args:
        record: What stands in its folder.
        config: The run's.
        result: The run's.
    """
    if record.weights_sha256 != result.weights_sha256:
        return "analysed with other weights than its result's"
    if config.train.ema_decay and not record.averaged_epochs:
        return "analysed without the average of its weights (train.ema_decay), which counts"
    if record.images and record.images_sha256 is None:
        return "analysed by an earlier version, which did not record with which images"
    if record.images and record.images_sha256 != result.beton_sha256.get(split_of(config)):
        return "analysed with other images than it was evaluated on"
    return ""


def read_structure(folder: Path) -> tuple[StructureRecord, list[Finding]] | None:
    """What stands in the folder `analysis` of a run; None if nothing does.

    Raises:
        RunError: it cannot be used.
    """
    path = folder / NAME
    record = read_record(StructureRecord, path)
    if record is None:
        return None
    try:
        return record, record.parsed()
    except ValidationError as error:
        raise RunError(f"{path}: its findings cannot be used; make it again: vitpa analyze RUN") from error
