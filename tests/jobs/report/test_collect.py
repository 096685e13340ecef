"""Statistics over seeds against a calculation by hand, and results that must not be averaged."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import SweepError
from jobs.report.collect import CollectedTable, collect
from jobs.report.status import held_out, row_of
from jobs.report.tables import latex, markdown, write_report
from jobs.state import StateReader
from jobs.sweep import Reference, Sweep, SweepDir
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.cli import main
from vitpa.documents import to_yaml
from vitpa.metrics_file import to_line
from vitpa.records import with_checksum, write_json
from vitpa.statistics import Estimate

CONTENT = [0.90, 0.92, 0.94]
POSITIONAL = [0.88, 0.91, 0.89]


def fill(root: Path) -> Sweep:
    """Three seeds of both attentions, all done."""
    sweep = make_sweep(root, seeds=3)
    for run in sweep.runs:
        write_result(root, run, val_top1=(CONTENT if run.attention == "content" else POSITIONAL)[run.seed])
    return sweep


def table_of(root: Path, sweep: Sweep, *, allow_mixed: bool = False) -> CollectedTable:
    return collect(sweep, StateReader(root).states(sweep.runs), root, allow_mixed=allow_mixed)


def test_equal_to_a_hand_calculation(tmp_path: Path) -> None:
    """By hand. Student's t, 97.5 %, 2 degrees of freedom: 4.302653; sqrt(3) = 1.7320508.

    content     0.90 0.92 0.94: mean 2.76 / 3 = 0.92; squares 0.0004 + 0 + 0.0004 = 0.0008; / 2 = 0.0004; std 0.02;
                half width 4.302653 * 0.02 / 1.7320508 = 0.0496828
    positional  0.88 0.91 0.89: mean 2.68 / 3 = 0.8933333; squares 0.000177778 + 0.000277778 + 0.000011111 = 0.000466667;
                / 2 = 0.000233333; std 0.0152753; half width 4.302653 * 0.0152753 / 1.7320508 = 0.0379459
    differences 0.02 0.01 0.05: mean 0.08 / 3 = 0.0266667; squares 0.000044444 + 0.000277778 + 0.000544444 = 0.000866667;
                / 2 = 0.000433333; std 0.0208167; half width 4.302653 * 0.0208167 / 1.7320508 = 0.0517116
    """
    table = table_of(tmp_path, fill(tmp_path))
    content, positional = table.cells
    (difference,) = table.differences
    for estimate, mean, std, half in (
        (content.val_top1, 0.92, 0.02, 0.0496828),
        (positional.val_top1, 0.8933333, 0.0152753, 0.0379459),
        (difference.val_top1, 0.0266667, 0.0208167, 0.0517116),
    ):
        assert estimate.n == 3
        assert estimate.mean == pytest.approx(mean, abs=1e-7)
        assert estimate.std == pytest.approx(std, abs=1e-7)
        assert estimate.ci95_low == pytest.approx(mean - half, abs=2e-7)
        assert estimate.ci95_high == pytest.approx(mean + half, abs=2e-7)
    assert content.gpu_hours == pytest.approx(0.75)
    assert table.complete


def test_a_run_that_averages_its_weights_is_judged_by_the_average(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, overrides={"train.ema_decay": 0.999})
    for run in sweep.runs:
        ema = {"ema_val_top1": 0.8 + 0.1 * run.seed, "ema_val_top5": 0.95, "ema_val_loss": 0.5}
        write_result(tmp_path, run, val_top1=0.1, **ema)
    table = table_of(tmp_path, sweep)
    assert [cell.val_top1.mean for cell in table.cells] == [pytest.approx(0.85)] * 2
    write_report(table, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report" / "runs.csv").read_text().splitlines()))
    assert sorted(float(row["val_top1_fraction"]) for row in rows) == [0.8, 0.8, 0.9, 0.9]
    assert {row["val_loss"] for row in rows} == {"0.5"}
    assert row_of(StateReader(tmp_path).state(sweep.runs[0]), tmp_path)["val_top1"] == 0.8


def test_energy_is_that_of_the_runs_where_all_of_it_was_counted(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2)
    for run in sweep.runs:
        counted = {"energy_j": 1.8e6 * (1 + run.seed)} if run.attention == "content" or run.seed else {}
        write_result(tmp_path, run, **counted)
    table = table_of(tmp_path, sweep)
    assert [cell.energy_kwh for cell in table.cells] == [pytest.approx(1.5), None]
    text = markdown(table)
    assert re.search(r"\| GPU-hours \| kWh \(GPUs\) \|", text)
    assert re.search(r"\| content .*\| 1\.5 +\|", text)
    write_report(table, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report" / "runs.csv").read_text().splitlines()))
    energy = {(row["attention"], row["seed"]): row["energy_j"] for row in rows}
    assert energy == {
        ("content", "0"): "1800000.0",
        ("content", "1"): "3600000.0",
        ("positional", "0"): "",
        ("positional", "1"): "3600000.0",
    }
    assert "kWh" not in markdown(table_of(tmp_path, fill(tmp_path)))


def test_each_point_of_the_axes_has_a_mean_and_a_difference(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, axes={"augment.permute_block_px": [0, 4], "model.depth": [1, 2]})
    top1 = {}
    for number, run in enumerate(sweep.runs):
        top1[run.label] = 0.5 + 0.01 * number
        write_result(tmp_path, run, val_top1=top1[run.label])
    table = table_of(tmp_path, sweep)
    points = [(block, depth) for block in "04" for depth in "12"]
    settings = [{"augment.permute_block_px": block, "model.depth": depth} for block, depth in points]
    assert [(cell.network, cell.settings) for cell in table.cells] == [
        (attention, each) for attention in ("content", "positional") for each in settings
    ]
    assert [difference.settings for difference in table.differences] == settings
    for cell in table.cells:
        name = f"digits-{cell.attention}-permute_block_px{cell.settings['augment.permute_block_px']}"
        seeds = [top1[f"{name}-depth{cell.settings['model.depth']}-s{seed}"] for seed in (0, 1)]
        assert (cell.wanted, cell.val_top1) == (2, Estimate.of(seeds))
    assert all(difference.val_top1.mean == pytest.approx(-0.01) for difference in table.differences)
    text = markdown(table)
    assert re.search(r"^\| data set +\| attention +\| permute_block_px +\| depth +\| val top-1 %", text, re.M)
    assert re.search(r"^\| digits +\| positional +\| 4 +\| 2 +\| 61\.00 ± 5\.66 ", text, re.M)
    write_report(table, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/table.csv").read_text().splitlines()))
    assert [(row["augment.permute_block_px"], row["model.depth"]) for row in rows] == points * 3
    rows = list(csv.DictReader((tmp_path / "report/runs.csv").read_text().splitlines()))
    assert [row["model.depth"] for row in rows] == [run.settings["model.depth"] for run in sweep.runs]
    document = json.loads((tmp_path / "report/report.json").read_text())
    assert document["results"][0]["settings"] == document["cells"][0]["settings"] == settings[0]


def test_pairs_are_by_seed(tmp_path: Path) -> None:
    """Without content's seed 2: differences 0.02 and 0.01 over seeds 0 and 1, mean 0.015, std 0.01 / sqrt(2) = 0.00707107."""
    sweep = fill(tmp_path)
    sweep.runs[4].directory(tmp_path).result_json.unlink()
    table = table_of(tmp_path, sweep)
    (difference,) = table.differences
    assert (difference.seeds, difference.wanted, difference.val_top1.n) == ([0, 1], 3, 2)
    assert difference.val_top1.mean == pytest.approx(0.015)
    assert difference.val_top1.std == pytest.approx(0.00707107, abs=1e-8)
    assert not table.complete
    text = markdown(table)
    assert "2/3 incomplete" in text
    assert "91.00 ± 1.41" in text
    assert "INCOMPLETE: 1 runs are not in these means:\n- digits-content-s2: missing" in text


