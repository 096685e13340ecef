"""The three experiments: association is learnt (figure 4), it is not on Gaussian patches (figure 2), and it transfers.

Jelassi, Sander, Li 2022 (arXiv 2210.09221). In the text of a setting (paper) says the paper's text, (code) the authors' code,
(read off) a figure of the paper, and (ours) that neither says so and we have chosen. Axes: R seeds, N samples, D patches, d
dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from vitpa.theory.association import association
from vitpa.theory.data import Delta, Gaussian, Signal
from vitpa.theory.descent import (
    ROWS,
    Data,
    Row,
    State,
    cosine,
    draw,
    draw_test,
    errors_of,
    learning_rate,
    random_stream,
    small_weights,
)
from vitpa.theory.model import Form, Gradients, cube, loss_and_gradients

SIZES = (5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)


@dataclass(frozen=True)
class Descent(ABC):
    """Gradient descent on all samples at once, of several seeds side by side; measured as time goes on.

    A subclass says what is learnt, by which model, and from where.
    """

    seeds: Annotated[int, "how many seeds, each with data and weights of its own (ours)"] = 5
    steps: Annotated[int, "steps of gradient descent (ours)"] = 320
    samples: Annotated[int, "N, training samples of a seed (code: 50,000)"] = 50_000
    test_samples: Annotated[int, "fresh samples of a seed, for the test error (ours)"] = 50_000
    lr: Annotated[float, "the first learning rate (ours: it fits the figure's axis; code: perhaps 0.1)"] = 0.01
    max_lr: Annotated[float, "a step grows to 5 % of the time so far, up to this (ours; = lr: constant, as in the code)"] = 1.0

    @abstractmethod
    def problem(self) -> Signal | Gaussian:
        """What is learnt."""

    @abstractmethod
    def form(self) -> Form:
        """The model."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """A (R, D, D) and v (R, d) before the first step."""

    def data(self) -> tuple[Data, Data]:
        """The training samples and the fresh ones."""
        seeds = range(self.seeds)
        return draw(self.problem(), self.samples, seeds, 0), draw_test(self.problem(), self.test_samples, seeds, 1)

    def start(self) -> State:
        """Before the first step."""
        return State(0, 0.0, 0.0, self.weights(), ())

    def finished(self, state: State) -> bool:
        """Whether all is done."""
        return state.step > self.steps

    def advance(self, state: State, data: tuple[Data, Data], gradients: Gradients = loss_and_gradients) -> State:
        """The next step; before it, a row of measurements for each seed if one is due. After the last step only that."""
        train, test = data
        A, v = state.tensors["A"], state.tensors["v"]
        loss, of_A, of_v = gradients(self.form(), A, v, train.X, train.y)
        rows, next_row = state.rows, state.next_row
        if state.time >= next_row or state.step == self.steps:
            rows = (*rows, *self.measured(state, loss, train.w, test))
            next_row = max(ROWS * state.time, state.time + self.lr) * (1 - 1e-9)
        lr = learning_rate(state.time, self.lr, self.max_lr) if state.step < self.steps else 0.0
        return State(state.step + 1, state.time + lr, next_row, {"A": A - lr * of_A, "v": v - lr * of_v}, rows)

    def measured(self, state: State, loss: torch.Tensor, w: torch.Tensor, test: Data) -> list[Row]:
        """A row for each seed."""
        A, v = state.tensors["A"], state.tensors["v"]
        errors, cosines = errors_of(self.form(), A, v, w, test), cosine(v, w)
        rows = []
        for seed in range(self.seeds):
            found = association(A[seed], self.problem().partition())
            row: Row = {"seed": seed, "step": state.step, "time": state.time, "train_loss": float(loss[seed])}
            row |= {"test_error": float(errors[seed]), "cosine": float(cosines[seed])}
            rows.append({**row, "associated_share": found.share, "association_gap": found.gap})
        return rows


@dataclass(frozen=True)
class AssociationExperiment(Descent):
    """Patches that share a signal in sets (assumption 1): gradient descent finds the sets, and only then the error falls."""

    patches: Annotated[int, "D (code)"] = 10
    sets: Annotated[int, "L; C = D / L (code)"] = 5
    dim: Annotated[int, "d (code)"] = 100
    sigma: Annotated[float, "of the noise in each direction (code)"] = 0.1
    delta: Annotated[Delta, "how probable delta = 1 is, and delta = -1: q/4 (code), q/2 (paper)"] = "q/4"
    q: Annotated[float | None, "0 to 1; left out: log(d) / D (code)"] = None
    project_noise: Annotated[bool, "noise orthogonal to w (paper), which it is not in the code"] = False
    factor: Annotated[Literal["1", "D"], "before the sum in the activation: 1 (code), D (paper)"] = "1"
    temperature: Annotated[Literal["1", "sqrt(d)"], "by which A is divided: 1 (code), sqrt(d) (paper)"] = "1"

    def problem(self) -> Signal:
        """Assumption 1."""
        return Signal(self.patches, self.sets, self.dim, self.q, self.delta, self.sigma, self.project_noise)

    def form(self) -> Form:
        """Model (T) with x^5 + 0.03 x (code)."""
        return Form(self.patches if self.factor == "D" else 1.0, 1.0 if self.temperature == "1" else math.sqrt(self.dim))

    def weights(self) -> dict[str, torch.Tensor]:
        """N(0, 0.001^2), the diagonal log log d (code)."""
        return small_weights(range(self.seeds), self.patches, self.dim, diagonal=math.log(math.log(self.dim)))


@dataclass(frozen=True)
class GaussianExperiment(Descent):
    """The negative control (figure 2): Gaussian patches, labelled by a network that convolves. The error falls, too."""

    steps: Annotated[int, "steps of gradient descent (ours)"] = 800
    samples: Annotated[int, "N, training samples of a seed (ours)"] = 5_000
    test_samples: Annotated[int, "fresh samples of a seed, for the test error (ours)"] = 20_000
    lr: Annotated[float, "the first learning rate (ours)"] = 0.1
    max_lr: Annotated[float, "a step grows to 5 % of the time so far, up to this (ours)"] = 2.0
    side: Annotated[int, "patches along a side of the image, whose square is D (read off)"] = 4
    block: Annotated[int, "patches along a side of a set, whose square is C (read off)"] = 2
    dim: Annotated[int, "d (ours)"] = 10
    spread: Annotated[float, "the standard deviation of A off the diagonal, which is 0, at the start (ours)"] = 0.5

    def problem(self) -> Gaussian:
        """Standard Gaussian patches."""
        return Gaussian(self.side, self.block, self.dim)

    def form(self) -> Form:
        """Model (T) with x^3, as the network that labels (ours)."""
        return Form(activation=cube)

    def weights(self) -> dict[str, torch.Tensor]:
        """A is random (ours); what the paper shows is P^T P."""
        return small_weights(range(self.seeds), self.side**2, self.dim, diagonal=0.0, std_of_A=self.spread, std_of_v=0.1)


LEARNT, SCRATCH, SHUFFLED = "learnt A, frozen", "from scratch", "random A, frozen"
ARMS = (LEARNT, SCRATCH, SHUFFLED)


@dataclass(frozen=True)
class TransferExperiment(AssociationExperiment):
    """Sets that were found once help with another signal: A is learnt, a new w is drawn, and v is learnt from few samples.

    (ours; the paper states it in the abstract and a theorem.) Beside it A and v are learnt from those samples alone, and v
    with a random A: the learnt one with its entries off the diagonal in another order.
    """

    steps: Annotated[int, "of learning A (ours)"] = 300
    samples: Annotated[int, "training samples of a seed for learning A (ours)"] = 10_000
    test_samples: Annotated[int, "fresh samples of a seed, for the test errors (ours)"] = 20_000
    sizes: Annotated[tuple[int, ...], "training samples of a seed with the new w, as 20,50,100 (ours)"] = SIZES
    transfer_steps: Annotated[int, "steps for each of them (ours)"] = 300

    def finished(self, state: State) -> bool:
        """Whether all is done."""
        return state.step > self.steps + len(self.sizes)

    def advance(self, state: State, data: tuple[Data, Data], gradients: Gradients = loss_and_gradients) -> State:
        """The next step of learning A, or then all of one number of samples: a row for each seed and arm."""
        if state.step <= self.steps:
            return super().advance(state, data, gradients)
        size = self.sizes[state.step - self.steps - 1]
        train = draw(self.problem(), size, range(self.seeds), 3)
        test = draw_test(self.problem(), self.test_samples, range(self.seeds), 4)
        start = self.weights()
        starts = {LEARNT: state.tensors["A"], SCRATCH: start["A"], SHUFFLED: self.shuffled(state.tensors["A"])}
        rows: list[Row] = []
        for arm, first_A in starts.items():
            A, v = self.descended(first_A, start["v"], train, gradients, learn_A=arm == SCRATCH)
            errors, cosines = errors_of(self.form(), A, v, train.w, test), cosine(v, train.w)
            for seed in range(self.seeds):
                found = {"test_error": float(errors[seed]), "cosine": float(cosines[seed])}
                share = association(A[seed], self.problem().partition()).share
                rows.append({"seed": seed, "samples": size, "arm": arm, **found, "associated_share": share})
        return replace(state, step=state.step + 1, rows=(*state.rows, *rows))

    def descended(
        self, A: torch.Tensor, v: torch.Tensor, train: Data, gradients: Gradients, *, learn_A: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and v after all steps on `train`."""
        time = 0.0
        for _ in range(self.transfer_steps):
            lr = learning_rate(time, self.lr, self.max_lr)
            _, of_A, of_v = gradients(self.form(), A, v, train.X, train.y)
            A, v, time = A - lr * of_A if learn_A else A, v - lr * of_v, time + lr
        return A, v

    def shuffled(self, A: torch.Tensor) -> torch.Tensor:
        """Each seed's A (R, D, D) with its entries off the diagonal in random order."""
        off = ~torch.eye(self.patches, dtype=torch.bool)
        shuffled = A.clone()
        for seed in range(self.seeds):
            entries = A[seed][off]
            shuffled[seed][off] = entries[torch.randperm(len(entries), generator=random_stream(seed, 5))]
        return shuffled
