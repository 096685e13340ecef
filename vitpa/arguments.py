"""How words of the user's are read as paths and numbers: on the command line and in our files alike.

Numbers are written as in YAML 1.2's core schema (https://yaml.org/spec/1.2.2/, section 10.3.2), in ASCII digits: 010 is ten,
and 1_000, 1:30 or a digit of another script is no number. Only the standard library, so that every command may use it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitpa.errors import UserError

INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
VARIABLE = re.compile(r"\$(\$|[A-Za-z_][A-Za-z0-9_]*|\{[^{}]*\})")
DIGITS = 100  # of a number that is read: far more than any value of ours has, far fewer than int() would take minutes for


class ConfigError(UserError, ValueError):
    """A configuration the user has to fix: one line with the file or key, what was found and what is allowed."""


def parse_integer(text: str) -> int | None:
    """The whole number that `text` is in YAML 1.2, such as 10, 010 (ten), 0x1f or 0o17; None if it is none."""
    if len(text) > DIGITS or not INTEGER.fullmatch(text):
        return None
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def parse_float(text: str, digits: int = DIGITS) -> float | None:
    """The number that `text` is in YAML 1.2, such as 10, 1.5 or 1e-3, whole ones included; at most `digits` characters.

    None if it is none, or one that float64 cannot hold: 1e400 would be infinite, and 1e-400 zero.
    """
    if len(text) > digits or not FLOAT.fullmatch(text):
        whole = parse_integer(text)
        return None if whole is None else float(whole)
    value = float(text)
    vanished = value == 0 and re.match(r"[-+.0]*[1-9]", text)
    return None if vanished or math.isinf(value) else value


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` up, to `high` if given."""
    allowed = f"from {low} up" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        number = parse_integer(text)
        if number is None or number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return number

    return read


def whole_numbers(low: int, high: int | None = None) -> Callable[[str], list[int]]:
    """A type for argparse: whole numbers from `low` up, to `high` if given, with commas between."""
    allowed = f"from {low} up" if high is None else f"from {low} to {high}"

    def read(text: str) -> list[int]:
        numbers = [parse_integer(word) for word in text.split(",")]
        found = [number for number in numbers if number is not None and low <= number and (high is None or number <= high)]
        if len(found) < len(numbers):
            raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers {allowed} with commas between, such as 1,2")
        return found

    return read


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a finite number from `low`, or only what is above it, to `high`."""
    to = "" if high == math.inf else f" to {high:g}"
    allowed = f"above {low:g}{to and ', up' + to}" if above else f"from {low:g}{to or ' up'}"

    def read(text: str) -> float:
        value = parse_float(text)
        if value is None or not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return read


def path_argument(text: str) -> Path:
    """A type for argparse: a path, with `~` and variables expanded."""
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def expand_path(path: str | Path, name: str = "") -> Path:
    """`path` with `~`, `~user`, `$VAR` and `${VAR}` expanded; `$$` stands for a dollar sign.

    Args:
        path: As the user wrote it. What is to be expanded on another machine must be expanded there.
        name: Of the key or option that holds it, for error messages.

    Raises:
        ConfigError: a variable that is not set or empty, an unknown user, an empty path, or a character no path can have.
    """
    text = str(path)

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"{name}={text}: {why}" if name else f"{text}: {why}" if text else why)

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = os.environ.get(match[1].strip("{}"))
        if not found:
            raise refuse(
                f"{match[0]} is {'not set' if found is None else 'empty'} here; set it, or write $$ for a dollar sign"
            )
        return found

    if not text:
        raise refuse("an empty path; write . for the current folder")
    home, slash, rest = text.partition("/")
    if home.startswith("~"):
        found = os.path.expanduser(home)  # noqa: PTH111 - Path.expanduser raises RuntimeError
        if found == home:
            raise refuse(f"there is no user {home[1:]}; write ./{home} for a folder of that name")
        expanded = found + re.sub(VARIABLE, value, slash + rest)
    else:
        expanded = re.sub(VARIABLE, value, text)
    try:
        if b"\0" in os.fsencode(expanded):
            raise refuse("a path cannot hold the character \\0")
    except UnicodeEncodeError:
        raise refuse("a character of it cannot be in a path in this locale") from None
    return Path(expanded)


def literal_path(path: str | Path) -> str:
    """The text from which `expand_path` makes `path` again: for what hands a path on to a command or a key of ours."""
    return as_argument(path).replace("$", "$$")


def as_argument(path: str | Path) -> str:
    """`path` as an argument of any program: not one that begins like an option or with a ~."""
    return f"./{path}" if str(path).startswith(("~", "-")) else str(path)


def in_shell(path: str | Path) -> str:
    """`path` as a word of a command of ours, as it has to be typed in a shell."""
    return shlex.quote(literal_path(path))


def name_or_path(text: str) -> str:
    """A type for argparse: a name as it is, or a path with `~` and variables expanded."""
    return str(path_argument(text)) if "$" in text or text.startswith("~") or not text else text


class IntermixedParser(argparse.ArgumentParser):
    """A parser that takes `SWEEP --root DIR seed=0` as it takes `SWEEP seed=0 --root DIR`; argparse's own refuses that."""

    _inside = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, by way of its intermixed variant, which calls this again."""
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False
