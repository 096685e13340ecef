"""The sixth section: the patch explorer's data, quantised to bytes within a budget, and pictures of the most important maps.

A cosine q of 0 to 255 is q / 127.5 - 1, off by at most 0.004; an attention is q / 255 of the largest entry of its matrix, off
by at most a five-hundredth of that.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.grid import short_name
from jobs.report.collect import by_cell
from jobs.report.document.cells import cell_text
from jobs.report.document.content import Block, Explorer, Picture, Section, Text
from jobs.report.document.png import CIVIDIS, png
from jobs.report.status import first_of
from jobs.state import RunState
from vitpa.analysis.findings import read_structure, unusable_reason
from vitpa.analysis.maps_file import SavedMaps, read_maps
from vitpa.records import RunError

CUT = 0.55  # of similarities in colours, as in the paper's figure 1
MAX_CELLS, MAX_SEEDS = 12, 5  # whose maps are read, at most: those of an ImageNet run take 17 MB
KINDS = {
    "similarity": "similarity maps",
    "of_layers": "sets of attention maps of layers, means over the heads (a set: a run at an epoch)",
    "of_heads": "sets of attention maps of all heads",
}
BEYOND = f"left out; maps are of {MAX_CELLS} cells and {MAX_SEEDS} seeds of each at most, select with filters for others"
PRECISION = (
    "In this file a similarity is off by at most 0.004, an attention by at most a five-hundredth of the largest of its map."
)


@dataclass
class _Run:
    """A run of the explorer: what its script needs besides the maps, and those of them that are in."""

    state: RunState
    maps: SavedMaps
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run, attention = self.state.run, self.maps.attention
        settings = [f"{short_name(axis)}={value}" for axis, value in run.settings.items()]
        self.data = {
            "group": " ".join([run.dataset, *settings]),
            "attention": run.attention,
            "seed": run.seed,
            "epochs": [round(float(epoch), 4) for epoch in self.maps.epochs],
            "side": round(self.maps.patches**0.5),
            "layers": 0 if attention is None else attention.shape[1],
            "heads": 0 if attention is None else attention.shape[2],
            "order": None if self.maps.order is None else self.maps.order.tolist(),
            **{kind: {} for kind in KINDS},  # by the index of the epoch
        }


def section(states: Sequence[RunState], root: Path, command: str, budget_bytes: int) -> Section:
    """The explorer of the finished runs below `root`, with maps of `budget_bytes` in the file at most."""
    cells, problems = _read(states, root)
    notes = [
        f"{first_of(labels, 3)}: {reason}" + (f"; make it with: {command}" if reason != BEYOND else "")
        for reason, labels in problems.items()
    ]
    if not cells:
        notes = notes or [f"No run with positional encodings is finished; then: {command}"]
        return Section("explorer", "Patch explorer", [Text(notes)], [command])
    left_out = _fill(cells, budget_bytes)
    blocks: list[Block] = [Text([_intro(cells)])]
    runs = [run for cell in cells for run in cell if run.data["similarity"]]
    document = {"runs": [run.data for run in runs], "colours": CIVIDIS, "cut": CUT}
    data = json.dumps(document, separators=(",", ":")) if runs else ""
    blocks.append(Explorer(data, [picture for cell in cells for picture in _pictures(cell[0])]))
    notes += [*left_out, PRECISION]
    return Section("explorer", "Patch explorer", [*blocks, Text(notes)], [command])


def _intro(cells: Sequence[Sequence[_Run]]) -> str:
    what = "How alike the positional encodings of patches are (cosines), and what a patch attends to, among the patches. The "
    what += "content model's attention is a mean over images that it is evaluated on, the positional one's is always the same."
    if any(run.maps.order is not None for cell in cells for run in cell):
        what += " Images were permuted: the maps show the patches where they lie in the original, the permutation undone."
    return what


def _read(states: Sequence[RunState], root: Path) -> tuple[list[list[_Run]], dict[str, list[str]]]:
    """The runs that have maps, by cell; and of the other finished ones, why not."""
    problems: dict[str, list[str]] = {}
    cells: list[list[_Run]] = []
    for members in by_cell([state for state in states if state.result is not None and state.run.config.model.kind == "vit"]):
        runs: list[_Run] = []
        for state in members:
            if len(cells) == MAX_CELLS or len(runs) == MAX_SEEDS:
                problems.setdefault(BEYOND, []).append(state.run.label)
                continue
            try:
                maps, reason = read_maps(state.run.directory(root).path / "analysis"), "has no analysis/maps.npz yet"
            except RunError as error:
                maps, reason = None, str(error)
            if maps is not None and state.result is not None and maps.weights_sha256 != state.result.weights_sha256:
                maps, reason = None, "its maps are of other weights than its result's"
            elif maps is not None and (other := _unusable_reason(state, root)):
                maps, reason = None, other
            if maps is None:
                problems.setdefault(reason, []).append(state.run.label)
            else:
                runs.append(_Run(state, maps))
        if runs:
            cells.append(runs)
    return cells, problems


def _unusable_reason(state: RunState, root: Path) -> str:
    """Why what was measured with the maps is not of the finished run; empty if it is, or nothing says so."""
    assert state.result is not None
    try:
        read = read_structure(state.run.directory(root).path / "analysis")
    except RunError:  # the section before says it
        return ""
    return "" if read is None else unusable_reason(read[0], state.run.config, state.result)


def _fill(cells: Sequence[Sequence[_Run]], budget_bytes: int) -> list[str]:
    """Put maps in, the most important first, while there is room; what was left out, a line for each kind."""
    used, full = 0, False
    wanted, missing = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for kind, run, index in _by_importance(cells):
        wanted[kind] += 1
        full = full or used + _size(kind, run) > budget_bytes  # nothing less important instead
        if full:
            missing[kind] += 1
            continue
        run.data[kind][str(index)] = (
            _similarity(run.maps, index) if kind == "similarity" else _attention(run.maps, index, kind)
        )
        used += _size(kind, run)
    limit = f"Left out, to keep within {budget_bytes / 2**20:g} MiB of maps (--maps-mib)"
    return [f"{limit}: {missing[kind]} of {wanted[kind]} {text}." for kind, text in KINDS.items() if missing[kind]]


def _by_importance(cells: Sequence[Sequence[_Run]]) -> Iterator[tuple[str, _Run, int]]:
    """All similarities; of the first seeds the attention of each layer, and of each head at the end; the rest."""
    first = [cell[:1] for cell in cells]
    yield from _of_kind("similarity", cells)
    yield from _of_kind("of_layers", first)
    yield from (each for each in _of_kind("of_heads", first) if each[2] == len(each[1].maps.epochs) - 1)
    yield from (each for each in _of_kind("of_layers", cells) if not any(each[1] is own for (own,) in first))
    for kind, run, index in _of_kind("of_heads", cells):
        if index != len(run.maps.epochs) - 1 or not any(run is own for (own,) in first):
            yield kind, run, index


def _of_kind(kind: str, cells: Sequence[Sequence[_Run]]) -> Iterator[tuple[str, _Run, int]]:
    """The maps of a kind, seed by seed; of a seed those of the last epoch, of the first, of the others."""
    for seed in range(max(map(len, cells))):
        own = [cell[seed] for cell in cells if seed < len(cell)]
        own = [run for run in own if kind == "similarity" or run.maps.attention is not None]
        orders = [list(dict.fromkeys([len(run.maps.epochs) - 1, 0, *range(1, len(run.maps.epochs) - 1)])) for run in own]
        for place in range(max(map(len, orders), default=0)):
            yield from ((kind, run, order[place]) for run, order in zip(own, orders, strict=True) if place < len(order))


def _size(kind: str, run: _Run) -> int:
    """Characters that a map, or a set of them, takes in the file."""
    layers, heads = run.data["layers"], run.data["heads"]
    matrices: int = {"similarity": 1, "of_layers": layers, "of_heads": layers * heads}[kind]
    return -(-matrices * run.maps.patches**2 // 3) * 4 + 16 * matrices


def _similarity(maps: SavedMaps, index: int) -> str:
    values = np.clip(maps.similarity[index].astype(np.float64), -1, 1)
    return _packed(np.rint((values + 1) * 127.5))


def _attention(maps: SavedMaps, index: int, kind: str) -> list[Any]:
    """The bytes of all layers, of each head or of the mean over them, and the largest entry of each matrix."""
    assert maps.attention is not None
    values = np.clip(maps.attention[index].astype(np.float64), 0, 1)  # L, H, n, n
    values = values.mean(axis=1, keepdims=True) if kind == "of_layers" else values
    largest = np.maximum(values.max(axis=(2, 3)), 1e-9)
    return [_packed(np.rint(values / largest[:, :, None, None] * 255)), [float(f"{each:.6g}") for each in largest.ravel()]]


def _packed(values: NDArray[np.float64]) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def _pictures(run: _Run) -> Iterator[Picture]:
    """Of a run: all its similarity maps initially and at the end, and what the middle patch attends to at the end."""
    maps, side, label = run.maps, run.data["side"], run.state.run.label
    last = f"after epoch {maps.epochs[-1]:g}"
    steps = [(0, "at initialisation"), (-1, last)] if len(maps.epochs) > 1 else [(-1, last)]
    grids = [_grid(maps.similarity[index].astype(np.float64).reshape(side, side, side, side)) for index, _ in steps]
    gap = np.full((grids[0].shape[0], 3), np.nan)
    image = np.hstack([part for grid in grids for part in (gap, grid)][1:])
    when = ", ".join(text for _, text in steps)
    colours = f"colours from -{CUT} (blue) to {CUT} (yellow)"
    caption = f"{label}: similarity {when}. The map in row i, column j is that of patch (i, j); {colours}."
    cell = cell_text(run.state)
    alt = f"Similarity maps of the {side} x {side} patches of {cell}, {when}"
    yield _picture(caption, alt, image, -CUT, CUT)
    if maps.attention is not None:
        middle = side // 2 * side + side // 2
        rows = maps.attention[-1, :, :, middle].astype(np.float64)  # L, H, n
        image = _grid(rows.reshape(*rows.shape[:2], side, side))
        patch, (layers, heads) = f"the middle patch (row and column {side // 2 + 1})", rows.shape[:2]
        what = f"attention of {patch} {last}, a row for each of {layers} layers, a column for each of {heads} heads"
        caption = f"{label}: {what}; colours from 0 (blue) to {rows.max():.2f} (yellow)."
        yield _picture(caption, f"Attention of {patch} of {cell} in every layer and head", image, 0, float(rows.max()))


def _grid(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maps (R, C, side, side) in R rows and C columns, with lines of NaN between."""
    padded = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    rows, columns, height, width = padded.shape
    return padded.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)[:-1, :-1]


def _picture(caption: str, alt: str, image: NDArray[np.float64], low: float, high: float) -> Picture:
    height, width = image.shape
    zoom = max(1, -(-320 // max(width, height)))
    return Picture(caption, alt, png(image, low, high), width * zoom, height * zoom)
