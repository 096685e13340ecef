"""The sixth section: the patch explorer's data, quantised to bytes within a budget, and pictures of the most important maps.

A cosine q of 0 to 255 is q / 127.5 - 1, off by at most 0.004; an attention is q / 255 of the largest entry of its head's
matrix, off by at most a five-hundredth of that.
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
from vitpa.analysis.maps_file import SavedMaps, read_maps
from vitpa.records import RunError

CUT = 0.55  # of similarities in colours, as in the paper's figure 1
MAX_CELLS, MAX_SEEDS = 12, 5  # whose maps are read, at most: those of an ImageNet run take 17 MB
BEYOND = f"left out; maps are of {MAX_CELLS} cells and {MAX_SEEDS} seeds of each at most, select with filters for others"
PRECISION = (
    "In this file a similarity is off by at most 0.004, an attention by at most a five-hundredth of the largest of its head."
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
            "similarity": {},
            "attend": {},
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
            if maps is None:
                problems.setdefault(reason, []).append(state.run.label)
            else:
                runs.append(_Run(state, maps))
        if runs:
            cells.append(runs)
    return cells, problems


def _fill(cells: Sequence[Sequence[_Run]], budget_bytes: int) -> list[str]:
    """Put maps in, the most important first, while there is room; what was left out, a line for each kind."""
    used, full = 0, False
    wanted = {"similarity": 0, "attend": 0}
    missing = {"similarity": 0, "attend": 0}
    for kind, run, index in _by_importance(cells):
        wanted[kind] += 1
        full = full or used + _size(kind, run) > budget_bytes  # nothing less important instead
        if full:
            missing[kind] += 1
            continue
        packed = _similarity(run.maps, index) if kind == "similarity" else _attention(run.maps, index)
        run.data[kind][str(index)] = packed
        used += _size(kind, run)
    said = {"similarity": "similarity maps", "attend": "sets of attention maps (all layers and heads of a run at an epoch)"}
    limit = f"Left out, to keep within {budget_bytes / 2**20:g} MiB of maps (--maps-mib)"
    return [f"{limit}: {missing[kind]} of {wanted[kind]} {text}." for kind, text in said.items() if missing[kind]]


def _by_importance(cells: Sequence[Sequence[_Run]]) -> Iterator[tuple[str, _Run, int]]:
    """First all similarities, then attention; of each seed by seed, and of a seed the last epoch, the first, the others."""
    for kind in ("similarity", "attend"):
        for seed in range(max(map(len, cells))):
            own = [cell[seed] for cell in cells if seed < len(cell)]
            count = max(len(run.maps.epochs) for run in own)
            for place in range(count):
                for run in own:
                    epochs = len(run.maps.epochs)
                    order = list(dict.fromkeys([epochs - 1, 0, *range(1, epochs - 1)]))
                    if place < epochs and (kind == "similarity" or run.maps.attention is not None):
                        yield kind, run, order[place]


def _size(kind: str, run: _Run) -> int:
    """Characters that a map takes in the file."""
    matrices = 1 if kind == "similarity" else run.data["layers"] * run.data["heads"]
    return -(-matrices * run.maps.patches**2 // 3) * 4 + 16 * matrices


def _similarity(maps: SavedMaps, index: int) -> str:
    values = np.clip(maps.similarity[index].astype(np.float64), -1, 1)
    return _packed(np.rint((values + 1) * 127.5))


def _attention(maps: SavedMaps, index: int) -> list[Any]:
    """The bytes of all layers and heads, and the largest entry of each."""
    assert maps.attention is not None
    values = np.clip(maps.attention[index].astype(np.float64), 0, 1)  # L, H, n, n
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
    caption = f"{label}: similarity {when}. The map in row i, column j is that of patch (i, j); colours from -{CUT} to {CUT}."
    cell = cell_text(run.state)
    alt = f"Similarity maps of the {side} x {side} patches of {cell}, {when}"
    yield _picture(caption, alt, image, -CUT, CUT)
    if maps.attention is not None:
        middle = side // 2 * side + side // 2
        rows = maps.attention[-1, :, :, middle].astype(np.float64)  # L, H, n
        image = _grid(rows.reshape(*rows.shape[:2], side, side))
        patch, (layers, heads) = f"the middle patch (row and column {side // 2 + 1})", rows.shape[:2]
        what = f"attention of {patch} {last}, a row for each of {layers} layers, a column for each of {heads} heads"
        caption = f"{label}: {what}; colours from 0 to {rows.max():.2f}."
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
