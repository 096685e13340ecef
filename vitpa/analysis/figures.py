"""Figures of what runs have learnt, as PNG and SVG: similarity maps, attention maps, and measures over layers and epochs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from vitpa.analysis.findings import TITLES
from vitpa.analysis.seeds import CHANCE
from vitpa.analysis.similarity import similarity_grid
from vitpa.analysis.structure import Structure
from vitpa.figures import COLOURS, GREY, STYLE, save

CUT = 0.55  # of the scaled similarities, in the paper's figure 1


def draw_run(found: Structure, folder: Path) -> None:
    """All figures of a run."""
    frame = pd.DataFrame([asdict(each) for each in found.findings]).assign(cell=found.run.name)
    with mpl.rc_context(STYLE):
        save(similarity(found), folder, "similarity")
        if found.maps[max(found.maps)].attention is not None:
            save(attention(found), folder, "attention")
            save(over_layers(frame), folder, "layers")
        save(over_training(frame), folder, "training")


def draw_sweep(cells: pd.DataFrame, folder: Path) -> None:
    """The figures of a sweep: means over seeds with their 95 % intervals; `cells` is of vitpa.analysis.seeds.over_seeds."""
    with mpl.rc_context(STYLE):
        frame = cells.rename(columns={"mean": "value"})
        save(over_training(frame), folder, "training")
        save(over_layers(frame), folder, "layers")


def similarity(found: Structure) -> Figure:
    """Figure 1's maps at initialisation and at the end: row i, column j holds the similarities of patch (i, j)."""
    first, last = sorted(found.maps)[0], sorted(found.maps)[-1]
    panels: list[tuple[str, Tensor]] = [
        ("initialisation", found.maps[first].scaled),
        (f"epoch {last:g}", found.maps[last].scaled),
    ]
    if found.permuted:
        panels = [
            (f"epoch {last:g}, as the permuted image shows the patches", found.maps[last].shown),
            (f"epoch {last:g}, permutation undone", found.maps[last].scaled),
        ]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    side = found.grid
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        between = similarity_grid(torch.zeros_like(matrix), zoom=1)[0] == 1  # the lines between the maps
        grid = (similarity_grid(matrix.clamp(max=CUT), zoom=1)[0] * 2 - 1).masked_fill(between, float("nan"))
        image = axis.imshow(grid.numpy(), cmap="cividis", vmin=-CUT, vmax=CUT, interpolation="nearest")
        ticks = [place * (side + 1) + (side - 1) / 2 for place in range(side)]
        names = [str(place) for place in range(side)]
        axis.set(title=title, xlabel="patch column", ylabel="patch row")
        axis.set_xticks(ticks, names)
        axis.set_yticks(ticks, names)
    figure.colorbar(image, ax=axes, label=f"similarity P^T P, scaled to [-1, 1], cut at {CUT}", shrink=0.8)
    figure.suptitle(found.run.name)
    return figure


def attention(found: Structure) -> Figure:
    """What the middle patch attends to at the end: a map for each layer (row) and head (column)."""
    matrices = found.maps[max(found.maps)].attention
    assert matrices is not None
    layers, heads, side = len(matrices), matrices.shape[1], found.grid
    middle = side // 2
    maps = matrices[:, :, middle * side + middle].view(layers, heads, side, side)
    # one image with a line between the maps: a map each in axes of its own takes seconds
    image = F.pad(maps, (0, 1, 0, 1), value=float("nan")).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]
    figure = Figure(figsize=(max(0.6 * heads, 3) + 1.6, 0.6 * layers + 1.4), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(image.numpy(), cmap="cividis", vmin=0, interpolation="nearest")
    heads_at, layers_at = ([each * (side + 1) + middle for each in range(count)] for count in (heads, layers))
    axis.plot(heads_at * layers, [row for row in layers_at for _ in range(heads)], "+", color="white", markersize=4)
    axis.set(xlabel="head", ylabel="layer")
    axis.set_xticks(heads_at, [str(head) for head in range(heads)])
    axis.set_yticks(layers_at, [str(layer) for layer in range(layers)])
    figure.colorbar(shown, ax=axis, label="attention (rows sum to 1)", shrink=0.8)
    over = f", mean over {found.images_text}" if found.images else ""
    figure.suptitle(f"{found.run.name}\nattention of the patch marked +{over}")
    return figure


def over_training(frame: pd.DataFrame) -> Figure:
    """Each measure over the epochs: a line per run or cell, its interval over seeds, and chance as a grey band."""
    return _lines(frame[frame["layer"].isna()], "epoch", list(TITLES))


def over_layers(frame: pd.DataFrame) -> Figure:
    """Each measure of attention over the layers, after the last epoch: means over the heads as lines, each head as a dot."""
    of_layers = frame[frame["layer"].notna()]
    last = of_layers.groupby("cell")["epoch"].transform("max")
    return _lines(of_layers[of_layers["epoch"] == last], "layer", [name for name in TITLES if name.startswith("attention")])


def _lines(frame: pd.DataFrame, x: str, measures: Sequence[str]) -> Figure:
    columns = -(-len(measures) // 2)
    figure = Figure(figsize=(3.1 * columns, 5), layout="constrained")
    for axis, measure in zip(figure.subplots(2, columns).flat, measures, strict=True):
        shown = frame[frame["measure"] == measure]
        for (cell, rows), colour in zip(shown.groupby("cell", sort=False), itertools.cycle(COLOURS)):
            means, heads = rows[rows["head"].isna()], rows[rows["head"].notna()]
            axis.plot(means[x], means["value"], ".-", color=colour, label=cell, markersize=4)
            if "ci95_low" in means:
                axis.fill_between(means[x], means["ci95_low"], means["ci95_high"], color=colour, alpha=0.2, linewidth=0)
            axis.plot(heads[x], heads["value"], ".", color=colour, alpha=0.35, markersize=3)
        chance = shown[shown["head"].isna()].dropna(subset=["chance"]).groupby(x)[CHANCE].mean()
        if len(chance):
            axis.plot(chance.index, chance["chance"], "--", color=GREY, label="chance", linewidth=1)
            axis.fill_between(chance.index, chance["chance_low"], chance["chance_high"], color=GREY, alpha=0.2, linewidth=0)
        title, unit = TITLES[measure]
        axis.set(xlabel=x, ylabel=unit, title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    return figure
