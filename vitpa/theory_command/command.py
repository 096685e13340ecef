"""`vitpa theory NAME`: the command line of the theory's experiments."""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitpa.arguments import number, path_argument, whole_number, whole_numbers
from vitpa.errors import at_signals, run_command
from vitpa.records import CHECKSUM, check_writable, read_json, to_json
from vitpa.terminal import printable_output
from vitpa.theory.descent import State
from vitpa.theory.experiments import AssociationExperiment, Descent, GaussianExperiment, TransferExperiment
from vitpa.theory_command.figures import DRAWINGS
from vitpa.theory_command.report import SUMMARIES, TABLES
from vitpa.theory_command.saved import LONG, TheoryError, carried_out

LOGGER = logging.getLogger(__name__)
PROGRESS_S = 20.0
EXPERIMENTS: dict[str, tuple[type[Descent], str]] = {
    "association": (AssociationExperiment, "patches that share a signal: attention finds the sets (figure 4)"),
    "gaussian": (GaussianExperiment, "the negative control: Gaussian patches, no association (figure 2)"),
    "transfer": (TransferExperiment, "the sets, once found, help with another signal from few samples"),
}
MOST = 1_000_000_000
SOURCES = """(paper) the paper's text, (code) the authors' code, (read off) a figure of the paper, (ours) our choice.
The same command goes on where it was interrupted, bit for bit. Other settings need another folder."""


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa theory",
        description="The experiments of the paper's theory, on the CPU. All three with their defaults: minutes on 2 cores.",
        epilog="example: vitpa theory association --seeds 3",
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (experiment, summary) in EXPERIMENTS.items():
        its = names.add_parser(
            name,
            help=summary,
            description=f"{inspect.cleandoc(experiment.__doc__ or '')}\n\n{SOURCES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example: vitpa theory {name} --seeds 3 --out outputs/theory/three_seeds",
        )
        add_settings(its, experiment)
        folder = Path("outputs/theory") / name
        its.add_argument("--out", type=path_argument, default=folder, metavar="DIR", help=f"folder of what is found: {folder}")
        its.add_argument(
            "--json", action="store_true", help="print the file without rows and weights, as JSON, instead of a table"
        )
    return parser


def add_settings(parser: argparse.ArgumentParser, experiment: type[Descent]) -> None:
    """An option for each setting."""
    hints = get_type_hints(experiment, include_extras=True)
    for each in fields(experiment):
        kind, text = get_args(hints[each.name])
        flag = "--" + each.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text.replace("%", "%%"))
            continue
        options: dict[str, Any] = {"choices": get_args(kind)} if get_origin(kind) is Literal else reader(each.name, kind)
        shown = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
        help_text = text if each.default is None else f"{text}: {shown}"
        parser.add_argument(flag, default=each.default, help=help_text.replace("%", "%%"), **options)


def reader(name: str, kind: Any) -> dict[str, Any]:
    """How argparse reads a setting."""
    if kind is int:
        return {"type": whole_number(1, MOST), "metavar": "N"}
    if kind is float:
        return {"type": number(0, above=name in ("lr", "max_lr")), "metavar": "X"}
    if get_origin(kind) in (types.UnionType, Union):
        return {"type": number(0, 1), "metavar": "X"}
    return {"type": whole_numbers(1, MOST), "metavar": "N,N"}


def experiment_of(options: argparse.Namespace) -> Descent:
    """The experiment with the settings of a command line.

    Raises:
        TheoryError: they do not fit together.
    """
    kind: Any = EXPERIMENTS[options.name][0]
    values: dict[str, Any] = {each.name: getattr(options, each.name) for each in fields(kind)}
    experiment: Descent = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    if experiment.max_lr < experiment.lr:
        raise TheoryError(
            f"--max-lr {experiment.max_lr:g} is below --lr {experiment.lr:g}; it is where the learning rate ends"
        )
    if isinstance(experiment, AssociationExperiment):
        if experiment.sets < 2 or experiment.patches % experiment.sets or experiment.patches == experiment.sets:
            raise TheoryError(
                f"--patches {experiment.patches} in --sets {experiment.sets}: 2 or more sets of 2 or more patches each"
            )
        if experiment.dim < 3:
            raise TheoryError(f"--dim {experiment.dim}: log log d is the diagonal of A; choose 3 or more")
        if experiment.problem().probability > 0.5:
            raise TheoryError(
                f"delta = 1 would have the probability {experiment.problem().probability:.2f}; choose --q up to 1"
            )
    if isinstance(experiment, GaussianExperiment) and not 1 < experiment.block < experiment.side:
        raise TheoryError(f"--block {experiment.block}: choose 2 or more, and less than --side {experiment.side}")
    if isinstance(experiment, GaussianExperiment) and experiment.side % experiment.block:
        raise TheoryError(f"--block {experiment.block} does not divide --side {experiment.side}; choose one that does")
    return experiment


def progress_line(experiment: Descent) -> Callable[[State], None]:
    """What says now and then how far the experiment is."""
    shown_at = time.monotonic()

    def show(state: State) -> None:
        nonlocal shown_at
        if time.monotonic() > shown_at + PROGRESS_S:
            shown_at = time.monotonic()
            LOGGER.info(f"step {min(state.step, experiment.steps):,} of {experiment.steps:,}{last_errors(state)}")

    return show


def last_errors(state: State) -> str:
    """The mean of the last errors measured."""
    if not state.rows:
        return ""
    last = state.rows[-1]
    errors = [
        float(row["test_error"]) for row in state.rows if all(row.get(k) == last.get(k) for k in ("step", "samples", "arm"))
    ]
    where = f" with {last['samples']:,} samples, {last['arm']}" if "arm" in last else ""
    return f": test error {100 * sum(errors) / len(errors):.1f} %{where}"


def stop(number: int, _: object) -> None:
    """SIGTERM ends the command as Ctrl-C does: what was done is written."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment, or go on with it: 0 when it is finished, 1 with one line for an error of the user's."""
    options = command_parser().parse_args(arguments)

    def run() -> int:
        experiment = experiment_of(options)
        path = options.out / f"{options.name}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        summarised = SUMMARIES[type(experiment)]
        with at_signals(stop):
            state = carried_out(experiment, path, lambda it: summarised(experiment, it), progress_line(experiment))
        summary = summarised(experiment, state)
        DRAWINGS[type(experiment)](experiment, state, summary, options.out)
        if options.json:
            print(
                to_json({key: value for key, value in (read_json(path) or {}).items() if key not in (*LONG, CHECKSUM)}), end=""
            )
        else:
            print(f"{TABLES[type(experiment)](experiment, summary)}\nnumbers and figures: {options.out}")
        return 0

    return run_command("vitpa theory", run, interrupted="interrupted; the same command goes on from here")
