"""Runs for the tests of reports: results with learning curves, and what `vitpa analyze` leaves, without a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jobs.sweep import Run, Sweep
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.analysis.findings import MEASURES
from vitpa.analysis.maps_file import SavedMaps, write_maps
from vitpa.metrics_file import to_line
from vitpa.records import write_json

CONTENT = [0.90, 0.92, 0.94]
POSITIONAL = [0.88, 0.91, 0.89]
EPOCHS = 4  # of a curve


def write_curve(root: Path, run: Run, top1: float, epochs: int = EPOCHS) -> None:
    """A row of train and one of val per epoch before the last row, which is that of the result: top-1 rises in equal steps."""
    directory = run.directory(root)
    rows = []
    for epoch in range(1, epochs + 1):
        rows.append({"step": epoch, "epoch": float(epoch), "train/loss": 2 / epoch, "train/top1": top1 * epoch / epochs})
        rows.append({"step": epoch, "epoch": epoch, "val/loss": 3 / epoch, "val/top1": top1 * epoch / epochs, "val/top5": 1.0})
    last = directory.metrics_jsonl.read_text() if directory.metrics_jsonl.exists() else ""
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.metrics_jsonl.write_text("".join(map(to_line, rows[:-1])) + (last or to_line(rows[-1])))


def finish(root: Path, run: Run, top1: float) -> None:
    """A result, with its curve."""
    epochs = run.config.train.epochs
    write_result(root, run, val_top1=top1, epochs=epochs, steps=epochs)
    write_curve(root, run, top1, epochs)


def finished_sweep(root: Path) -> Sweep:
    """Three seeds of both attentions, all done, recorded as submitted; accuracies as above."""
    sweep = make_sweep(root, seeds=3)
    for run in sweep.runs:
        finish(root, run, (CONTENT if run.attention == "content" else POSITIONAL)[run.seed])
    return sweep


def write_analysis(
    root: Path, run: Run, *, side: int = 2, layers: int = 1, heads: int = 2, epochs: tuple[float, ...] = (0, 1, EPOCHS)
) -> SavedMaps:
    """structure.json and maps.npz of a finished run: neighbours more alike with every epoch, attention by a run's own draw."""
    n, permuted = side * side, bool(run.config.augment.permute_block_px)
    rng = np.random.default_rng([run.seed, run.attention == "content"])
    attention = rng.random((len(epochs), layers, heads, n, n)) + 0.01
    similarity = rng.uniform(-1, 1, (len(epochs), n, n))
    result = run.directory(root).result()
    assert result is not None
    maps = SavedMaps(
        epochs=np.array(epochs, dtype=float),
        similarity=((similarity + similarity.transpose(0, 2, 1)) / 2).astype(np.float16),
        attention=(attention / attention.sum(-1, keepdims=True)).astype(np.float16),
        order=np.roll(np.arange(n), 1) if permuted else None,
        weights_sha256=result.weights_sha256,
    )
    folder = run.directory(root).path / "analysis"
    folder.mkdir(exist_ok=True)
    write_maps(folder, maps)
    names = [name for name in MEASURES if "association" not in name]
    findings = [
        {
            "epoch": epoch,
            "measure": name,
            "layer": layer,
            "head": None,
            "value": 0.1 * (epoch + run.seed),
            "initial": 0.1 * run.seed,
            "chance": 0.3,
            "chance_low": 0.2,
            "chance_high": 0.4,
        }
        for epoch in map(float, epochs)
        for name in names
        for layer in (None, 0)
    ]
    document = {
        "format": 1,
        "weights_sha256": result.weights_sha256,
        "grid": side,
        "neighbours": 1,
        "images": None,
        "block": 0,
    }
    write_json(folder / "structure.json", {**document, "findings": findings})
    return maps


def explorer_data(page: str) -> dict[str, list[dict[str, object]]]:
    """The data of the patch explorer in a page."""
    begin = page.index('id="x-data">') + len('id="x-data">')
    found: dict[str, list[dict[str, object]]] = json.loads(page[begin : page.index("</script>", begin)])
    return found
