"""The `vitpa` command: the top floor, the only file that knows every part of the house."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import data_prep.command
import jobs.command
import jobs.doctor.command
import slurm.command
from vitpa.terminal import printable_output

WITH_TORCH = {  # the commands that parse their own arguments; torch is imported only for them
    "train": "vitpa.train_command",
    "bench": "vitpa.bench.command",
    "analyze": "vitpa.analysis.command",
    "export": "vitpa.export.command",
    "theory": "vitpa.theory_command.command",
}


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
    commands.add_parser("export", help="a run's weights with timm's names and a model card", add_help=False)
    commands.add_parser("theory", help="the experiments of the paper's theory, in minutes on a CPU", add_help=False)
    jobs.command.add_parser(commands)
    jobs.doctor.command.add_parser(commands)
    slurm.command.add_parser(commands)
    return top


def import_quickly(name: str) -> ModuleType:
    """A module, imported without looking for garbage, of which there is none: a sixth of the time.

    What is there then is left alone by every later search.
    """
    gc.disable()
    module = import_module(name)
    gc.freeze()
    gc.enable()
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `vitpa` command and return its exit code: 0 ok, 1 a user's error, 2 usage, 3 no scheduler, 4 partial."""
    with printable_output():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(words: list[str]) -> int:
    try:
        if words and words[0] in WITH_TORCH:
            return int(import_quickly(WITH_TORCH[words[0]]).main(words[1:]))
        options = parser().parse_args(words)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("vitpa: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
