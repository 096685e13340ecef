"""The three experiments, small: what is learnt, by which way, and that seeds know nothing of one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitpa.theory.data import linear_error
from vitpa.theory.descent import Row, State
from vitpa.theory.exact import best_error
from vitpa.theory.experiments import (
    LEARNT,
    SHUFFLED,
    AssociationExperiment,
    Descent,
    GaussianExperiment,
    TransferExperiment,
)

SMALL = AssociationExperiment(seeds=2, steps=220, samples=2_000, test_samples=10_000, patches=6, sets=3, dim=8, q=0.6)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    """Threads that wait for one another are slow where other programs run, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def carried_out(experiment: Descent) -> State:
    data, state = experiment.data(), experiment.start()
    while not experiment.finished(state):
        state = experiment.advance(state, data)
    return state


def last(state: State) -> list[Row]:
    return [row for row in state.rows if row.get("step") == state.rows[-1]["step"]]


@pytest.fixture(scope="module")
def learnt() -> State:
    return carried_out(SMALL)


def test_the_sets_are_found_and_the_error_falls_from_the_plateau_to_the_best(learnt: State) -> None:
    problem = SMALL.problem()
    plateau = [float(row["test_error"]) for row in learnt.rows if 1 < float(row["time"]) < 4]
    assert sum(plateau) / len(plateau) == pytest.approx(linear_error(problem), abs=0.01)
    for row in last(learnt):
        assert row["associated_share"] == 1
        assert float(row["association_gap"]) > 0.5
        assert float(row["cosine"]) > 0.9
        assert best_error(problem) - 0.01 < float(row["test_error"]) < (linear_error(problem) + best_error(problem)) / 2


def test_a_seed_is_what_it_would_be_alone(learnt: State) -> None:
    alone = carried_out(replace(SMALL, seeds=1))
    for mine, its in zip([row for row in learnt.rows if row["seed"] == 0], alone.rows, strict=True):
        assert mine == pytest.approx(its, rel=1e-9, abs=1e-12)


def test_a_growing_learning_rate_goes_the_way_of_a_constant_one() -> None:
    constant = carried_out(replace(SMALL, seeds=1, samples=1_000, lr=0.1, max_lr=0.1, steps=600))
    end = constant.rows[-1]
    growing = carried_out(replace(SMALL, seeds=1, samples=1_000))
    there = min(growing.rows, key=lambda row: abs(float(row["time"]) - float(end["time"])))
    assert float(there["time"]) == pytest.approx(float(end["time"]), rel=0.05)
    for key, within in (("test_error", 0.01), ("cosine", 0.03), ("association_gap", 0.1)):
        assert float(there[key]) == pytest.approx(float(end[key]), abs=within)


def test_gaussian_patches_are_learnt_without_association() -> None:
    state = carried_out(GaussianExperiment(seeds=2, steps=120, samples=1_500, test_samples=4_000, dim=4))
    for row in last(state):
        assert float(row["test_error"]) < 0.13
        assert float(row["cosine"]) > 0.95
        assert float(row["associated_share"]) < 0.3
        assert abs(float(row["association_gap"])) < 0.3


def test_a_learnt_attention_helps_with_another_signal() -> None:
    experiment = TransferExperiment(
        **{**vars(SMALL), "samples": 1_000, "sizes": (40, 80), "transfer_steps": 150, "test_samples": 4_000}
    )
    state = carried_out(experiment)
    rows = [row for row in state.rows if "arm" in row]
    assert len(rows) == 2 * 2 * 3
    errors = {arm: [float(row["test_error"]) for row in rows if row["arm"] == arm] for arm in (LEARNT, SHUFFLED)}
    assert sum(errors[LEARNT]) < sum(errors[SHUFFLED]) - 0.04
    assert {row["associated_share"] for row in rows if row["arm"] == LEARNT} == {1.0}
    A = state.tensors["A"]
    shuffled = experiment.shuffled(A)
    assert torch.equal(shuffled.flatten(1).sort().values, A.flatten(1).sort().values)
    assert torch.equal(shuffled.diagonal(dim1=1, dim2=2), A.diagonal(dim1=1, dim2=2))
    assert not torch.equal(shuffled, A)
