r"""What goes to the terminal, or where else a command's output goes: readable in any encoding, and never its orders.

Logs, records, names of files and what other programs say may hold anything. Control characters of theirs are shown as
escapes (`\x1b`), so that no log can set a title, clear the screen, or write a line that looks like ours.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

# C0 and C1 controls and DEL, the separators that end a line for some programs, and what turns the direction of text around
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with every control character as an escape, such as `\x1b` or `\n`: one line, safe to be shown.

    Args:
        text: Anything.
        keep: Control characters to be left as they are: newlines and tabs, for a text of several lines.
    """
    return CONTROLS.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def warn(text: str) -> None:
    """Tell the user what was not as it should be, in a line on stderr; unlike Python's warnings nothing filters it."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


OUTPUT_CLOSED = 128 + signal.SIGPIPE  # the exit code of a program that nobody reads any more, as a shell shows it


class PrintableStream:
    """A text stream that shows control characters, save newlines and tabs, and ends the program when nobody reads it.

    Whatever is not overridden here is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream  # for what writes orders to the terminal itself, such as a progress bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text`, printable."""
        try:
            return self.stream.write(printable(text, keep="\n\t"))
        except BrokenPipeError:
            leave_closed_output(self.stream)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand everything to whoever reads."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            leave_closed_output(self.stream)


def leave_closed_output(stream: TextIO, code: int = OUTPUT_CLOSED) -> NoReturn:
    """End the program as SIGPIPE would, with its clean-ups and without a word; what is still buffered goes nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    raise SystemExit(code)


def terminal_stream(*, stderr: bool = False) -> TextIO | None:
    """The stream itself, without `PrintableStream` around it; None if there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return stream.stream if isinstance(stream, PrintableStream) else stream


@contextmanager
def printable_output() -> Iterator[None]:
    """For a command: what it prints is printable, in any encoding, and ends quietly when nobody reads it any more."""
    if isinstance(sys.stdout, PrintableStream):
        yield
        return
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    for stream in before:
        _set_errors(stream, "backslashreplace")
    out, err = (io.StringIO() if stream is None else stream for stream in before)  # None: closed by whoever started us
    sys.stdout, sys.stderr = cast("TextIO", PrintableStream(out)), cast("TextIO", PrintableStream(err))
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError as error:  # such as a full disk
            with suppress(OSError):
                print(f"error: the output cannot be written: {error.strerror}", file=err)
            leave_closed_output(out, 1)
        finally:
            sys.stdout, sys.stderr = before
        for stream, its in zip(before, errors, strict=True):
            _set_errors(stream, its)


def _set_errors(stream: TextIO | None, errors: str | None) -> None:
    if isinstance(stream, io.TextIOWrapper) and errors is not None:
        with suppress(OSError, ValueError):  # closed
            stream.reconfigure(errors=errors)
