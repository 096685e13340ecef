"""The second section: which attention, or value of an axis, is better, in words, with the test that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.grid import short_name
from jobs.report.collect import CollectedTable
from jobs.report.compare import LEVEL, Comparison, Scores, scores_of, uneven
from jobs.report.document.content import Block, Section, Table, Text
from jobs.report.tables import digits_of, percent, span, verdict
from vitpa.mixture import mixed_mark
from vitpa.statistics import Estimate, bootstrap_interval, probability_of_superiority

SENTENCES = 8  # more comparisons than this are counted, and stand in the table
METHOD = (
    "Test: the differences between two cells, paired by seed, by Student's t test, two-sided, at 5 %; p values are corrected "
    "after Holm for the number of comparisons in the table. The t interval is of the mean difference; so is the bootstrap "
    "interval, which draws the seeds with replacement and is too narrow with as few seeds as these. The probability is "
    "the share of all pairs of runs, one of each cell, in which the one is more accurate (Mann and Whitney's U); 50 % "
    "means that neither is."
)


@dataclass(frozen=True)
class Compared:
    """A comparison of `collect`, with what only the report says of it.

    Attributes:
        its: The comparison: second - first.
        bootstrap: Ends of the 95 % bootstrap interval of the mean difference, over seeds; None with fewer than two.
        probability: That a run of the second cell is more accurate than one of the first; None without a run of each.
    """

    its: Comparison
    bootstrap: tuple[float, float] | None
    probability: float | None

    @property
    def certain(self) -> bool:
        """Whether the corrected test tells the cells apart."""
        return self.its.p_holm is not None and self.its.p_holm < LEVEL

    @property
    def where(self) -> str:
        """Data set and the other axes, for people."""
        common = [value if axis == "attention" else f"{short_name(axis)}={value}" for axis, value in self.its.common.items()]
        return " ".join([self.its.dataset, *common])

    @property
    def text(self) -> str:
        """The verdict, a sentence or two."""
        its, found = self.its, self.its.val_top1
        if found.mean is None:
            return f"{self.where}: no seed has a result in both {its.first} and {its.second}; nothing is compared."
        digits = digits_of(found)
        equal = percent(found.mean, True, digits) == "+0.00"
        winner, loser, sign = (its.second, its.first, 1) if found.mean >= 0 or equal else (its.first, its.second, -1)
        by = f"{percent(sign * found.mean, digits=digits)} points"
        above = "their means are equal" if equal else f"{winner} is {by} above"
        if found.ci95_low is None or found.ci95_high is None:
            return f"{self.where}: of {winner} and {loser}, {above} with the one seed that both have; one seed is no test."
        low, high = sorted((sign * found.ci95_low, sign * found.ci95_high))
        interval = f"{winner} - {loser}: 95 % t interval {span((low, high), True, digits)} points"
        if self.bootstrap is not None:
            low, high = sorted(sign * end for end in self.bootstrap)
            interval += f", bootstrap over seeds {span((low, high), True, digits)}"
        of = f" of {its.wanted}" if found.n < its.wanted else ""
        test = f"{interval}, {self._p_text}, paired over {found.n}{of} seeds"
        chance = self.probability if sign > 0 else 1 - (self.probability or 0)
        odds = f"A run of {winner} is more accurate than one of {loser} with probability {100 * (chance or 0):.0f} %."
        if self.certain:
            return f"{self.where}: {winner} is better than {loser} by {by} ({test}). {odds}"
        return f"{self.where}: the seeds do not tell {winner} and {loser} apart; {above} ({test}). {odds}"

    @property
    def _p_text(self) -> str:
        its = self.its
        assert its.p is not None
        corrected = f", corrected {its.p_holm:.2g}" if its.p_holm is not None and its.p_holm != its.p else ""
        return f"p = {its.p:.2g}{corrected}"

    @property
    def row(self) -> list[str]:
        """Of the table."""
        its, found = self.its, self.its.val_top1
        digits = digits_of(found)
        t, b = (span(ends, True, digits) for ends in ((found.ci95_low, found.ci95_high), self.bootstrap or (None, None)))
        p, corrected = (("-" if each is None else f"{each:.2g}") for each in (its.p, its.p_holm))
        spread = "" if found.std is None else f" ± {percent(found.std, digits=digits)}"
        odds = "-" if self.probability is None else f"{100 * self.probability:.0f} %"
        what = [self.where, f"{its.second} - {its.first}"]
        return [*what, percent(found.mean, True, digits) + spread, t, b, p, corrected, odds, f"{found.n}/{its.wanted}"]


def compared(table: CollectedTable) -> list[Compared]:
    """The comparisons of `collect`, along its axis."""
    found = []
    for its in map(_as_in_the_table, table.comparisons):
        first, second = (scores_of(table.scores, its, table.compared, value) for value in (its.first, its.second))
        a, b = ([each.val_top1[seed] for seed in its.seeds] for each in (first, second))
        differences = [y - x for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        odds = probability_of_superiority(second.values, first.values)
        found.append(Compared(its, bootstrap_interval(differences), odds))
    return found


def _as_in_the_table(its: Comparison) -> Comparison:
    """The comparison of the attentions as content - positional, as the table has it."""
    if (its.first, its.second) != ("content", "positional"):
        return its
    found = its.val_top1
    low, high = (None if end is None else -end for end in (found.ci95_high, found.ci95_low))
    mean = None if found.mean is None else -found.mean
    return replace(its, first="positional", second="content", val_top1=Estimate(found.n, mean, found.std, low, high))


def section(table: CollectedTable, search: Sequence[str], command: str) -> Section:
    """The verdict.

    Args:
        table: What `collect` found.
        search: Lines about a search; empty if the sweep is none.
        command: That made the numbers.
    """
    found, blocks = compared(table), list[Block]()
    if search:
        blocks.append(Text(list(search)))
    blocks += [Text([verdict(best)], strong=True) for best in table.best]
    if found and len(found) <= SENTENCES:
        blocks.append(Text([each.text for each in found], strong=True))
    elif found:
        blocks.append(Text([_counted(found, table.compared)], strong=True))
    if found:
        header = ["where", "difference of", "mean ± std, points", "95 % t interval", "95 % bootstrap interval"]
        header += ["p", "p (Holm)", "first more accurate", "seeds"]
        caption = f"Differences along {short_name(table.compared)}, in points of top-1 accuracy"
        blocks += [Table(caption, [header, *(each.row for each in found)], keys=2), Text([METHOD])]
    if table.mixed:
        blocks.append(Text([mixed_mark(table.mixed)], strong=True))
    if not found and not table.best and not (search and table.results):
        blocks.append(Text(_untested(table.scores) or [_nothing(table)]))
    return Section("verdict", "Verdict", blocks, [command])


def _untested(cells: Sequence[Scores]) -> list[str]:
    """Of each data set with several cells that have a result: which one has the highest mean, and that there is no test."""
    said = []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = [cell for cell in cells if cell.dataset == dataset and cell.values]
        means = {cell.text: math.fsum(cell.values) / len(cell.values) for cell in own}
        if len(means) > 1:
            best = max(means, key=means.__getitem__)
            highest = f"{best} has the highest accuracy of {len(means)} cells with a result, {percent(means[best])} %"
            highest += ", of different seeds" if uneven(own) else ""
            said.append(f"{dataset}: {highest}; a test takes two seeds in two cells.")
    return said


def _nothing(table: CollectedTable) -> str:
    if not table.results:
        return "No run is finished yet."
    return "There is nothing to compare: no two cells of a data set have results."


def _counted(found: Sequence[Compared], axis: str) -> str:
    certain = [each for each in found if each.certain]
    wins: dict[str, int] = {}
    for each in certain:
        winner = each.its.second if (each.its.val_top1.mean or 0) > 0 else each.its.first
        wins[winner] = wins.get(winner, 0) + 1
    said = ", ".join(f"{winner} is better in {count}" for winner, count in wins.items())
    undecided = f"the seeds tell nothing apart in {len(found) - len(certain)}"
    return f"{len(found)} comparisons along {short_name(axis)}: {said + '; ' if said else ''}{undecided}."
