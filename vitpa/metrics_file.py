"""The rows of metrics.jsonl: a JSON object per line, with the CRC-32 of its text. Torch-free.

    {"step": 22, "epoch": 1.0, "val/loss": 2.1, "val/top1": 0.3, "val/top5": 0.7, "crc32": "1c291ca3"}

The CRC is over the text of the object without it. Files of earlier versions of vitpa have none; a run that goes on gets them.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitpa.documents import JSON_BYTES, DocumentError, parse_json, read_bytes, read_end

LOGGER = logging.getLogger(__name__)
EVALUATED = ("val/top1", "val/top5", "val/loss")
EMA_EVALUATED = tuple(f"ema_{name}" for name in EVALUATED)  # of the average that train.ema_decay keeps, in the same rows
TAIL_BYTES = 16_384
METRICS_BYTES = 1 << 30  # some millions of rows
CRC = b'"crc32": "'
_CRC_BYTES = len(', "crc32": "1c291ca3"}')
_CRC = re.compile(r', "crc32": "([0-9a-f]{8})"}\Z')


def to_line(row: Mapping[str, Any]) -> str:
    """A row as a line of the file."""
    text = json.dumps(row)
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def has_crc(line: str) -> bool:
    """Whether a line, without its line break, ends with a CRC."""
    return _CRC.search(line) is not None


def parse_line(line: str, *, with_crc: bool = False) -> dict[str, Any]:
    """The row in a line, without its line break and its CRC.

    Raises:
        ValueError: the line is damaged; `with_crc` one without a CRC is, too.
    """
    match = _CRC.search(line)
    if match is not None:
        line = line[: match.start()] + "}"
        if f"{zlib.crc32(line.encode(errors='replace')):08x}" != match[1]:
            raise ValueError("its CRC does not fit")
    elif with_crc:
        raise ValueError("it has no CRC")
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
    lines = _read(path).decode(errors="replace").split("\n")
    with_crc = any(map(has_crc, lines))  # then all lines had one: a run that goes on writes all of them
    rows = []
    # the last line has no line break: it is whole only if its CRC says so
    for number, line in enumerate(lines if with_crc else lines[:-1], start=1):
        try:
            rows.append(parse_line(line, with_crc=with_crc))
        except ValueError:
            if number < len(lines):
                LOGGER.warning(f"{path}: line {number} is damaged and left out")
    return rows


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, METRICS_BYTES)
    except DocumentError as error:
        raise OSError(errno.EFBIG, str(error), str(path)) from error


def damaged_lines(path: Path) -> list[int]:
    """Numbers, from 1, of the lines of a metrics.jsonl that are damaged; a half-written last line is none.

    Raises:
        OSError: it cannot be read, or is larger than METRICS_BYTES.
    """
    data = _read(path)
    lines = data.split(b"\n")[:-1]
    if _crcs_fit(lines):
        return []
    with_crc = CRC in data
    return [number for number, line in enumerate(lines, start=1) if _is_damaged(line.decode(errors="replace"), with_crc)]


def _crcs_fit(lines: Sequence[bytes]) -> bool:
    """Whether all lines end with the CRCs of their rows: in a sweep there are millions of them."""
    crcs = [zlib.crc32(line[:-_CRC_BYTES] + b"}") for line in lines]
    return b"".join([line[-_CRC_BYTES:] for line in lines]) == b', "crc32": "%08x"}' * len(crcs) % tuple(crcs)


def _is_damaged(line: str, with_crc: bool) -> bool:
    try:
        parse_line(line, with_crc=with_crc)
    except ValueError:
        return True
    return False


def last_evaluation(path: Path, *, with_crc: bool = False) -> dict[str, Any] | None:
    """The row of the last evaluation in a metrics.jsonl; None if there is none, or it is damaged.

    A row without a CRC is damaged `with_crc`, or where another row has one.

    Raises:
        OSError: it cannot be read.
    """
    for length in (TAIL_BYTES, JSON_BYTES):
        data = read_end(path, length)
        whole = len(data) < length
        with_crc = with_crc or CRC in data
        found = data.rfind(b'"val/top1"')
        begin = data.rfind(b"\n", 0, found) + 1
        if found >= 0 and (begin > 0 or whole):  # otherwise it was cut
            line = data[begin:].partition(b"\n")[0].decode(errors="replace")
            try:
                return parse_line(line, with_crc=with_crc)
            except ValueError:
                return None  # the last one, and damaged
        if whole:
            break
    return None