def test_one_seed_has_no_deviation() -> None:
    assert Estimate.of([0.5]) == Estimate(1, 0.5, None, None, None)
    assert Estimate.of([]) == Estimate(0, None, None, None, None)


def test_tables_are_in_per_cent_and_files_in_fractions(tmp_path: Path) -> None:
    sweep = fill(tmp_path)
    reference = {"digits": {"content": Reference(val_top1=0.9876, source="somebody, somewhere")}}
    sweep = Sweep(sweep.config.model_copy(update={"reference": reference}), sweep.runs)
    table = table_of(tmp_path, sweep)
    write_report(table, tmp_path / "report")
    text = (tmp_path / "report/table.md").read_text()
    assert "| digits   | content    | 92.00 ± 2.00 | [87.03, 96.97] | 3/3   | 98.76       | 0.75      |" in text
    assert "| digits   | +2.67 ± 2.08                 | [-2.50, +7.84] | 3/3           |" in text
    assert "Reference digits content: somebody, somewhere." in text
    assert r"digits & content & 92.00 $\pm$ 2.00 & [87.03, 96.97] & 3/3 & 98.76 & 0.75 \\" in latex(table)
    with (tmp_path / "report/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["quantity"] for row in rows] == ["content", "positional", "content - positional, paired by seed"]
    assert float(rows[0]["val_top1_mean_fraction"]) == pytest.approx(0.92)
    assert rows[0]["code_version"] == "g1"
    assert float(rows[0]["reference_val_top1_fraction"]) == 0.9876
    with (tmp_path / "report/runs.csv").open() as file:
        assert [float(row["val_top1_fraction"]) for row in csv.DictReader(file)][:2] == [0.90, 0.88]
    document = json.loads((tmp_path / "report/report.json").read_text())
    assert document["complete"] is True
    assert document["cells"][0]["val_top1"]["n"] == 3


@pytest.mark.parametrize("broken", ["truncated", "nan", "signature"])
def test_broken_results_are_listed_and_never_averaged(tmp_path: Path, broken: str) -> None:
    sweep = fill(tmp_path)
    run = sweep.runs[0]
    path = run.directory(tmp_path).result_json
    if broken == "truncated":
        path.write_text(path.read_text()[:-40])
    else:
        values = {"nan": ("val_top1", float("nan")), "signature": ("signature", "f" * 16)}
        write_result(tmp_path, run, **dict([values[broken]]))
    table = table_of(tmp_path, sweep)
    assert table.cells[0].val_top1.mean == pytest.approx(0.93)
    assert table.cells[0].seeds == [1, 2]
    (entry,) = table.absent
    assert (entry["run"], entry["state"]) == ("digits-content-s0", "broken")
    assert str(path) in entry["reason"]
    assert "digits-content-s0: broken (" in markdown(table)


@pytest.mark.parametrize(
    ("values", "name"),
    [({"code_version": "g2"}, "code_version: g1 .*g2"), ({"beton_sha256": {"train": "2" * 64}}, "beton_sha256")],
)
def test_different_code_or_data_is_not_averaged(tmp_path: Path, values: dict[str, object], name: str) -> None:
    sweep = fill(tmp_path)
    write_result(tmp_path, sweep.runs[3], val_top1=0.91, **values)
    with pytest.raises(SweepError, match=rf"digits: runs of different {name}.*\(positional-s1\).*--allow-mixed"):
        table_of(tmp_path, sweep)
    table = table_of(tmp_path, sweep, allow_mixed=True)
    assert table.mixed == ["digits"]
    assert "(mixed)" in markdown(table)
    assert "MIXED" in markdown(table)


@pytest.mark.parametrize(("key", "value"), [("seed", 7), ("attention", "positional"), ("dataset", "cifar10"), ("epochs", 300)])
def test_a_result_that_says_it_is_of_another_run_is_not_averaged(tmp_path: Path, key: str, value: object) -> None:
    sweep = fill(tmp_path)
    write_result(tmp_path, sweep.runs[0], **{"val_top1": 0.1, key: value})  # with the right signature
    table = table_of(tmp_path, sweep)
    assert table.cells[0].val_top1.mean == pytest.approx(0.93)
    assert (table.cells[0].seeds, table.cells[0].wanted) == ([1, 2], 3)
    assert table.differences[0].seeds == [1, 2]
    (entry,) = table.absent
    assert (entry["run"], entry["state"]) == ("digits-content-s0", "broken")
    assert f"says {key} {value}, its configuration " in entry["reason"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("val_top1", 0.99), ("val_top5", 0.99), ("val_loss", 0.1), ("steps", 5), ("val_top1", 0.9000000000000001)],
)
def test_a_result_that_metrics_contradict_is_not_averaged(tmp_path: Path, key: str, value: float) -> None:
    sweep = fill(tmp_path)
    directory = sweep.runs[0].directory(tmp_path)
    directory.result_json.write_text(json.dumps({**json.loads(directory.result_json.read_text()), key: value}))
    table = table_of(tmp_path, sweep)
    assert table.cells[0].seeds == [1, 2]
    (entry,) = table.absent
    assert entry["state"] == "broken"
    name = key.replace("val_", "val/").replace("steps", "step")
    assert f"says {name} {value}, the last evaluation in metrics.jsonl " in entry["reason"]


