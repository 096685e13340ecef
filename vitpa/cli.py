"""The `vitpa` command: the top floor, the only file that knows every part of the house."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import data_prep.command
import jobs.command
import jobs.doctor.command
import slurm.command
from vitpa.terminal import printable_output


def parser() -> argparse.ArgumentParser:
    """The command line: every command, its options and its help."""
    top = argparse.ArgumentParser(
        prog="vitpa",
        description="Vanilla against positional attention, from raw data to the table of results.",
        epilog="example: vitpa prep digits && vitpa sweep submit demo --wait && vitpa sweep collect demo",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data_prep.command.add_parser(commands)
    commands.add_parser("train", help="train one run, or several seeds of it together", add_help=False)
    commands.add_parser("bench", help="how fast the pieces are on this machine", add_help=False)
    commands.add_parser("analyze", help="what runs have learnt of the spatial structure", add_help=False)
    commands.add_parser("theory", help="the experiments of the paper's theory, in minutes on a CPU", add_help=False)
    jobs.command.add_parser(commands)
    jobs.doctor.command.add_parser(commands)
    slurm.command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `vitpa` command and return its exit code: 0 ok, 1 a user's error, 2 usage, 3 no scheduler, 4 partial."""
    with printable_output():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(words: list[str]) -> int:
    try:
        if words[:1] == ["train"]:  # it parses its own arguments; torch is imported only for it
            from vitpa.train_command import main as train

            return train(words[1:])
        if words[:1] == ["bench"]:  # likewise
            from vitpa.bench.command import main as bench

            return bench(words[1:])
        if words[:1] == ["analyze"]:  # likewise
            from vitpa.analysis.command import main as analyze

            return analyze(words[1:])
        if words[:1] == ["theory"]:  # likewise
            from vitpa.theory_command.command import main as theory

            return theory(words[1:])
        options = parser().parse_args(words)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("vitpa: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
