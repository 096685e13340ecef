"""The report of a sweep from the states of its runs: the sections in their order, and the commands that made them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.report.collect import CollectedTable
from jobs.report.document import costs, curves, maps, origin, problems, structure, verdict
from jobs.report.document.content import Block, Report, Section, Table, Text
from jobs.report.status import summary
from jobs.report.tables import about, texts
from jobs.state import RunState


@dataclass(frozen=True)
class Commands:
    """What is typed for this sweep.

    Attributes:
        suffix: What follows `vitpa sweep VERB`, by the verb.
        report: The whole command of this report.
        collect: That makes the same numbers as files.
        analyze: That measures the spatial structure.
    """

    suffix: Callable[[str], str]
    report: str
    collect: str
    analyze: str


def build(
    table: CollectedTable,
    states: Sequence[RunState],
    root: Path,
    commands: Commands,
    *,
    search: Sequence[str] = (),
    given_up: Collection[str] = (),
    maps_bytes: int,
) -> Report:
    """The report.

    Args:
        table: What `collect` found about these runs.
        states: Of all runs, unfinished ones, too.
        root: Folder of runs/ and sweeps/.
        commands: That made the numbers.
        search: Lines about a search; empty if the sweep is none.
        given_up: Signatures of the runs of trials that the search has given up.
        maps_bytes: At most as much of maps for the patch explorer.
    """
    damaged = [f"{entry['run']}: {entry['reason']}" for entry in table.damaged]
    made = [
        ("states, causes of failures, last lines", f"vitpa sweep status {commands.suffix('status')}"),
        ("table, as table.md, table.csv and runs.csv", commands.collect),
        ("spatial structure, maps", commands.analyze),
        ("verdict, curves, costs, and this report", commands.report),
    ]
    return Report(
        sweep=table.sweep,
        description=table.description,
        summary=summary(list(states)),
        made_utc=table.collected_utc,
        command=commands.report,
        sections=[
            problems.section(
                states,
                root,
                commands.suffix,
                damaged,
                changed=table.changed,
                is_search=bool(search),
                given_up=given_up,
            ),
            verdict.section(table, search, commands.report),
            _table(table, commands.collect),
            curves.section(states, root, commands.report),
            structure.section(states, root, commands.analyze),
            maps.section(states, root, commands.analyze, maps_bytes),
            costs.section(states, root, commands.report),
            origin.section(table, states, root, made),
        ],
    )


def _table(table: CollectedTable, command: str) -> Section:
    """The third section: the tables of `collect`, with its notes."""
    cells, *others = texts(table)
    names = 2 + len(table.axes)
    blocks: list[Block] = [
        Table(
            "Top-1 accuracy of each cell (runs that differ in the seed alone): mean ± standard deviation over the seeds",
            cells,
            keys=names,
        )
    ]
    if table.differences:
        blocks.append(Table("content - positional, paired by seed", others.pop(0), keys=names - 1))
    if table.comparisons:
        others.pop(0)  # the verdict has them, with more columns
    blocks += [Table("Means along two axes, top-1 %", rows) for rows in others]
    return Section("table", "Table", [*blocks, Text(about(table))], [command])
