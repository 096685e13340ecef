"""The figures of the theory's experiments, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vitpa.figures import COLOURS, GREY, STYLE, save
from vitpa.statistics import Estimate
from vitpa.theory.descent import Row, State
from vitpa.theory.exact import alternative
from vitpa.theory.experiments import (
    ARMS,
    AssociationExperiment,
    Descent,
    GaussianExperiment,
    TransferExperiment,
)
from vitpa.theory_command.report import FIGURE_4, FIGURE_LR, Summary

PER_CENT = {"test_error": 100, "associated_share": 100}
LABELS = {
    "test_error": "test error (%)",
    "cosine": "cosine of v and w",
    "associated_share": "patches associated (%)",
    "association_gap": "mean A within sets - between",
}


def draw_association(experiment: AssociationExperiment, state: State, summary: Summary, folder: Path) -> None:
    """`association`: error, cosine and association over time, with the paper's figure 4; `alternatives`: theorem 3.2."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    for axis, key in zip(axes, LABELS, strict=True):
        over_time(axis, state.rows, key, FIGURE_LR)
        read_off = [(step, value * PER_CENT.get(key, 1)) for step, what, value in FIGURE_4 if what == key]
        if read_off:
            axis.plot(*zip(*read_off, strict=True), "o", color=COLOURS[1], label="the paper's figure 4, read off")
        axis.set(xscale="log", xlabel=f"step of the figure: time of gradient flow / {FIGURE_LR:g}")
    exact = [("without attention", summary["exact_plateau"], "--"), ("best possible", summary["exact_best"], ":")]
    for name, error, line in exact:
        if error is not None:
            axes[0].axhline(100 * error, color=GREY, linestyle=line, label=f"{name}: {100 * error:.2f} % (exact)")
    axes[0].set(ylim=(0, 35))
    for axis in axes[:2]:
        axis.legend(frameon=False)
    figure.suptitle(f"Association is learnt: mean of {experiment.seeds} seeds, 95 % interval")
    save(figure, folder, "association")
    if summary["alternative"]:
        save(alternatives(experiment, state, summary), folder, "alternatives")


def alternatives(experiment: AssociationExperiment, state: State, summary: Summary) -> Figure:
    """The attention that is learnt beside one that generalises as well and associates no patch."""
    form, other = experiment.form(), summary["alternative"]
    constructed = alternative(experiment.problem(), 1, 10.0 * form.temperature)
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    learnt_error = 100 * summary["last"]["test_error"]["mean"]
    panels = [
        (f"learnt: test error {learnt_error:.2f} %", form.attention(state.tensors["A"]).mean(0)),
        (f"constructed (theorem 3.2): {100 * other['test_error']:.2f} %", form.attention(constructed)),
    ]
    maps(figure, panels, "attention (rows sum to 1)")
    return figure


def draw_gaussian(experiment: GaussianExperiment, state: State, summary: Summary, folder: Path) -> None:
    """`gaussian`: error and association over the steps, and A at the end."""
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key in zip(axes, ("test_error", "associated_share", "association_gap"), strict=True):
        over_steps(axis, state.rows, key)
        axis.set(xlabel="step", ylim=(0, 100) if key == "associated_share" else None)
    axes[0].axhspan(6, 7, color=COLOURS[1], alpha=0.4, linewidth=0, label="the paper's figure 2, read off: 6 to 7 %")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Gaussian patches: the error falls without association; mean of {experiment.seeds} seeds, 95 % interval")
    save(figure, folder, "gaussian")
    figure = Figure(figsize=(1.9 * experiment.seeds + 1, 2.6), layout="constrained")
    maps(figure, [(f"seed {seed}", A) for seed, A in enumerate(state.tensors["A"])], "A")
    save(figure, folder, "gaussian_A")


def draw_transfer(experiment: TransferExperiment, state: State, summary: Summary, folder: Path) -> None:
    """`transfer`: the test error against the number of samples, three ways."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    sizes = [row["samples"] for row in summary["test_error"]]
    for place, (arm, colour, marker) in enumerate(zip(ARMS, COLOURS, "os^", strict=False)):
        found = [row[arm] for row in summary["test_error"]]
        means = [100 * each["mean"] for each in found]
        halves = [0.0 if each["ci95_high"] is None else 100 * (each["ci95_high"] - each["mean"]) for each in found]
        shifted = [size * (1 + 0.06 * (place - 1)) for size in sizes]  # the bars do not hide one another
        axis.errorbar(shifted, means, halves, color=colour, marker=marker, markersize=4, capsize=2, label=arm)
    axis.set(xscale="log", xlabel="training samples with the new w", ylabel=LABELS["test_error"], ylim=(0, None))
    axis.set_title(f"Another signal, the same sets: mean of {experiment.seeds} seeds, 95 % interval")
    axis.legend(frameon=False)
    save(figure, folder, "transfer")


def over_time(axis: Axes, rows: Sequence[Row], key: str, unit: float) -> None:
    """A measure as mean and interval over the time of gradient flow, in `unit`; the start, at time 0, is left out."""
    _line(axis, [row for row in rows if row["time"]], key, lambda row: float(row["time"]) / unit)


def over_steps(axis: Axes, rows: Sequence[Row], key: str) -> None:
    """A measure as mean and interval over the steps."""
    _line(axis, rows, key, lambda row: float(row["step"]))


def _line(axis: Axes, rows: Sequence[Row], key: str, place: Callable[[Row], float]) -> None:
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(place(row), []).append(PER_CENT.get(key, 1) * float(row[key]))
    found = [Estimate.of(each) for each in values.values()]
    means: list[Any] = [each.mean for each in found]
    axis.plot(list(values), means, color=COLOURS[0], label="ours")
    if all(each.ci95_low is not None for each in found):
        ends: list[Any] = [[each.ci95_low for each in found], [each.ci95_high for each in found]]
        axis.fill_between(list(values), *ends, color=COLOURS[0], alpha=0.25, linewidth=0)
    axis.set_ylabel(LABELS[key])


def maps(figure: Figure, panels: Sequence[tuple[str, Tensor]], label: str) -> None:
    """Matrices (D, D) side by side on one scale."""
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    largest = float(torch.stack([matrix for _, matrix in panels]).max())
    least = float(torch.stack([matrix for _, matrix in panels]).min())
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix.numpy(), cmap="cividis", vmin=least, vmax=largest, interpolation="nearest")
        axis.set(title=title, xlabel="patch j", ylabel="patch i" if axis is axes[0] else "")
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)


def _styled(draw: Callable[[Any, State, Summary, Path], None]) -> Callable[[Any, State, Summary, Path], None]:
    def drawn(experiment: Any, state: State, summary: Summary, folder: Path) -> None:
        with mpl.rc_context(STYLE):
            draw(experiment, state, summary, folder)

    return drawn


DRAWINGS: dict[type[Descent], Callable[[Any, State, Summary, Path], None]] = {
    AssociationExperiment: _styled(draw_association),
    GaussianExperiment: _styled(draw_gaussian),
    TransferExperiment: _styled(draw_transfer),
}