@pytest.mark.parametrize("damage", ["missing", "zeroed", "empty", "bit", "folder"])
def test_a_result_that_cannot_be_verified_is_not_averaged(tmp_path: Path, damage: str) -> None:
    sweep = fill(tmp_path)
    path = sweep.runs[0].directory(tmp_path).metrics_jsonl
    text = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"zeroed": bytes(len(text)), "empty": b"", "bit": text.replace(b"0.9", b"0.8", 1)}[damage])
    table = table_of(tmp_path, sweep)
    assert table.cells[0].seeds == [1, 2]
    assert "cannot be verified" in table.absent[0]["reason"]


def without_crc(row: dict[str, object]) -> str:
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("write", "damage"),
    [
        (to_line, lambda text: text.replace("1.25", "1.26")),
        (to_line, lambda text: re.sub(r', "crc32": "\w+"', "", text, count=1)),
        (to_line, lambda text: "\0" * text.index("\n") + text[text.index("\n") :]),
        (without_crc, lambda text: text[1:]),
    ],
    ids=["edited", "without CRC", "zeroed", "cut, of an earlier version"],
)
def test_a_curve_with_damaged_lines_is_said(
    tmp_path: Path, write: Callable[[dict[str, object]], str], damage: Callable[[str], str]
) -> None:
    sweep = fill(tmp_path)
    run = sweep.runs[0]
    path = run.directory(tmp_path).metrics_jsonl
    evaluated = json.loads(path.read_text())
    evaluated.pop("crc32")
    rows = "".join(write({"step": step, "epoch": step, "train/loss": 1.25}) for step in (1, 2, 3))
    end = write(evaluated)
    path.write_text(rows + end + '{"step": 5, "ep')
    assert table_of(tmp_path, sweep).damaged == []
    path.write_text(damage(rows) + end)
    table = table_of(tmp_path, sweep)
    (entry,) = table.damaged
    assert entry["run"] == run.label
    assert re.fullmatch(rf"{re.escape(str(path))}: damaged in lines? 1(-3)?", entry["reason"])
    assert table.as_json()["damaged"] == [entry]
    assert "DAMAGED: the curves of these runs have gaps" in markdown(table)
    assert f"- {run.label}: {path}: damaged in line" in markdown(table)
    assert table.complete, "its result was checked"


