"""`vitpa sweep frame`: the numbers of the runs' own files, as CSV and as Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.report.collect import collect
from jobs.report.frame import curves, kind_of_texts, results, write
from jobs.report.tables import write_report
from jobs.state import StateReader
from jobs.sweep import Sweep, SweepDir
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.cli import main as vitpa
from vitpa.metrics_file import read_metrics, to_line


def fill(root: Path) -> Sweep:
    """Two learning rates and two seeds of both attentions; one run is missing, one judged by its average; with curves."""
    sweep = make_sweep(root, seeds=2, axes={"optim.lr": [0.001, 0.01]}, overrides={"train.ema_decay": 0.9})
    for number, run in enumerate(sweep.runs[:-1]):
        ema = {"ema_val_top1": 0.5 + number / 100, "ema_val_top5": 0.95, "ema_val_loss": 0.5}
        write_result(root, run, val_top1=0.1, **ema)
        path = run.directory(root).metrics_jsonl
        path.write_text(to_line({"step": 1, "epoch": 1.0, "train/loss": 2.0 + number}) + path.read_text())
    SweepDir(root, sweep.name).record(sweep)
    return sweep


def read(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_per_run_with_all_axes_and_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = fill(tmp_path), tmp_path / "frame.csv"
    words = ["sweep", "frame", str(tmp_path / "small.yaml"), "--root", str(tmp_path)]
    assert vitpa([*words, "--out", str(out)]) == 4  # one is missing
    rows = read(out)
    assert [row["run"] for row in rows] == [run.label for run in sweep.runs]
    assert [row["optim.lr"] for row in rows] == [run.settings["optim.lr"] for run in sweep.runs]
    assert [float(row["top1"]) for row in rows[:-1]] == [0.5 + number / 100 for number in range(len(sweep.runs) - 1)]
    assert {row["val_top1"] for row in rows[:-1]} == {"0.1"}
    assert (rows[-1]["state"], rows[-1]["top1"]) == ("missing", "")
    capsys.readouterr()
    assert vitpa([*words, "attention=content"]) == 0  # printed, filtered
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_an_axis_called_as_a_column_has_one_of_its_own(tmp_path: Path) -> None:
    axes = {
        "epochs": {"short": {"optim.lr": 1e-3}, "long": {"optim.lr": 2e-3}},
        "loss": {"ce": {}, "smooth": {"optim.label_smoothing": 0.3}},
        "step": {"1": {}, "2": {"optim.weight_decay": 0.3}},
        "quantity": {"x": {}},
        "gpu_hours": {"y": {}},
        "mixing": {"z": {}},
    }
    sweep = make_sweep(tmp_path, seeds=1, axes=axes)
    for run in sweep.runs:
        write_result(tmp_path, run, val_loss=0.25)
    states = StateReader(tmp_path).states(sweep.runs)
    write(results(states, tmp_path), tmp_path / "results.csv")
    write(curves(states, tmp_path), tmp_path / "curves.csv")
    write_report(collect(sweep, states, tmp_path), tmp_path)
    for name, renamed in (
        ("results", {"epochs", "loss", "step", "gpu_hours"}),
        ("curves", {"epochs", "loss", "step", "gpu_hours"}),
        ("runs", {"epochs", "gpu_hours"}),
        ("table", {"quantity", "gpu_hours"}),
    ):
        rows = read(tmp_path / f"{name}.csv")
        columns = {axis: f"axes.{axis}" if axis in renamed else axis for axis in axes}
        expected = [{column: run.settings[axis] for axis, column in columns.items()} for run in sweep.runs]
        found = [{column: row[column] for column in columns.values()} for row in rows[: len(expected)]]
        assert sorted(map(str, found)) == sorted(map(str, expected)), name
    assert {row["loss"] for row in read(tmp_path / "results.csv")} == {"0.25"}
    assert {(row["epochs"], row["gpu_hours"]) for row in read(tmp_path / "runs.csv")} == {("4", "0.25")}
    assert {row["quantity"] for row in read(tmp_path / "table.csv")} >= {"content", "positional"}


def test_labels_that_are_one_number_stay_texts() -> None:
    found = [kind_of_texts(texts) for texts in (["1", "01"], ["1", "1.0"], ["1", "2", "1"], ["0.5", "1"], ["a", "1"])]
    assert found == [str, str, int, float, str]


def test_all_rows_of_all_curves(tmp_path: Path) -> None:
    sweep = fill(tmp_path)
    states = StateReader(tmp_path).states(sweep.runs)
    write(curves(states, tmp_path), tmp_path / "curves.csv")
    rows = read(tmp_path / "curves.csv")
    expected = [(run.signature, row) for run in sweep.runs for row in read_metrics(run.directory(tmp_path).metrics_jsonl)]
    assert len(rows) == len(expected) == 14
    for row, (signature, its) in zip(rows, expected, strict=True):
        assert row["signature"] == signature
        assert {name: float(row[name]) if row[name] else None for name in ("step", "train/loss", "ema_val/top1")} == {
            name: its.get(name) for name in ("step", "train/loss", "ema_val/top1")
        }


def test_parquet_has_the_same_rows_with_their_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    states = StateReader(tmp_path).states(fill(tmp_path).runs)
    for name, table in {"results": results(states, tmp_path), "curves": curves(states, tmp_path)}.items():
        write(table, tmp_path / f"{name}.csv")
        again = results(states, tmp_path) if name == "results" else curves(states, tmp_path)
        write(again, tmp_path / f"{name}.parquet")
        found = parquet.read_table(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / f"{name}.csv", dtype=dict.fromkeys(("signature", "weights_sha256"), str)),
            found.to_pandas(),
            check_dtype=False,
            check_exact=True,
        )
        assert {str(found.schema.field(key).type) for key in ("seed", "optim.lr", "dataset")} == {"int64", "double", "string"}
