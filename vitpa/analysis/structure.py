"""What a run has learnt of the spatial structure of its images: every measure after every epoch of which there are weights.

Each value stands beside its value at initialisation and under chance (vitpa/analysis/measures.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from vitpa.analysis import measures
from vitpa.analysis.attention import patch_attention
from vitpa.analysis.findings import Finding, split_of
from vitpa.analysis.images import val_images
from vitpa.analysis.measures import Measured, Places
from vitpa.config import RunConfig
from vitpa.data.augment.permute import block_order
from vitpa.records import RunError
from vitpa.theory.data import squares
from vitpa.trained import TrainedRun

NEIGHBOURS = 4
IMAGES = 256


@dataclass(frozen=True)
class Maps:
    """The matrices at one epoch; patches as they lie in the image, that is with a permutation undone.

    Attributes:
        similarity: (n, n), cosines.
        scaled: (n, n), as in the paper's figure 1.
        attention: (L, H, n, n); None without images for the content model.
        shown: (n, n), as `scaled`, but of the patches as a permuted image shows them.
    """

    similarity: Tensor
    scaled: Tensor
    attention: Tensor | None
    shown: Tensor


@dataclass(frozen=True)
class Structure:
    """Everything that is found out about a run.

    Attributes:
        run: The run.
        grid: Patches along a side of the image.
        neighbours: How many neighbours the recall asks for.
        images: Of those that the run is evaluated on, over which content attention is a mean; None: no image was needed.
        images_wanted: As many as were asked for; there may be fewer.
        images_sha256: Of the file that they are in; None: no image was needed.
        block: Side of the squares of patches that patch association was measured of; 0: it was not.
        findings: All numbers, in the order of the epochs.
        maps: By epoch; none if it was read from a file.
        averaged_epochs: After which the average of train.ema_decay was measured, and not the weights.
    """

    run: TrainedRun
    grid: int
    neighbours: int
    images: int | None
    images_wanted: int | None
    images_sha256: str | None
    block: int
    findings: list[Finding]
    maps: dict[float, Maps]
    averaged_epochs: list[float] = field(default_factory=list)

    @property
    def permuted(self) -> bool:
        """Whether the images were permuted by blocks of whole patches, which is undone."""
        return undone(self.run.config) is not None

    @property
    def images_text(self) -> str:
        """How many images of which, for people: `256 val images`; empty if no image was needed."""
        config = self.run.config
        if not self.images:
            return ""
        return f"{self.images} images of {config.evaluated_on}" if config.train.holdout else f"{self.images} val images"

    def value(self, measure: str, epoch: float | None = None, layer: int | None = None, head: int | None = None) -> float:
        """One value, by default after the last epoch and as the mean over layers and heads.

        Raises:
            KeyError: it was not measured.
        """
        wanted = (self.findings[-1].epoch if epoch is None else epoch, measure, layer, head)
        for each in self.findings:
            if (each.epoch, each.measure, each.layer, each.head) == wanted:
                return each.value
        raise KeyError(wanted)


def structure(
    run: TrainedRun, *, neighbours: int = NEIGHBOURS, images: int = IMAGES, data_dir: str | None = None, block: int = 0
) -> Structure:
    """Measure a run.

    Args:
        run: Finished or not.
        neighbours: How many neighbours the recall asks for.
        images: Of those that the run is evaluated on, for content attention; 0: leave it out. They are spread evenly, and
            all of them if there are fewer.
        data_dir: Where the data set is; None: where the run says.
        block: Measure patch association, too, with squares of block x block patches as sets; 0: do not.

    Raises:
        RunError: the network has no positional encodings, weights are missing, damaged or not finite, or the images are
            others than those that the run was evaluated on.
        BetonError: the images cannot be used.
    """
    config = run.config
    if config.model.kind != "vit":
        raise RunError(f"{run.path}: its network has no positional encodings to analyse")
    side = config.model.img_size // config.model.patch_size
    if not 1 <= neighbours < side * side:
        raise RunError(f"{run.path}: {neighbours} neighbours of a patch: it has {side * side - 1} others")
    if block and (side % block or not 1 < block < side):
        sizes = ", ".join(str(size) for size in range(2, side) if side % size == 0) or "there is none"
        raise RunError(
            f"{run.path}: squares of {block} x {block} patches do not divide its {side} x {side} patches into several sets of "
            f"several patches; sides that do: {sizes}"
        )
    needed = images if config.model.attention == "content" else 0
    images_sha256 = run.beton_sha256.get(split_of(config)) if needed else None
    batches = list(val_images(config, needed, data_dir, images_sha256)) if needed else []
    sets = squares(side, block) if block else None
    geometry = Geometry(measures.grid_places(side), neighbours, measures.orders(side * side), sets)
    epochs = run.epochs()
    found: list[Finding] = []
    maps = {}
    for epoch in epochs:
        model = run.model(ema=True) if run.is_averaged(epoch) else run.model(epoch)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise RunError(f"{run.path}: its weights after epoch {epoch:g} are not finite numbers: the training has diverged")
        its, entropies = maps_of(model, batches, undone(config))
        maps[epoch] = its
        first = {(each.measure, each.layer, each.head): each.value for each in found if each.epoch == 0}
        for measure, layer, head, value, *chance in measured(its, entropies, geometry):
            found.append(Finding(epoch, measure, layer, head, value, first.get((measure, layer, head), value), *chance))
    used = sum(map(len, batches))
    averaged = [epoch for epoch in epochs if run.is_averaged(epoch)]
    return Structure(run, side, neighbours, used or None, needed or None, images_sha256, block, found, maps, averaged)


@dataclass(frozen=True)
class Geometry:
    """Where the patches lie, (n, 2), how many are neighbours, random orders of them, (P, n), and the set of each, (n,)."""

    places: Places
    neighbours: int
    shuffles: Int64[Tensor, "P n"]
    sets: Int64[Tensor, " n"] | None = None


def undone(config: RunConfig) -> Int64[Tensor, " n"] | None:
    """Which patch of the permuted image shows each patch of the original; None if patches are not permuted, or not whole."""
    block, patch = config.augment.permute_block_px, config.model.patch_size
    if not block or block % patch:
        return None
    side, blocks, k = config.model.img_size // patch, config.model.img_size // block, block // patch
    row, column = measures.grid_places(side).long().unbind(1)
    shown = block_order(blocks)[squares(side, k)]  # the original block that each patch is of
    original = (shown // blocks * k + row % k) * side + shown % blocks * k + column % k
    return original.argsort()


def maps_of(model: Any, batches: Sequence[Tensor], order: Tensor | None) -> tuple[Maps, Tensor | None]:
    """The matrices of a model, its patches in `order` (n,), and the entropy (L, H) of its attention."""
    vectors = model.pos_embed.detach()[0, model.num_prefix_tokens :]
    order = torch.arange(len(vectors)) if order is None else order
    attention = patch_attention(model, batches)

    def ordered(matrices: Tensor) -> Tensor:
        return matrices[..., order[:, None], order[None, :]]

    scaled = measures.scaled_products(vectors)
    maps = Maps(
        similarity=ordered(measures.cosine_similarity(vectors)),
        scaled=ordered(scaled),
        attention=None if attention is None else ordered(attention[0]),
        shown=scaled,
    )
    return maps, None if attention is None else attention[1]


def measured(
    maps: Maps, entropies: Tensor | None, geometry: Geometry
) -> Iterator[tuple[str, int | None, int | None, float, float | None, float | None, float | None]]:
    """Each measure, layer and head with the value, the expectation under chance and the ends of its interval."""
    places, count, shuffles = geometry.places, geometry.neighbours, geometry.shuffles
    similarity = maps.similarity[None]
    yield from _of_layers("similarity_recall", measures.neighbour_recall(similarity, places, count, shuffles))
    yield from _of_layers("similarity_correlation", measures.distance_correlation(similarity, places, shuffles))
    if geometry.sets is not None:
        yield from _association("", similarity, geometry.sets, shuffles, ())
    if maps.attention is None or entropies is None:
        return
    heads = maps.attention.shape[:2]
    attention = maps.attention.flatten(0, 1)
    yield from _of_layers("attention_recall", measures.neighbour_recall(attention, places, count, shuffles), heads)
    yield from _of_layers("attention_correlation", measures.distance_correlation(attention, places, shuffles), heads)
    yield from _of_layers("attention_distance", measures.attention_distance(attention, places, shuffles), heads)
    if geometry.sets is not None:
        yield from _association("attention_", attention, geometry.sets, shuffles, heads)
    yield "attention_entropy", None, None, entropies.mean().item(), None, None, None
    for layer, its in enumerate(entropies):
        yield "attention_entropy", layer, None, its.mean().item(), None, None, None
        for head, value in enumerate(its.tolist()):
            yield "attention_entropy", layer, head, value, None, None, None


def _association(
    prefix: str, matrices: Tensor, sets: Tensor, shuffles: Tensor, heads: Sequence[int]
) -> Iterator[tuple[str, int | None, int | None, float, float, float, float]]:
    shares, chance = measures.association_share(matrices, sets)
    same = torch.full((len(shares), len(shuffles)), chance, dtype=torch.float64)
    yield from _of_layers(f"{prefix}association_share", Measured(shares, same[:, 0], same), heads)
    yield from _of_layers(f"{prefix}association_gap", measures.association_gap(matrices, sets, shuffles), heads)


def _of_layers(
    name: str, found: Measured, heads: Sequence[int] = ()
) -> Iterator[tuple[str, int | None, int | None, float, float, float, float]]:
    """A measure as the mean over all of its matrices and, of attention with L x H `heads`, for each layer and each head."""
    parts: list[tuple[int | None, int | None, Measured]] = [(None, None, found.mean())]
    if heads:
        layers = found.split(heads[1])
        parts += [(layer, None, its.mean()) for layer, its in enumerate(layers)]
        parts += [(layer, head, one) for layer, its in enumerate(layers) for head, one in enumerate(its.split(1))]
    for layer, head, its in parts:
        low, high = its.interval()[:, 0].tolist()
        yield name, layer, head, its.value.item(), its.chance.item(), low, high
