"""What a report consists of, as plain records: sections of blocks, which HTML and Markdown show each in their own way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph; or a list, if there are several lines."""

    kind: ClassVar[str] = "text"
    lines: list[str]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts, the first of which is the header; the first `keys` columns name a row."""

    kind: ClassVar[str] = "table"
    caption: str
    rows: list[list[str]]
    keys: int = 1


@dataclass(frozen=True)
class Problem:
    """Runs that are missing, have failed, or are not finished yet, for one reason.

    Attributes:
        state: Of all of them.
        runs: Their names.
        reason: What the records say.
        cause: The kind of failure, and how to fix it; empty if it is none.
        told: The last lines of the first one's log.
        log: The file that these lines are of.
        command: What takes them further; empty if nothing does: a search has given up their trials.
    """

    kind: ClassVar[str] = "problem"
    state: str
    runs: list[str]
    reason: str
    cause: str
    told: list[str]
    log: str
    command: str


@dataclass(frozen=True)
class Point:
    """A value of a line, with the ends of its band; None: no band there."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart. `colour` counts from 0; -1 is grey, of what is there for comparison; `dashed`: not a mean."""

    label: str
    points: list[Point]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A diagram over epochs, and the same as a few rows of text."""

    title: str
    unit: str
    description: str
    lines: list[Line]


@dataclass(frozen=True)
class Charts:
    """Diagrams side by side, with one table of their numbers."""

    kind: ClassVar[str] = "charts"
    charts: list[Chart]
    numbers: Table


@dataclass(frozen=True)
class Picture:
    """A PNG that a reader without scripts, or of a print, sees, with its text."""

    caption: str
    alt: str
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Explorer:
    """The patch explorer: the data of its script as JSON, and pictures of the most important of them."""

    kind: ClassVar[str] = "explorer"
    data: str
    pictures: list[Picture]


Block = Text | Table | Problem | Charts | Explorer


@dataclass(frozen=True)
class Section:
    """A part of the report, with the commands that made its numbers."""

    name: str
    title: str
    blocks: list[Block]
    made_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All of it, in the order in which it is read."""

    sweep: str
    description: str
    summary: str  # how many runs are done
    made_utc: str
    command: str
    sections: list[Section]
