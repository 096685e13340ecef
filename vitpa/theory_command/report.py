"""What an experiment's rows say: the summary in its file, and the table that is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from vitpa.statistics import Estimate
from vitpa.theory.data import linear_error
from vitpa.theory.descent import Row, State
from vitpa.theory.exact import MOST_PATCHES, alternative, best_error, noiseless_error
from vitpa.theory.experiments import (
    ARMS,
    AssociationExperiment,
    Descent,
    GaussianExperiment,
    TransferExperiment,
)

FIGURE_LR = 0.01  # (ours) with which the paper's figure 4 has our time: its step n is n x 0.01
FIGURE_4 = (  # (read off): step, what, value
    (1, "test_error", 0.33),
    (6, "test_error", 0.15),
    (35, "test_error", 0.076),
    (4_000, "test_error", 0.076),
    (16_000, "test_error", 0.025),
    (1, "cosine", 0.06),
    (17, "cosine", 0.48),
    (36, "cosine", 0.73),
    (105, "cosine", 0.95),
    (250, "cosine", 0.99),
)
READING = {"test_error": 0.01, "cosine": 0.04}  # how far a value that is read off may be wrong
UNMOVED = 0.002  # the gap up to which attention counts as not having moved
FITTED = 250  # the figure's step from which v counts as learnt

Summary = dict[str, Any]


def at(rows: Sequence[Row], time: float) -> list[Row]:
    """Of each seed, in order, the row nearest to a time (in its logarithm)."""
    nearest: dict[Any, Row] = {}
    for row in rows:
        if distance(row, time) < distance(nearest.get(row["seed"]), time):
            nearest[row["seed"]] = row
    return [nearest[seed] for seed in sorted(nearest)]


def distance(row: Row | None, time: float) -> float:
    """How far a row is from a time, in its logarithm."""
    return math.inf if row is None or not row["time"] else abs(math.log(float(row["time"]) / time))


def estimate(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The mean over seeds with its interval, as plain data."""
    return asdict(Estimate.of([float(row[key]) for row in rows]))


def association_summary(experiment: AssociationExperiment, state: State) -> Summary:
    """Plateau, association, end, and the paper's figure beside it."""
    rows = [row for row in state.rows if "time" in row]
    seeds = range(experiment.seeds)
    plateau = [[float(row["test_error"]) for row in rows if row["seed"] == seed and on_plateau(row)] for seed in seeds]
    found = [next((row for row in rows if row["seed"] == seed and row["associated_share"] == 1), None) for seed in seeds]
    last = [row for row in rows if row["step"] == rows[-1]["step"]] if rows else []
    small = experiment.patches <= MOST_PATCHES
    return {
        "exact_plateau": linear_error(experiment.problem()),
        "exact_best": best_error(experiment.problem()) if small else None,
        "plateau": asdict(Estimate.of([sum(errors) / len(errors) for errors in plateau if errors])),
        "associated_seeds": sum(row["associated_share"] == 1 for row in last),
        "associated_at_step": [row and row["step"] for row in found],
        "associated_at_figure_step": [row and round(float(row["time"]) / FIGURE_LR) for row in found],
        "last": {key: estimate(last, key) for key in ("test_error", "cosine", "associated_share", "association_gap")},
        "last_figure_step": round(float(rows[-1]["time"]) / FIGURE_LR) if rows else None,
        "figure_4": beside_the_figure(rows),
        "alternative": alternative_summary(experiment) if small else None,
    }


def on_plateau(row: Row) -> bool:
    """Whether v has been learnt and attention has not moved."""
    return float(row["time"]) >= FITTED * FIGURE_LR and abs(float(row["association_gap"])) < UNMOVED


