"""The space of a search, key by key, and random values from it.

The values of trial number i follow from (seed, i) alone, each key by itself: a key more leaves the others' values as they are.
Only what a trial cannot have is drawn again (`Taken`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

from pydantic import JsonValue

from jobs.errors import SweepError
from jobs.grid import KEYS, OWN_LISTS, same
from jobs.search.config import Range, SearchConfig
from vitpa.arguments import ConfigError
from vitpa.config import RunConfig
from vitpa.config_file import fields_of, nearest_key, parse_model

DIGITS = 3  # of a value that is not on a grid: more are noise in names and tables
ENOUGH = 100  # values of a range
TRIES = 100  # to draw what a trial can have
WHOLE = frozenset(key for key, field in fields_of(RunConfig) if field.annotation is int)
FIXED = {"train.epochs": "the halving says how long trials are trained", "train.holdout": "all trials have the same images"}

Settings = Mapping[str, JsonValue]


@dataclass(frozen=True)
class Dimension:
    """A key of the space: its choices, or the range of its values."""

    key: str
    choices: tuple[JsonValue, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self.key in WHOLE and not self.choices

    @property
    def extremes(self) -> tuple[JsonValue, ...]:
        """The values that are looked at before the search begins."""
        return self.choices or (self.value_of(self.low), self.value_of(self.high))

    def has(self, value: JsonValue) -> bool:
        """Whether a value, as a ledger has it, is of this dimension."""
        if self.choices:
            return value in self.choices
        beyond = 0.5 if self.whole else 1e-9 * max(abs(self.low), abs(self.high))  # by rounding
        is_number = isinstance(value, int if self.whole else int | float) and not isinstance(value, bool)
        return is_number and self.low - beyond <= float(str(value)) <= self.high + beyond

    def at(self, share: float) -> JsonValue:
        """The value at a share of the whole in [0, 1): drawn evenly, every value is as likely as its neighbours."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.step is not None:
            steps = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return self.value_of(self.low + self.step * int(share * steps))
        if self.log:
            return self.value_of(self.low * (self.high / self.low) ** share)
        return self.value_of(self.low + (self.high - self.low) * share)

    def value_of(self, number: float) -> JsonValue:
        """A number of the range as a run has it."""
        if self.whole:
            return round(number)
        if self.step is not None:
            return float(f"{number:.10g}")  # 0.1 + 2 x 0.1 is 0.3
        return min(max(self._rounded(number), self.low), self.high)

    def _rounded(self, number: float) -> float:
        """With few digits; where they would leave few values, as from 0.99 to 0.9999, with as many of the range's width."""
        if self.low <= 0 <= self.high or abs(_place(self.high) - _place(self.low)) + 1 >= ENOUGH:
            return float(f"{number:.{DIGITS}g}")
        return round(number, DIGITS - 1 - math.floor(math.log10(self.high - self.low)))


def dimensions_of(search: SearchConfig, overrides: Container[str], where: str) -> list[Dimension]:
    """The space, key by key; whether a run can have the values is not looked at.

    Raises:
        SweepError: a key that a trial cannot set, or nothing to choose from.
        ConfigError: a range that is none.
    """
    found = []
    for key, values in search.space.items():
        place = f"{where}: search.space.{key}"
        if key in OWN_LISTS:
            raise SweepError(f"{place}: every trial has all {OWN_LISTS[key]}; take it out of the space")
        if key in FIXED or key.startswith("runtime."):
            why = FIXED.get(key, "it does not change the numbers")
            raise SweepError(f"{place}: {why}; take it out of the space")
        if key in overrides:
            raise SweepError(f"{place} is in the overrides, too; say it once")
        if key not in KEYS:
            near = nearest_key(key, sorted(KEYS))
            hint = f"; did you mean {near}?" if near else ""
            raise SweepError(f"{place}: no key of the configuration{hint}")
        found.append(_dimension(key, values, place))
    return found


def _dimension(key: str, values: JsonValue, place: str) -> Dimension:
    if isinstance(values, list):
        if len(values) < 2 or any(same(first, second) for first, second in combinations(values, 2)):
            raise SweepError(f"{place}: expected two choices or more, each once")
        return Dimension(key, tuple(values))
    if not isinstance(values, dict):
        raise SweepError(f"{place}: expected a list of choices, or a range such as {{low: 1e-4, high: 1e-2, log: true}}")
    found = parse_model(Range, values, place)
    step = found.step
    if key in WHOLE and not found.log:
        step = step or 1.0
        if not all(number.is_integer() for number in (found.low, found.high, step)):
            raise SweepError(f"{place}: its values are whole numbers; give low, high and step as such")
    return Dimension(key, (), found.low, found.high, found.log, step)


class Taken:
    """Which settings a new trial cannot have: those that no run can have, and those whose runs another trial has already.

    Settings that differ can be of the same runs: a network without attention has no num_heads.
    """

    def __init__(self, signatures: Callable[[Settings], Set[str]], trials: Iterable[Settings]) -> None:
        """Of these trials.

        Args:
            signatures: Of the runs of a trial with these settings; ConfigError if no run can have them.
            trials: The settings of each so far.
        """
        self.problem = ""  # of settings that no run can have
        self._signatures = signatures
        self._tried: set[str] = set()
        self._runs: set[str] = set()
        for values in trials:
            self.take(values)

    def take(self, values: Settings) -> bool:
        """Whether a new trial can have these settings; then it has them."""
        text = json.dumps(values, sort_keys=True)
        if text in self._tried:
            return False
        self._tried.add(text)
        try:
            runs = self._signatures(values)
        except ConfigError as error:
            self.problem = str(error)
            return False
        if runs & self._runs:
            return False
        self._runs |= runs
        return True


def random_values(dimensions: Sequence[Dimension], seed: int, number: int, taken: Taken) -> dict[str, JsonValue] | None:
    """The values of trial `number`, the first that it can have; None if there is none left, as far as that is tried."""
    for attempt in range(TRIES):
        values = {each.key: each.at(_share(f"{seed} {number} {attempt} {each.key}")) for each in dimensions}
        if taken.take(values):
            return values
    return None


def _place(number: float) -> int:
    """Where a number stands among those of DIGITS digits, of which there are 900 from one power of ten to the next."""
    mantissa, exponent = f"{abs(number):.{DIGITS - 1}e}".split("e")
    return 900 * int(exponent) + int(mantissa.replace(".", ""))


def _share(text: str) -> float:
    """A number in [0, 1), evenly distributed over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def whole_seed(text: str) -> int:
    """A seed below 2^32 for a library's generator."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
