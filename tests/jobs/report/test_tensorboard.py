"""`vitpa sweep tensorboard`: read by TensorBoard's own reader, and asked of a running TensorBoard."""

from __future__ import annotations

import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from jobs.sweep import Run, Sweep, SweepDir
from tests.support.jobs_sweeps import make_sweep, write_result
from tests.support.waiting import wait_for
from vitpa.cli import main as vitpa
from vitpa.metrics_file import to_line

STEPS = (1, 2, 3)


def loss(run: Run, step: int) -> float:
    return 3 / step + 0.1 * run.seed**2 + (0.5 if run.attention == "content" else 0)


def write_curve(root: Path, run: Run, steps: tuple[int, ...]) -> None:
    path = run.directory(root).metrics_jsonl
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_line({"step": step, "epoch": 1.0, "train/loss": loss(run, step)}) for step in steps))


def fill(root: Path) -> Sweep:
    """Two learning rates, both attentions, three seeds; content's are finished, with curves; of positional's one has begun."""
    sweep = make_sweep(root, seeds=3, axes={"optim.lr": [0.001, 0.01]})
    for run in sweep.runs:
        if run.attention == "content":
            write_result(root, run, val_top1=0.5 + 0.1 * run.seed)
            path = run.directory(root).metrics_jsonl
            last = path.read_text()
            write_curve(root, run, STEPS)
            path.write_text(path.read_text() + last)
        elif run.seed == 0:
            write_curve(root, run, STEPS[:2])
    SweepDir(root, sweep.name).record(sweep)
    return sweep


def words(root: Path) -> list[str]:
    return ["sweep", "tensorboard", str(root / "small.yaml"), "--root", str(root)]


def curve(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)}


def test_mean_and_band_are_those_of_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = fill(tmp_path)
    board = SweepDir(tmp_path, sweep.name).tensorboard
    assert vitpa([*words(tmp_path), "--no-serve"]) == 0
    assert "4 of 4 cells written" in capsys.readouterr().out
    cell = board / "digits-content-lr0.01"
    members = [run for run in sweep.runs if run.attention == "content" and run.settings["optim.lr"] == "0.01"]
    values = {step: [loss(run, step) for run in members] for step in STEPS}
    mean, std = ({step: of(its) for step, its in values.items()} for of in (statistics.mean, statistics.stdev))
    high = {step: mean[step] + std[step] for step in STEPS}
    low = {step: mean[step] - std[step] for step in STEPS}
    for folder, tag, expected in (
        ("mean", "train/loss", mean),
        ("mean+std", "train/loss", high),
        ("mean-std", "train/loss", low),
        ("mean", "band/train/loss/upper", high),
        ("mean", "band/train/loss/lower", low),
        ("mean", "seeds", {1: 3, 2: 3, 3: 3, 4: 3}),
        ("mean", "final/top1_mean", {4: 0.6}),
        ("mean", "final/top1_std", {4: 0.1}),
    ):
        assert curve(cell / folder, tag) == pytest.approx(expected, rel=1e-6), (folder, tag)
    one_seed = board / "digits-positional-lr0.01"  # has a mean and no band
    assert len(curve(one_seed / "mean", "train/loss")) == 2
    assert EventAccumulator(str(one_seed / "mean+std")).Reload().Tags()["scalars"] == []


def test_a_row_per_cell_along_the_axes(tmp_path: Path) -> None:
    board = SweepDir(tmp_path, fill(tmp_path).name).tensorboard
    assert vitpa([*words(tmp_path), "--no-serve"]) == 0

    def plugin_data(folder: Path, tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")[tag])

    experiment = plugin_data(board, "_hparams_/experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == {"attention", "optim.lr"}
    assert {info.name.tag for info in experiment.metric_infos} >= {"final/top1_mean", "final/top1_std", "final/seeds"}
    start = plugin_data(board / "digits-content-lr0.01" / "mean", "_hparams_/session_start_info").session_start_info
    assert (start.hparams["attention"].string_value, start.hparams["optim.lr"].number_value) == ("content", 0.01)


def test_only_cells_with_new_rows_are_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = fill(tmp_path)
    board = SweepDir(tmp_path, sweep.name).tensorboard
    assert vitpa([*words(tmp_path), "--no-serve"]) == 0
    untouched = list((board / "digits-content-lr0.01").rglob("events*"))
    late = next(run for run in sweep.runs if run.attention == "positional" and run.seed == 1)
    write_curve(tmp_path, late, STEPS)
    capsys.readouterr()
    assert vitpa([*words(tmp_path), "--no-serve"]) == 0
    assert "1 of 4 cells written" in capsys.readouterr().out
    assert list((board / "digits-content-lr0.01").rglob("events*")) == untouched
    cell = board / "digits-positional-lr0.001"
    assert curve(cell / "mean", "seeds") == {1: 2, 2: 2, 3: 1}
    assert curve(cell / "mean+std", "train/loss").keys() == {1, 2}
    assert len(list((cell / "mean").iterdir())) == 1


@pytest.mark.slow
def test_a_running_tensorboard_shows_them(tmp_path: Path) -> None:
    fill(tmp_path)
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "vitpa.cli", *words(tmp_path), "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()) is not None or process.poll() is not None)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found, log.read_text()

        def ask(path: str, question: object = None) -> Any:
            data = None if question is None else json.dumps(question).encode()
            request = urllib.request.Request(f"{found[0]}/data/{path}", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.load(answer)

        wait_for(lambda: "digits-content-lr0.01/mean" in ask("runs"), poll_s=0.3)
        scalars = "plugin/scalars/scalars?tag=val/top1&run=digits-content-lr0.01/mean"
        assert ask(scalars)[0][1:] == [4, pytest.approx(0.6)]
        charts = [chart for category in ask("plugin/custom_scalars/layout")["category"] for chart in category["chart"]]
        (series,) = next(chart["margin"]["series"] for chart in charts if chart["title"] == "train/loss")
        assert series == {"value": "train/loss", "lower": "band/train/loss/lower", "upper": "band/train/loss/upper"}
        statuses = ["STATUS_SUCCESS", "STATUS_RUNNING"]
        columns = [{"hparam": name, "includeInResult": True} for name in ("attention", "optim.lr")]
        asked = {"experimentName": "", "allowedStatuses": statuses, "colParams": columns, "startIndex": 0, "sliceSize": 9}
        rows = ask("plugin/hparams/session_groups", asked)["sessionGroups"]
        final = {
            (row["hparams"]["attention"], row["hparams"]["optim.lr"]): value["value"]
            for row in rows
            for value in row["metricValues"]
            if value["name"]["tag"] == "final/top1_mean"
        }
        assert final == {("content", 0.001): pytest.approx(0.6), ("content", 0.01): pytest.approx(0.6)}
        assert len(rows) == 4
        assert "digits-content-lr0.01" in {row["name"] for row in rows}, "and no digest"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.slow
def test_tensorboard_ends_with_its_command(tmp_path: Path) -> None:
    fill(tmp_path)
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vitpa.cli", *words(tmp_path), "--port", "0"], stdout=file, stderr=file
        )
    try:
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()) is not None or process.poll() is not None)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found, log.read_text()
    finally:
        process.terminate()
        code = process.wait(30)

    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", int(found[1]))), "nobody listens any more"
    assert code == 128 + signal.SIGTERM