@pytest.mark.parametrize("changed", [{"code_version": "g3"}, {"beton_sha256": {"train": "9" * 64}}, {"steps_total": 5}])
def test_a_result_that_env_json_contradicts_is_not_averaged(tmp_path: Path, changed: dict[str, object]) -> None:
    sweep = fill(tmp_path)
    directory = sweep.runs[0].directory(tmp_path)
    document = {"code_version": "g1", "beton_sha256": {"train": "0" * 64, "val": "1" * 64}, "steps_total": 4}
    write_json(directory.env_json, document)
    assert not table_of(tmp_path, sweep).absent
    write_json(directory.env_json, {**document, **changed})
    (entry,) = table_of(tmp_path, sweep).absent
    assert entry["state"] == "broken"
    assert f"says {next(iter(changed))} " in entry["reason"]


def test_config_yaml_that_is_another_experiment_is_broken(tmp_path: Path) -> None:
    sweep = fill(tmp_path)
    run = sweep.runs[0]
    path = run.directory(tmp_path).config_yaml
    text = to_yaml(run.config.model_dump(mode="json"))
    path.write_text(text)
    write_result(tmp_path, run, val_top1=0.9, config_sha256=hashlib.sha256(text.encode()).hexdigest())
    for record in (run.directory(tmp_path).result_json, run.directory(tmp_path).env_json):
        write_json(record, with_checksum(json.loads(record.read_text())))
    path.write_text("# by me\n" + text)
    assert not table_of(tmp_path, sweep).absent
    path.write_text(text.replace("epochs: 4", "epochs: 5"))
    (entry,) = table_of(tmp_path, sweep).absent
    assert (entry["state"], "it is another experiment" in entry["reason"]) == ("broken", True)
    path.unlink()
    assert table_of(tmp_path, sweep).absent[0]["state"] == "broken"


