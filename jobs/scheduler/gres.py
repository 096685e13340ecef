"""SLURM's generic resources (gres: GPUs, local scratch, shards): one reader for what a profile asks for and nodes have.

Grammar (man sbatch, --gres; man slurm.conf, Gres): a list `name[:type][:count]`, counts with K, M, G, T or P (times 1024);
nodes add `:no_consume` and the sockets in brackets, as in `gpu:a100:4(S:0-1)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ITEM = re.compile(r"(?:gres[/:])?(?P<name>[A-Za-z_][\w.+-]*)(?P<fields>(?:[:=]\w[\w.+-]*)*)(?:\([^()]*\))?")
_COUNT = re.compile(r"(\d+)([KMGTP]?)", re.IGNORECASE)
_BETWEEN_ITEMS = re.compile(r",(?![^(]*\))")  # not in brackets
_UNITS = ("", "K", "M", "G", "T", "P")
SHARES = ("shard", "mps")  # parts of a GPU, asked for instead of a whole one


@dataclass(frozen=True)
class Gres:
    """So many of one resource; `type` is empty where any will do."""

    name: str
    type: str
    count: int

    def __str__(self) -> str:
        return ":".join(filter(None, [self.name, self.type, str(self.count)]))


def parse_gres(text: str) -> tuple[Gres, ...]:
    """The resources in SLURM's notation, equal ones added up; empty for `none` and `(null)`.

    Raises:
        ValueError: an item is not in this notation.
    """
    counts: dict[tuple[str, str], int] = {}
    for item in _BETWEEN_ITEMS.split(text):
        if item.strip().lower() in ("", "none", "(null)"):
            continue
        match = _ITEM.fullmatch(item.strip())
        fields = [] if match is None else re.split("[:=]", match["fields"])[1:]
        fields = [field for field in fields if field != "no_consume"]
        number = _COUNT.fullmatch(fields[-1]) if fields else None
        types = fields[:-1] if number else fields
        if match is None or len(types) > 1:
            raise ValueError(f"{item.strip()!r}: expected NAME, NAME:COUNT or NAME:TYPE:COUNT, such as gpu:a100:2")
        count = int(number[1]) * 1024 ** _UNITS.index(number[2].upper()) if number else 1
        key = (match["name"], types[0] if types else "")
        counts[key] = counts.get(key, 0) + count
    return tuple(Gres(name, kind, count) for (name, kind), count in counts.items())


def gpus_by_type(resources: Iterable[Gres]) -> dict[str, int]:
    """The GPUs among the resources by their type; "" where any will do."""
    return {each.type: each.count for each in resources if each.name == "gpu"}


def gpu_count(resources: Iterable[Gres]) -> int:
    """How many GPUs the resources have."""
    return sum(gpus_by_type(resources).values())
