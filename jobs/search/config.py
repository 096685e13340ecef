"""`search` in a sweep's file: what a trial may set, who draws it, what is spent, and after which epochs the best go on."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from vitpa.config import Float, Section


class Range(Section):
    """The values of a key that has no list of choices."""

    low: Float = Field(description="smallest value")
    high: Float = Field(description="largest value")
    log: bool = Field(False, description="draw the logarithm evenly, for values of several orders of magnitude")
    step: Float | None = Field(None, gt=0, description="between two values, from `low` on; null: any (whole numbers: 1)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} is not below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: low={self.low:g} has no logarithm; it must be above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step: say one of the two")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step={self.step:g} is more than from low={self.low:g} to high={self.high:g}")
        return self


class Budget(Section):
    """When a search is over. One of the two."""

    runs: int | None = Field(None, ge=1, description="as much training as so many whole runs")
    gpu_hours: Float | None = Field(None, gt=0, description="of all runs together")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.runs is None) == (self.gpu_hours is None):
            raise ValueError("search.budget: expected one of runs, as much training as so many whole runs, and gpu_hours")
        return self


class Halving(Section):
    """Successive halving: trials pause after the first of these epochs, the best of them go on to the next, and so on."""

    epochs: list[int] = Field(min_length=1, description="after which trials pause, such as [10, 30]; the last is train.epochs")
    keep: Float = Field(1 / 3, gt=0, lt=1, description="share of the trials that go on from each")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs[0] < 1 or any(second <= first for first, second in pairwise(self.epochs)):
            raise ValueError(f"search.halving.epochs={self.epochs}: expected rising numbers from 1 on")
        return self


class SearchConfig(Section):
    """Instead of axes: trials, each with values of its own for the keys of `space`."""

    space: dict[str, JsonValue] = Field(
        min_length=1, description="dotted key: its choices, or {low, high}, with log: true or a step"
    )
    sampler: Literal["random", "tpe"] = Field("random", description="tpe: optuna's, which learns from finished trials")
    seed: int = Field(0, ge=0, description="of the sampler")
    budget: Budget = Field(description="runs or gpu_hours")
    halving: Halving | None = Field(None, description="successive halving; null: every trial is trained to its end")
    trials_at_once: int = Field(16, ge=1, le=10_000, description="in training at a time, and in a round")
