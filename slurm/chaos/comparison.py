"""How a run under faults ended, compared to the last bit with the same run undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slurm.chaos.certificate import Ending
from slurm.chaos.sweep import ChaosError, document
from vitpa.documents import parse_json

MEASURED = ("weights_sha256", "val_top1", "val_top5", "val_loss", "steps")  # keys of result.json


def compare(label: str, disturbed: Path, undisturbed: Path) -> Ending:
    """How a run ended, by its folder and that of the same run undisturbed.

    Raises:
        ChaosError: the undisturbed run has no result.
    """
    result, other = document(disturbed / "result.json"), document(undisturbed / "result.json")
    if not other:
        raise ChaosError(f"{label}: the undisturbed run has no result")
    if not result:
        return Ending(label, finished=False)
    ends = [document(path).get("state") for path in disturbed.glob("attempts/*/exit.json")]
    rows, others = _values(disturbed / "metrics.jsonl"), _values(undisturbed / "metrics.jsonl")
    twice = len(rows) - len({(row["step"], *sorted(row)) for row in rows})
    doubled = f"{ends.count('done')} attempts finished it" if ends.count("done") > 1 else ""
    doubled = doubled or (f"{twice} rows of metrics.jsonl are there twice" if twice else "")
    unequal = [key for key in MEASURED if result.get(key) != other.get(key)]
    different = ", ".join(unequal) or ("" if rows == others else "rows of metrics.jsonl")
    return Ending(label, finished=True, doubled=doubled, different=different)


def _values(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics without what the clock says, and without their checksums, which cover that, too."""
    timed = ("perf/", "time", "crc32")
    rows = [parse_json(line) for line in metrics_jsonl.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]
