"""Folders of Weights & Biases and MLflow hold what metrics.jsonl holds; a run that has gone on is there once."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.sweep import Run, SweepDir
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.cli import main as vitpa
from vitpa.metrics_file import to_line


def fill(root: Path) -> Run:
    """A sweep of which one run is finished, with a curve, and the other has not begun."""
    sweep = make_sweep(root, seeds=1)
    run = sweep.runs[0]
    write_result(root, run, val_top1=0.75)
    path = run.directory(root).metrics_jsonl
    path.write_text("".join(to_line({"step": step, "train/loss": 3.0 / step}) for step in (1, 2, 4)) + path.read_text())
    SweepDir(root, sweep.name).record(sweep)
    return run


def write(root: Path, option: str) -> Path:
    folder = root / "tracked"
    for _ in range(2):
        assert vitpa(["sweep", "frame", str(root / "small.yaml"), "--root", str(root), option, str(folder)]) == 4
    return folder


@pytest.mark.slow
def test_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    run = fill(tmp_path)
    client = tracking.MlflowClient(tracking_uri=write(tmp_path, "--mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert (found.info.run_name, found.data.params["seed"]) == (run.label, "0")
    curve = {each.step: each.value for each in client.get_metric_history(found.info.run_id, "train/loss")}
    assert curve == {1: 3.0, 2: 1.5, 4: 0.75}
    assert found.data.metrics["final/top1"] == found.data.metrics["val/top1"] == 0.75


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
        position += 7 + length
        left = 32_768 - position % 32_768
        position += left if left < 7 else 0


@pytest.mark.slow
def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run = fill(tmp_path)
    (path,) = write(tmp_path, "--wandb").glob(f"wandb/offline-run-*-{run.signature}/run-{run.signature}.wandb")
    curve, names = {}, set()
    for record in map(Record.FromString, wandb_records(path)):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        names |= {record.run.display_name} - {""}
        if "train/loss" in items:
            curve[record.history.step.num] = float(items["train/loss"])
    assert names == {run.label}
    assert curve == {1: 3.0, 2: 1.5, 4: 0.75}


def test_without_them_it_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    words = ["sweep", "frame", str(tmp_path / "small.yaml"), "--root", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # as if it were not installed
        assert vitpa([*words, "--wandb", str(tmp_path / "x")]) == 1
    assert "pip install 'vitpa[wandb]'" in capsys.readouterr().err
