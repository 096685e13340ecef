"""Images of a run's evaluation, as it shows them to the network, for the attention that depends on content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from jaxtyping import Float32
from torch import Tensor

from vitpa.analysis.findings import split_of
from vitpa.arguments import expand_path
from vitpa.config import RunConfig
from vitpa.data.augment.pipeline import Augmentation
from vitpa.data.beton import Beton
from vitpa.data.holdout import without_val
from vitpa.data.manifest import beton_path
from vitpa.data.stream import StreamedImages
from vitpa.records import RunError

BATCH_SIZE = 32


def val_images(
    config: RunConfig, count: int, data_dir: str | None = None, sha256: str | None = None
) -> Iterator[Float32[Tensor, "B 3 S S"]]:
    """Batches of `count` images, spread evenly over val or what was held out (all of them if it has fewer), on the CPU.

    Args:
        config: Of the run that was evaluated on them.
        count: How many.
        data_dir: The folder with <dataset>/val.beton, or train.beton of which they are a part; None: where the run says.
        sha256: The checksum that the file has to have by its manifest; None: any.

    Raises:
        RunError: the file holds other images.
        BetonError: the file is missing, or an image cannot be decoded.
    """
    folder = config.runtime.data_path if data_dir is None else expand_path(data_dir, "--data-dir")
    cpu = torch.device("cpu")
    augmentation = Augmentation.of([config], img_size=config.model.img_size, device=cpu)
    split = split_of(config)
    with closing(Beton.open(beton_path(folder, config.dataset, split), config.dataset, split)) as beton:
        if sha256 is not None and sha256 != beton.manifest.beton_sha256:
            raise RunError(
                f"{beton.path}: holds other images than those that run {config.signature} was evaluated on (beton_sha256 "
                f"{beton.manifest.beton_sha256[:12]}, the run's is {sha256[:12]}); put these back, name their folder with "
                "--data-dir, or leave out the attention that depends on images: --images 0"
            )
        if config.train.holdout:
            beton = without_val(beton, config.train.holdout)["val"]  # noqa: PLW2901 - a part of the same file
        count = min(count, len(beton))
        samples = torch.arange(count) * len(beton) // count
        images = StreamedImages(beton, config.augment, img_size=config.model.img_size, seed=0, device=cpu, workers=2)
        for batch in images.eval_batches(samples.split(BATCH_SIZE)):
            yield augmentation.evaluated(batch.images)
