"""A run under faults beside the same run undisturbed, both written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurm.chaos.certificate import Ending
from slurm.chaos.comparison import compare
from slurm.chaos.sweep import ChaosError

RESULT = {"weights_sha256": "ab", "val_top1": 0.5, "val_top5": 0.9, "val_loss": 1.25, "steps": 20, "train_time_s": 3.0}
ROWS = [{"step": 10, "train/loss": 2.0, "time_s": 1.5}, {"step": 20, "train/loss": 1.0, "time_s": 3.0}]
ROWS += [{"step": 20, "val/top1": 0.5, "time_s": 3.0}]  # an evaluation at the step of a row of training


def write_run(folder: Path, result: dict[str, Any], rows: list[dict[str, Any]], ends: tuple[str, ...] = ("done",)) -> Path:
    for number, state in enumerate(ends, 1):
        attempt = folder / "attempts" / f"{number:04}"
        attempt.mkdir(parents=True)
        (attempt / "exit.json").write_text(json.dumps({"state": state}))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "crc32": number}) + "\n" for number, row in enumerate(rows))
    )
    return folder


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "undisturbed", RESULT, ROWS)


def test_what_the_clock_says_may_differ(tmp_path: Path, undisturbed: Path) -> None:
    later = [{**row, "time_s": 9.0, "perf/images_per_s": 7.0} for row in ROWS]
    disturbed = write_run(tmp_path / "disturbed", {**RESULT, "train_time_s": 9.0}, later, ("interrupted", "done"))
    assert compare("a", disturbed, undisturbed) == Ending("a", finished=True)


def test_a_run_without_a_result_is_lost(tmp_path: Path, undisturbed: Path) -> None:
    assert compare("a", tmp_path / "disturbed", undisturbed) == Ending("a", finished=False)


@pytest.mark.parametrize(
    ("ends", "rows", "doubled"),
    [
        (("done", "done"), ROWS, "2 attempts finished it"),
        (("done",), [ROWS[0], *ROWS], "1 rows of metrics.jsonl are there twice"),
    ],
)
def test_a_run_that_was_doubled(
    tmp_path: Path, undisturbed: Path, ends: tuple[str, ...], rows: list[dict[str, Any]], doubled: str
) -> None:
    assert compare("a", write_run(tmp_path / "disturbed", RESULT, rows, ends), undisturbed).doubled == doubled


@pytest.mark.parametrize(
    ("result", "rows", "different"),
    [
        ({**RESULT, "weights_sha256": "cd", "steps": 21}, ROWS, "weights_sha256, steps"),
        (RESULT, [{**ROWS[0], "train/loss": 2.5}, *ROWS[1:]], "rows of metrics.jsonl"),
    ],
)
def test_a_run_that_is_different(
    tmp_path: Path, undisturbed: Path, result: dict[str, Any], rows: list[dict[str, Any]], different: str
) -> None:
    assert compare("a", write_run(tmp_path / "disturbed", result, rows), undisturbed).different == different


def test_nothing_to_compare_with(tmp_path: Path, undisturbed: Path) -> None:
    with pytest.raises(ChaosError, match=r"^a: the undisturbed run has no result$"):
        compare("a", undisturbed, tmp_path / "nowhere")