def beside_the_figure(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each value that was read off the paper's figure 4, and ours at that time."""
    table = []
    for step, key, value in FIGURE_4:
        its = at(rows, step * FIGURE_LR)
        if not its or distance(its[0], step * FIGURE_LR) > math.log(1.06):  # not reached
            continue
        ours = estimate(its, key)
        low, high = (ours["mean"] if ours[end] is None else ours[end] for end in ("ci95_low", "ci95_high"))
        agrees = low - READING[key] <= value <= high + READING[key]
        table.append({"figure_step": step, "what": key, "figure": value, "ours": ours, "agrees": agrees})
    return table


def alternative_summary(experiment: AssociationExperiment) -> Summary:
    """Theorem 3.2: attention in which patches attend to another set generalises as well; exact, without noise."""
    problem, form = experiment.problem(), experiment.form()
    A, own = (alternative(problem, shift, 10.0 * form.temperature) for shift in (1, 0))
    same = problem.partition()[:, None] == problem.partition()[None, :]
    picked = A.topk(problem.set_size, dim=1).indices
    return {
        "test_error": noiseless_error(problem, form, A),
        "test_error_of_associated": noiseless_error(problem, form, own),
        "overlap_of_top_c_with_own_set": int(same.gather(1, picked).sum()),
    }


def gaussian_summary(experiment: GaussianExperiment, state: State) -> Summary:
    """When the error falls, how far, and what association there is."""
    rows = list(state.rows)
    steps = sorted({float(row["step"]) for row in rows})
    by_step = {step: [row for row in rows if row["step"] == step] for step in steps}
    under = [step for step, its in by_step.items() if sum(float(row["test_error"]) for row in its) < 0.1 * len(its)]
    D, C = experiment.side**2, experiment.block**2
    keys = ("test_error", "cosine", "associated_share", "association_gap")
    return {
        "first_step_under_10_per_cent": under[0] if under else None,
        "associated_share_by_chance": 1 / math.comb(D - 1, C - 1),
        "first": {key: estimate(by_step[steps[0]], key) for key in keys} if steps else None,
        "last": {key: estimate(by_step[steps[-1]], key) for key in keys} if steps else None,
        "associated_seeds": sum(row["associated_share"] == 1 for row in by_step[steps[-1]]) if steps else 0,
    }


def transfer_summary(experiment: TransferExperiment, state: State) -> Summary:
    """The test errors of the three ways for each number of samples."""
    learning = [row for row in state.rows if "time" in row]
    last = [row for row in learning if row["step"] == learning[-1]["step"]] if learning else []
    rows = [row for row in state.rows if "arm" in row]
    table = []
    for size in experiment.sizes:
        its = {arm: [row for row in rows if row["samples"] == size and row["arm"] == arm] for arm in ARMS}
        if its[ARMS[0]]:
            errors = {arm: estimate(found, "test_error") for arm, found in its.items()}
            table.append({"samples": size, **errors})
    return {"associated_share_of_learnt_A": estimate(last, "associated_share"), "test_error": table}


SUMMARIES: dict[type[Descent], Callable[[Any, State], Summary]] = {
    AssociationExperiment: association_summary,
    GaussianExperiment: gaussian_summary,
    TransferExperiment: transfer_summary,
}


def per_cent(found: dict[str, Any]) -> str:
    """`7.84 [7.80, 7.88] %`."""
    return "-" if found["mean"] is None else f"{interval(found, 100, 2)} %"


def interval(found: dict[str, Any], times: float = 1, digits: int = 3) -> str:
    """A mean and the ends of its 95 % interval, if it has one."""
    ends = [found["ci95_low"], found["ci95_high"]]
    between = "" if None in ends else f" [{', '.join(f'{times * end:.{digits}f}' for end in ends)}]"
    return f"{times * found['mean']:.{digits}f}{between}"


def association_table(experiment: AssociationExperiment, summary: Summary) -> str:
    """For people."""
    lines = ["figure 4, read off        step    figure  ours: mean over seeds [95 %]"]
    for row in summary["figure_4"]:
        is_error = row["what"] == "test_error"
        value, ours = (
            (f"{100 * row['figure']:.1f} %", per_cent(row["ours"]))
            if is_error
            else (f"{row['figure']:.2f}", interval(row["ours"], digits=2))
        )
        name = "test error" if is_error else "cosine of v and w"
        lines.append(f"{name:22}{row['figure_step']:8,}{value:>10}  {ours}{'' if row['agrees'] else '  differs'}")
    reached, last = summary["associated_seeds"], summary["last"]
    best = "" if summary["exact_best"] is None else f"; best possible {100 * summary['exact_best']:.2f} % (exact)"
    steps = ", ".join("-" if step is None else f"{step:,}" for step in summary["associated_at_figure_step"])
    lines += [
        f"plateau: {per_cent(summary['plateau'])}, exact {100 * summary['exact_plateau']:.2f} %",
        f"all patches associated in {reached} of {experiment.seeds} seeds, at the figure's step {steps}",
        f"at its step {summary['last_figure_step']:,}: test error {per_cent(last['test_error'])}{best}, "
        f"gap {interval(last['association_gap'])}",
    ]
    other = summary["alternative"]
    if other:
        lines.append(
            f"an attention that picks {other['overlap_of_top_c_with_own_set']} patches of the own sets (theorem 3.2): "
            f"test error {100 * other['test_error']:.2f} %, associated {100 * other['test_error_of_associated']:.2f} % (exact)"
        )
    return "\n".join(lines)


def gaussian_table(experiment: GaussianExperiment, summary: Summary) -> str:
    """For people."""
    first, last, under = summary["first"], summary["last"], summary["first_step_under_10_per_cent"]
    rows = {"": ("step 0", f"step {experiment.steps:,}")}
    rows["test error"] = (per_cent(first["test_error"]), per_cent(last["test_error"]))
    rows["patches associated"] = (per_cent(first["associated_share"]), per_cent(last["associated_share"]))
    rows["gap within - between"] = (interval(first["association_gap"]), interval(last["association_gap"]))
    lines = [f"{name:22}{start:>26}{end:>26}" for name, (start, end) in rows.items()]
    when = "test error never under 10 %" if under is None else f"test error under 10 % at step {under:.0f}"
    return "\n".join([*lines, f"{when}; all patches associated in {summary['associated_seeds']} of {experiment.seeds} seeds"])


def transfer_table(experiment: TransferExperiment, summary: Summary) -> str:
    """For people."""
    lines = [f"{'samples':>8}" + "".join(f"{arm:>26}" for arm in ARMS)]
    for row in summary["test_error"]:
        lines.append(f"{row['samples']:8,}" + "".join(f"{per_cent(row[arm]):>26}" for arm in ARMS))
    share = summary["associated_share_of_learnt_A"]
    return "\n".join([*lines, f"patches associated by the learnt A: {per_cent(share)} ({experiment.seeds} seeds)"])


TABLES: dict[type[Descent], Callable[[Any, Summary], str]] = {
    AssociationExperiment: association_table,
    GaussianExperiment: gaussian_table,
    TransferExperiment: transfer_table,
}
