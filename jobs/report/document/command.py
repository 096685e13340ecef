"""`vitpa sweep report SWEEP`: collect, build the report, write it, say where it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.context import Context
from jobs.errors import SweepError
from jobs.report import search as search_report
from jobs.report.collect_command import collected, trained_to_the_end
from jobs.report.document.build import Commands, build
from jobs.report.document.render import write
from jobs.standing import Standing
from jobs.sweep import SweepDir
from vitpa.arguments import in_shell


def report(context: Context) -> bool:
    """Write the report; whether all runs are in it.

    Raises:
        SweepError: runs of different code or data, an axis that the sweep has not, or a part of the runs and no --out.
    """
    options, root = context.options, context.root
    context.say_changed()
    states = context.look()
    whole = len(states) == len(context.sweep.runs)
    if not whole and not options.out:
        raise SweepError("a report of some of the runs might be taken for that of the sweep; say with --out where to write it")
    folder = Path(options.out) if options.out else SweepDir(root, context.sweep.name).report
    counted = trained_to_the_end(context, states)
    compare = options.compare
    if compare is None and len({state.run.config.network_name for state in counted}) > 1:
        compare = "attention"
    table = collected(context, counted, folder if whole and not options.out else None, compare=compare)
    search = _search_lines(context)
    document = build(
        table,
        states,
        root,
        _commands(context),
        search=search,
        given_up=context.given_up,
        maps_bytes=round(options.maps_mib * 2**20),
    )
    for path in write(document, folder):
        context.say(f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return table.complete


def _search_lines(context: Context) -> Sequence[str]:
    standing = Standing.now(context.sweep, context.states_of, context.root)
    if standing is None:
        return []
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
