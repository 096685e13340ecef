"""The rows of metrics.jsonl: a JSON object per line, with the CRC-32 of its text. Torch-free.

    {"step": 22, "epoch": 1.0, "val/loss": 2.1, "val/top1": 0.3, "val/top5": 0.7, "crc32": "1c291ca3"}

The CRC is over the text of the object without it. Files of earlier versions of vitpa have none; a run that goes on gets them.
"""

from __future__ import annotations

import errno
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitpa.documents import JSON_BYTES, DocumentError, open_regular, parse_json, read_bytes
from vitpa.terminal import warn

EVALUATED = ("val/top1", "val/top5", "val/loss")
TAIL_BYTES = 16_384
METRICS_BYTES = 1 << 30  # some millions of rows
CRC = '"crc32": "'
_CRC = re.compile(r', "crc32": "([0-9a-f]{8})"}\Z')


def to_line(row: Mapping[str, Any]) -> str:
    """A row as a line of the file."""
    text = json.dumps(row)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def has_crc(line: str) -> bool:
    """Whether a line, without its line break, ends with a CRC."""
    return _CRC.search(line) is not None


def parse_line(line: str) -> dict[str, Any]:
    """The row in a line, without its line break and its CRC.

    Raises:
        ValueError: the line is damaged.
    """
    match = _CRC.search(line)
    if match is not None:
        line = line[: match.start()] + "}"
        if f"{zlib.crc32(line.encode(errors='replace')):08x}" != match[1]:
            raise ValueError("its CRC does not fit")
    row = parse_json(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("it is no row")
    return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line is ignored, a damaged one before it with a warning.

    Raises:
        OSError: it cannot be read, or is larger than METRICS_BYTES.
    """
    if not path.exists():
        return []
    try:
        return _rows(path, read_bytes(path, METRICS_BYTES).decode(errors="replace"))
    except DocumentError as error:
        raise OSError(errno.EFBIG, str(error), str(path)) from error


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    with_crc = any(map(has_crc, lines))  # then all lines had one: a run that goes on writes all of them
    rows = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        try:
            if with_crc and not has_crc(line):
                raise ValueError("it has no CRC")
            if not last or with_crc:  # the last line has no line break: it is whole only if its CRC says so
                rows.append(parse_line(line))
        except (ValueError, RecursionError):
            if not last:
                warn(f"{path}: line {number} is damaged and left out")
    return rows


def last_evaluation(path: Path, *, with_crc: bool = False) -> dict[str, Any] | None:
    """The row of the last evaluation in a metrics.jsonl; None if there is none, or it is damaged.

    Args:
        path: The file.
        with_crc: Whether a row without a CRC is damaged, as it is where another row has one.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        for length in (TAIL_BYTES, min(size, JSON_BYTES)):
            file.seek(max(0, size - length))
            text = file.read().decode(errors="replace")
            with_crc = with_crc or CRC in text
            lines = text.split("\n")
            for line in reversed(lines[length < size :]):  # the first one was cut
                if '"val/top1"' not in line:
                    continue
                try:
                    return parse_line(line) if has_crc(line) or not with_crc else None
                except (ValueError, RecursionError):
                    return None  # the last one, and damaged
            if length >= size:
                break
    return None
