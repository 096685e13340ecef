"""The ledger of a search: `<root>/sweeps/<name>/search/0001.json` and so on, one record for each round.

A record holds the scores of the round before, and the trials of its own: new ones with their values, older ones that go on to
another epoch. It is created exclusively and never changed, so that of several launchers one decides, and whoever is killed
leaves a whole ledger. Which trials there are, and how far each is to be trained, follows from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, JsonValue

from jobs.errors import SweepError
from vitpa.records import Record, RunError, create_exclusive, make_folders, read_record, to_json

RESTORE = "restore it, or give the search another name"


class Entry(Record):
    """A trial of a round."""

    number: int = Field(ge=0)
    epochs: int = Field(ge=1)  # up to which it is trained now
    values: dict[str, JsonValue] | None = None  # of a new one


class Round(Record):
    """Of `search/NNNN.json`."""

    scores: dict[str, list[float]] = Field({})  # of the trials of the round before, by number: val/top1 of each of its runs
    out: dict[str, str] = Field({})  # those of them that are given up, with the reason
    trials: list[Entry]  # none: the search is over
    settings: dict[str, JsonValue] | None = None  # in the first one: what must stay as it is


@dataclass
class Trial:
    """What the ledger says of a trial."""

    number: int
    values: dict[str, JsonValue]
    epochs: int  # up to which it has been, or is, trained
    scores: dict[int, list[float]] = field(default_factory=dict)  # by epoch
    out: str = ""  # why it is given up

    @property
    def label(self) -> str:
        """Its name."""
        return f"t{self.number:03d}"

    @property
    def in_training(self) -> bool:
        """Whether its score at `epochs` is still to come."""
        return self.epochs not in self.scores and not self.out

    def score(self, epoch: int) -> float:
        """The mean accuracy of its runs after an epoch, as a fraction."""
        return math.fsum(self.scores[epoch]) / len(self.scores[epoch])


@dataclass(frozen=True)
class Ledger:
    """The rounds so far."""

    folder: Path
    rounds: Sequence[Round] = ()

    @staticmethod
    def read(folder: Path) -> Ledger:
        """What is in `folder`; nothing, if there is none.

        Raises:
            SweepError: a record is missing.
            RunError: a record has been cut or edited.
        """
        rounds: list[Round] = []
        known: set[str] = set()
        count = sum(1 for path in folder.glob("[0-9]*.json"))
        while (found := read_record(Round, _path(folder, len(rounds) + 1))) is not None:
            rounds.append(found)
            if problem := _problem_of(found, known):
                raise RunError(f"{_path(folder, len(rounds))}: {problem}; {RESTORE}")
        if len(rounds) < count:
            raise SweepError(f"{_path(folder, len(rounds) + 1)} is missing; {RESTORE}")
        return Ledger(folder, rounds)

    def append(self, new: Round) -> Ledger:
        """The ledger with a round more: `new`, or what another launcher has decided first."""
        make_folders(self.folder)
        create_exclusive(_path(self.folder, len(self.rounds) + 1), to_json(new.model_dump(exclude_none=True)))
        return Ledger.read(self.folder)

    @property
    def over(self) -> bool:
        """Whether the last round had nothing left to train."""
        return bool(self.rounds) and not self.rounds[-1].trials

    @property
    def trials(self) -> list[Trial]:
        """The trials so far, by number."""
        found: list[Trial] = []
        for each in self.rounds:
            for number, scores in each.scores.items():
                found[int(number)].scores[found[int(number)].epochs] = scores
            for number, reason in each.out.items():
                found[int(number)].out = reason
            for entry in each.trials:
                if entry.number == len(found) and entry.values is not None:
                    found.append(Trial(entry.number, entry.values, entry.epochs))
                else:
                    found[entry.number].epochs = entry.epochs
        return found


def _problem_of(found: Round, known: set[str]) -> str:
    """What a round has that no search writes, empty if nothing. `known` are the trials before it; its own are added."""
    for name, of_trials in (("scores", found.scores), ("out", found.out)):
        for number in of_trials:
            if number not in known:
                return f"`{name}` of trial {number}, which there is not before it"
    for number, scores in found.scores.items():
        if not scores or not all(0 <= score <= 1 for score in scores):
            return f"no usable `scores` of trial {number} in it"
    for entry in found.trials:
        if (entry.values is None) != (str(entry.number) in known):
            return f"trial {entry.number} in `trials` " + ("has no `values`" if entry.values is None else "is there already")
        if entry.values is not None and entry.number != len(known):
            return f"trial {entry.number} in `trials`, where {len(known)} comes next"
        known.add(str(entry.number))
    return ""


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.json"
