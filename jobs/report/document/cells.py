"""How cells are named and coloured in the figures of a data set, and which are shown where there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.grid import short_name
from jobs.state import RunState
from vitpa.statistics import Estimate

MAX_CELLS = 6  # lines of a chart that can be told apart


@dataclass(frozen=True)
class CellName:
    """A cell of a data set in figures; colours count from 0."""

    text: str
    colour: int


def shown_cells(cells: Sequence[list[RunState]]) -> list[tuple[CellName, list[RunState]]]:
    """Names for the cells of a data set; if there are more than MAX_CELLS, those with the best mean accuracy."""

    def mean(members: list[RunState]) -> float:
        return Estimate.of([state.result.top1 for state in members if state.result is not None]).mean or 0.0

    best = sorted(cells, key=mean, reverse=True)[:MAX_CELLS]
    chosen = [members for members in cells if any(members is each for each in best)]
    return [(CellName(cell_text(members[0]), index), members) for index, members in enumerate(chosen)]


def cell_text(state: RunState) -> str:
    """The network and the values on the axes, for people."""
    settings = [f"{short_name(axis)}={value}" for axis, value in state.run.settings.items()]
    return " ".join([state.run.config.network_name, *settings])
