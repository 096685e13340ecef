"""`vitpa bench NAME`: how fast the pieces are on this machine, the usual way beside ours, in one process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from vitpa.arguments import ConfigError
from vitpa.bench import imagenet, small
from vitpa.data.manifest import BetonError
from vitpa.os_errors import os_error_line
from vitpa.records import RunError, check_writable
from vitpa.terminal import printable, printable_output


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM, as at the end of a job's time, ends the program as an error does: what was measured is written before.

    SIGHUP, of a terminal that is closed, likewise, unless it is ignored (nohup).
    """

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
        with suppress(OSError):  # the terminal may be gone
            print(f"vitpa bench: ended by {signal.Signals(number).name}; what was measured is kept", file=sys.stderr)
        raise SystemExit(128 + number)

    if "WORLD_SIZE" in os.environ:  # torchrun's processes just end
        yield
        return
    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) != signal.SIG_IGN]
    before = {name: signal.signal(name, leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def command_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="vitpa bench",
        description="Measure, print a table, write JSON.",
        epilog="example: vitpa bench small --replicas 1,5 --json small.json",
    )
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    small.add_parser(benchmarks)
    imagenet.add_parser(benchmarks)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, with overrides anywhere; argparse takes them in one place only."""
    parser = command_parser()
    options, others = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in others):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.overrides += others
    return options


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark: 0 if it was measured, 1 with one line for an error of the user's."""
    options = parse(arguments)
    try:
        if options.json:  # before anything is measured
            options.json = options.json.resolve()  # what a link points to is written, not the link
            check_writable(options.json)
        with sigterm_as_exit():
            return int(options.measure(options))
    except (ConfigError, BetonError, RunError) as error:
        print(f"vitpa bench: {printable(str(error))}", file=sys.stderr)
    except OSError as error:
        print(f"vitpa bench: {printable(os_error_line(error))}", file=sys.stderr)
    return 1