def test_data_that_differ_in_the_last_digit_are_different(tmp_path: Path) -> None:
    sweep = fill(tmp_path)
    other = {"train": "0" * 63 + "1", "val": "1" * 64}
    write_result(tmp_path, sweep.runs[0], val_top1=0.9, beton_sha256=other)
    with pytest.raises(SweepError, match=r"different beton_sha256: train:0{63}1 .*train:0{64} "):
        table_of(tmp_path, sweep)
    write_result(tmp_path, sweep.runs[0], val_top1=0.9)
    assert "Data digits: train:000000000000 val:111111111111." in markdown(table_of(tmp_path, sweep))


def test_held_out_accuracies_are_named_and_have_no_reference(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, overrides={"train.holdout": 0.1})
    reference = {"digits": {"content": Reference(val_top1=0.9, source="a paper")}}
    sweep = replace(sweep, config=sweep.config.model_copy(update={"reference": reference}))
    for run in sweep.runs:
        write_result(tmp_path, run, val_top1=0.5)
    table = table_of(tmp_path, sweep)
    assert {cell.evaluated_on for cell in table.cells} == {"held-out 10 % of train"}
    assert all(cell.reference_val_top1 is None for cell in table.cells)
    text = markdown(table)
    assert "| held-out 10 % of train, top-1 % |" in text
    assert "val top-1" not in text
    assert "HELD OUT: digits was evaluated on held-out 10 % of train, not on val; no reference is of these images." in text
    write_report(table, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/table.csv").read_text().splitlines()))
    assert {row["evaluated_on"] for row in rows} == {"held-out 10 % of train"}, "differences, too"
    runs = list(csv.DictReader((tmp_path / "report/runs.csv").read_text().splitlines()))
    assert {row["evaluated_on"] for row in runs} == {"held-out 10 % of train"}
    states = StateReader(tmp_path).states(sweep.runs)
    assert {row_of(state, tmp_path)["evaluated_on"] for state in states} == {"held-out 10 % of train"}
    assert held_out(states) == ["digits: evaluated on held-out 10 % of train, not on val"]


def test_a_table_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a sweep that belongs to somebody else."""
    sweep = fill(tmp_path)
    SweepDir(tmp_path, "small").record(sweep)
    report = SweepDir(tmp_path, "small").report
    report.touch()
    assert main(["sweep", "collect", f"{tmp_path}/small.yaml", "--root", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "| digits   | content    | 92.00 ± 2.00 |" in printed.out
    assert f"{report}/" in printed.err
