r"""What goes to the terminal, or where else a command's output goes: readable in any encoding, and never its orders.

Logs, records, names of files and what other programs say may hold anything. Control characters of theirs are shown as
escapes (`\x1b`), so that no log can set a title, clear the screen, or write a line that looks like ours.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from vitpa.room import is_full

# C0 and C1 controls and DEL, the separators that end a line for some programs, and what turns the direction of text around
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with every control character but those to `keep` as an escape, such as `\x1b`: one line, safe to be shown."""
    return CONTROLS.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


class LineHandler(logging.Handler):
    """Prints what our packages log, a line each on stderr; a warning begins with `warning: `.

    Attributes:
        print_above: Prints a line above the live one, where there is one.
    """

    print_above: Callable[[str], object] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        line = ("warning: " if record.levelno >= logging.WARNING else "") + printable(record.getMessage())
        if self.print_above is not None:
            self.print_above(line)
        else:
            print(line, file=sys.stderr, flush=True)


LINES = LineHandler()


@contextmanager
def logged_lines() -> Iterator[None]:
    """Have `LINES` print what our packages log, from `INFO` on unless the caller has set another level."""
    loggers = [logging.getLogger(name) for name in ("vitpa", "jobs", "data_prep")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(LINES)
        logger.setLevel(logger.level or logging.INFO)
        logger.propagate = False  # a library may add a handler to the root, which would print the line again
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(LINES)
            logger.setLevel(level)
            logger.propagate = propagate


OUTPUT_CLOSED = 128 + signal.SIGPIPE  # the exit code of a program that nobody reads any more, as a shell shows it


class OutputFailedError(SystemExit):
    """Standard output cannot be written, such as on a full disk: ends the program with exit code 1, after its clean-ups."""

    def __init__(self, error: OSError) -> None:
        super().__init__(1)
        self.strerror = error.strerror or str(error)


class OutputStream:
    """A text stream that ends the program when nobody reads it, or when it is vital and cannot be written.

    What is not vital, such as the progress on stderr, is left out from then on, on a full disk until there is room. Whatever
    is not overridden here is the stream's own.
    """

    def __init__(self, stream: TextIO, *, vital: bool = False) -> None:
        self.stream, self.vital = stream, vital

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text`."""
        try:
            self.stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand everything to whoever reads."""
        try:
            self.stream.flush()
        except OSError as error:
            self._failed(error)

    def end(self) -> None:
        """Hand everything to whoever reads, for the last time: what cannot be written is dropped."""
        try:
            self.stream.flush()
        except OSError as error:
            self._failed(error, is_last=True)

    def _failed(self, error: OSError, *, is_last: bool = False) -> None:
        if is_full(error) and not self.vital and not is_last:
            return
        _discard(self.stream)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(OUTPUT_CLOSED)
        if self.vital:
            raise OutputFailedError(error)


class PrintableStream(OutputStream):
    """The same, which shows control characters, save newlines and tabs.

    Attributes:
        plain: Without that, for what writes orders to the terminal itself, such as a progress bar.
    """

    def __init__(self, stream: TextIO, *, vital: bool = False) -> None:
        super().__init__(stream, vital=vital)
        self.plain = OutputStream(stream, vital=vital)

    def write(self, text: str) -> int:
        """Write `text`, printable."""
        return super().write(printable(text, keep="\n\t"))


def _discard(stream: TextIO) -> None:
    """Have what is still buffered, and what comes after it, go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def terminal_stream(*, stderr: bool = False) -> TextIO | None:
    """The stream without what `PrintableStream` makes of texts; None if there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return cast("TextIO", stream.plain) if isinstance(stream, PrintableStream) else stream


@contextmanager
def printable_output() -> Iterator[None]:
    """For a command: what it prints or logs is printable, in any encoding; one line says so if stdout cannot be written.

    When nobody reads it any more the command ends quietly, as by SIGPIPE.
    """
    if isinstance(sys.stdout, PrintableStream):
        yield
        return
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    for stream in before:
        _set_errors(stream, "backslashreplace")
    out, err = (io.StringIO() if stream is None else stream for stream in before)  # None: closed by whoever started us
    sys.stdout, sys.stderr = cast("TextIO", PrintableStream(out, vital=True)), cast("TextIO", PrintableStream(err))
    try:
        try:
            with logged_lines():
                yield
        finally:
            sys.stdout.flush()
            cast("OutputStream", sys.stderr).end()
    except OutputFailedError as failed:
        print(f"error: standard output cannot be written: {failed.strerror}", file=sys.stderr, flush=True)
        raise
    finally:
        sys.stdout, sys.stderr = before
        for stream, its in zip(before, errors, strict=True):
            _set_errors(stream, its)


def _set_errors(stream: TextIO | None, errors: str | None) -> None:
    if isinstance(stream, io.TextIOWrapper) and errors is not None:
        with suppress(OSError, ValueError):  # closed
            stream.reconfigure(errors=errors)
