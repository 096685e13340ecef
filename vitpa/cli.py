"""The `vitpa` command: the top floor, the only file that knows every part of the house."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import data_prep.command
import jobs.command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `vitpa` command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="vitpa", description="Vanilla against positional attention, from raw data to the table."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data_prep.command.add_parser(commands)
    jobs.command.add_parser(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
