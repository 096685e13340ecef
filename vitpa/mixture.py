"""Whether results may be averaged: those of one data set have to be of the same code and data. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vitpa.rundir import Result

HOW = "Train the older ones again (delete their folders under runs/, then submit)"  # to mend it


def mixtures(results: Iterable[tuple[str, Result]]) -> dict[str, str]:
    """The data sets whose results are of different code or data, each with what is different, and which runs have which.

    Args:
        results: Each with the label of its run.
    """
    by_dataset: dict[str, list[tuple[str, Result]]] = {}
    for label, result in results:
        by_dataset.setdefault(result.dataset, []).append((label.removeprefix(f"{result.dataset}-"), result))
    found = {dataset: _mixture(dataset, its) for dataset, its in by_dataset.items()}
    return {dataset: what for dataset, what in found.items() if what}


def mixed_mark(datasets: Sequence[str]) -> str:
    """What a table says that averages such results all the same."""
    return f"MIXED: runs of different code or data are averaged for {', '.join(datasets)}."


def _mixture(dataset: str, results: Sequence[tuple[str, Result]]) -> str:
    parts = []
    for name, version in (("code_version", _code), ("beton_sha256", data_version)):
        runs: dict[str, list[str]] = {}
        for label, result in results:
            runs.setdefault(version(result), []).append(label)
        if len(runs) > 1:
            which = ", ".join(
                f"{value} ({' '.join(runs[whole])})" for whole, value in zip(runs, short_versions(list(runs)), strict=True)
            )
            parts.append(f"{dataset}: runs of different {name}: {which}")
    return "; ".join(parts)


def _code(result: Result) -> str:
    return result.code_version


def data_version(result: Result) -> str:
    """The whole digests: what is compared, and what programs get."""
    return " ".join(f"{split}:{digest}" for split, digest in sorted(result.beton_sha256.items()))


def short_versions(versions: Sequence[str]) -> list[str]:
    """Versions for people to read: digests with 12 digits where that does not make two of them alike."""
    short = [re.sub(r"(:[0-9a-f]{12})[0-9a-f]{52}\b", r"\1", version) for version in versions]
    return short if len(set(short)) == len(set(versions)) else list(versions)
