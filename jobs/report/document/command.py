"""`vitpa sweep report SWEEP`: collect, build the report, write it, say where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.context import Context
from jobs.errors import SweepError
from jobs.report import search as search_report
from jobs.report.collect import CollectedTable, MixedRunsError, collect
from jobs.report.document.build import Commands, build
from jobs.report.document.render import write
from jobs.report.tables import set_report_aside
from jobs.standing import Standing
from jobs.state import RunState
from jobs.sweep import SweepDir
from vitpa.arguments import in_shell


def report(context: Context) -> bool:
    """Write the report; whether all runs are in it.

    Raises:
        SweepError: runs of different code or data, an axis that the sweep has not, or a part of the runs and no --out.
    """
    options, root = context.options, context.root
    states = context.look()
    whole = len(states) == len(context.sweep.runs)
    if not whole and not options.out:
        raise SweepError("a report of some of the runs might be taken for that of the sweep; say with --out where to write it")
    folder = Path(options.out) if options.out else SweepDir(root, context.sweep.name).report
    table = _collected(context, states, folder if whole and not options.out else None)
    search = _search_lines(context)
    document = build(table, states, root, _commands(context), search=search, maps_bytes=round(options.maps_mib * 2**20))
    for path in write(document, folder):
        context.say(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return table.complete


def _collected(context: Context, states: list[RunState], folder: Path | None) -> CollectedTable:
    """What `collect` says of these runs; if it refuses, a report that stands in `folder` is set aside."""
    counted = states
    if context.sweep.search is not None:  # the others were not trained to their end, on purpose
        counted = [state for state in states if state.result is not None] or states
    compare = context.options.compare
    if compare is None and len({state.run.config.network_name for state in counted}) > 1:
        compare = "attention"
    options, pivot = context.options, context.options.pivot
    try:
        return collect(
            context.sweep,
            counted,
            context.root,
            allow_mixed=options.allow_mixed,
            compare=compare,
            pivot=pivot and tuple(pivot),
        )
    except MixedRunsError as error:
        older = set_report_aside(folder) if folder else None
        raise SweepError(f"{error}; the report that was there is in {older} now" if older else str(error)) from error


def _search_lines(context: Context) -> Sequence[str]:
    if context.sweep.search is None:
        return []
    standing = Standing.of(context.sweep, context.states_of(context.sweep.runs), context.root)
    return [*search_report.lines(standing), *(line.strip() for line in search_report.best_trials(standing))]


def _commands(context: Context) -> Commands:
    options = context.options
    given = [f"--compare {in_shell(options.compare)}"] if options.compare else []
    given += [f"--pivot {' '.join(map(in_shell, options.pivot))}"] if options.pivot else []
    given += ["--allow-mixed"] if options.allow_mixed else []
    own = " ".join([context.suffix, *map(in_shell, options.terms), *given])
    maps = f" --maps-mib {options.maps_mib:g}" if options.maps_mib != 8 else ""
    out = f" --out {in_shell(options.out)}" if options.out else ""
    place = "" if options.root == "outputs" else f" --root {in_shell(options.root)}"
    data = f" --data-dir {in_shell(context.place.data_dir)}" if context.place.data_dir else ""
    return Commands(
        suffix=lambda verb: context.start_suffix if verb in ("submit", "retry") else context.suffix,
        report=f"vitpa sweep report {own}{maps}{out}",
        collect=f"vitpa sweep collect {own}",
        analyze=f"vitpa analyze {in_shell(context.sweep.name)}{place}{data}",
    )
