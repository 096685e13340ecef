"""`vitpa bench NAME`: the command line of the benchmarks, their errors, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from vitpa.arguments import number, path_argument, whole_number
from vitpa.bench import ablation, imagenet, small, start
from vitpa.bench.schema import ATTENTIONS, RECIPES
from vitpa.errors import at_signals, run_command
from vitpa.records import check_writable
from vitpa.terminal import printable_output


def leave(number: int, _: object) -> None:
    """SIGTERM, as at the end of a job's time, ends the program as an error does: what was measured is written before."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
    with suppress(OSError):  # the terminal may be gone
        print(f"vitpa bench: ended by {signal.Signals(number).name}; what was measured is kept", file=sys.stderr)
    raise SystemExit(128 + number)


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa bench",
        description="Measure, print a table, write JSON.",
        epilog="example: vitpa bench small --replicas 1,5 --json small.json",
    )
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    recipes = {name: f"the {recipe} recipe" for name, recipe in RECIPES.items()} | {"ablation": "the recipe"}
    for name, bench in (("small", small), ("imagenet", imagenet), ("ablation", ablation)):
        its = add_parser(benchmarks, name, bench)
        its.add_argument("overrides", nargs="*", metavar="a.b=value", help=f"change a value of {recipes[name]}")
        its.add_argument("--attention", choices=ATTENTIONS, action="append", help="only this one")
        bench.add_options(its)
        windows = "how long each of 5 windows lasts at least: 0.5"
        its.add_argument("--window-s", type=number(0, 3600, above=True), default=0.5, metavar="S", help=windows)
        kernels = "name the N kernels that take most of each line's step"
        its.add_argument("--kernels", type=whole_number(1, 10_000), default=0, metavar="N", help=kernels)
        its.set_defaults(dataset=None)
    start.add_options(add_parser(benchmarks, "start", start))
    return parser


def add_parser(benchmarks: Any, name: str, bench: ModuleType) -> argparse.ArgumentParser:
    """The parser of a benchmark, with what all of them have."""
    its: argparse.ArgumentParser = benchmarks.add_parser(
        name,
        help=bench.HELP,
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: {bench.EXAMPLE}",
    )
    its.add_argument("--json", type=file_name, metavar="FILE", help="write the figures there, too")
    its.set_defaults(run=bench.run, worker=False, attention=None)
    return its


def file_name(text: str) -> Path:
    """The file that `--json` names."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file")
    return path_argument(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, with overrides anywhere; argparse takes them in one place only."""
    parser = command_parser()
    options, others = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in others):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.overrides += others
    options.attention = list(dict.fromkeys(options.attention or ATTENTIONS))
    return options


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark: 0 if it was measured, 1 with one line for an error of the user's."""
    options = parse(arguments)

    def run() -> int:
        if options.json:  # before anything is measured
            options.json = options.json.resolve()  # what a link points to is written, not the link
            check_writable(options.json)
        with nullcontext() if options.worker else at_signals(leave):  # torchrun's processes just end
            return int(options.run(options))

    return run_command("vitpa bench", run)
