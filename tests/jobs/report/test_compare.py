"""Comparisons along an axis, pivots, and which cell is best, against scipy.stats and calculations by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from scipy import stats

from jobs.report.collect import CollectedTable, collect
from jobs.report.compare import Scores, best_cells, comparisons
from jobs.report.document.verdict import compared
from jobs.report.tables import latex, markdown, write_report
from jobs.state import StateReader
from jobs.sweep import Sweep, SweepDir, load_sweep
from tests.support.jobs_sweeps import make_sweep, write_result
from vitpa.cli import main
from vitpa.statistics import holm, paired_p

RATES = {"0.001": [0.60, 0.62, 0.61], "0.002": [0.70, 0.73, 0.71], "0.003": [0.705, 0.728, 0.715]}
POINTS = {"content": 0.0, "positional": 0.011}  # better by so much, but for seed 2
PIVOT = "augment.permute_block_px", "optim.lr"


def top1(attention: str, rate: str, seed: int) -> float:
    return RATES[rate][seed] + POINTS[attention] * (seed != 2)


def filled(root: Path) -> Sweep:
    """3 rates x 2 attentions x 3 seeds."""
    sweep = make_sweep(root, seeds=3, axes={"optim.lr": [float(rate) for rate in RATES]})
    for run in sweep.runs:
        write_result(root, run, val_top1=top1(run.attention, run.settings["optim.lr"], run.seed))
    return sweep


def table_of(root: Path, sweep: Sweep, **options: str | tuple[str, str]) -> CollectedTable:
    return collect(sweep, StateReader(root).states(sweep.runs), root, **options)  # type: ignore[arg-type]


def test_holm_by_hand() -> None:
    """0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.9 x 1 = 0.9; none falls below the one before it."""
    assert holm([0.03, 0.01, None, 0.9, 0.02]) == pytest.approx([0.06, 0.04, None, 0.9, 0.06])
    assert holm([0.02, 0.018]) == pytest.approx([0.036, 0.036])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_p_is_that_of_scipy() -> None:
    first, second = [0.6, 0.62, 0.65], [0.61, 0.66, 0.67]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert paired_p(differences) == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert paired_p([0.1]) is None
    assert paired_p([0.0, 0.0]) == 1.0
    assert paired_p([0.5, 0.5]) == stats.binomtest(2, 2).pvalue == 0.5
    assert paired_p([0.9 - 0.6, 0.7 - 0.4, 0.8 - 0.5]) == stats.binomtest(3, 3).pvalue  # the same but for rounding


def test_every_two_values_of_an_axis_are_compared(tmp_path: Path) -> None:
    table = table_of(tmp_path, filled(tmp_path), compare="lr")
    assert table.compared == "optim.lr"
    pairs = [("0.001", "0.002"), ("0.001", "0.003"), ("0.002", "0.003")]
    expected = [(attention, *pair) for attention in POINTS for pair in pairs]
    assert [(each.common["attention"], each.first, each.second) for each in table.comparisons] == expected
    p_values = []
    for each, (attention, first, second) in zip(table.comparisons, expected, strict=True):
        a, b = ([top1(attention, rate, seed) for seed in range(3)] for rate in (first, second))
        test = stats.ttest_rel(b, a)
        p_values.append(test.pvalue)
        assert (each.seeds, each.wanted) == ([0, 1, 2], 3)
        assert each.val_top1.mean == pytest.approx(sum(b) / 3 - sum(a) / 3)
        assert each.val_top1.ci95_low == pytest.approx(test.confidence_interval().low)
        assert each.p == pytest.approx(test.pvalue)
    assert [each.p_holm for each in table.comparisons] == pytest.approx(holm(p_values))
    text = markdown(table)
    assert re.search(r"^\| digits +\| content +\| 0\.002 - 0\.001 +\| \+10\.33 ± 0\.58 ", text, re.M)
    assert "corrected for all comparisons of the table (Holm)" in text
    along_attention = table_of(tmp_path, filled(tmp_path), compare="attention")
    found = [(each.common, each.first, each.second) for each in along_attention.comparisons]
    assert found == [({"optim.lr": rate}, "content", "positional") for rate in RATES]


@pytest.mark.parametrize("base", ["0.002", "2e-3"])
def test_each_other_value_is_compared_with_one(tmp_path: Path, base: str) -> None:
    table = table_of(tmp_path, filled(tmp_path), compare=f"lr={base}")
    every_two = table_of(tmp_path, filled(tmp_path), compare="lr").comparisons
    expected = [(attention, "0.002", other) for attention in POINTS for other in ("0.001", "0.003")]
    assert [(each.common["attention"], each.first, each.second) for each in table.comparisons] == expected
    up, down = (
        next(each for each in found if {each.first, each.second} == {"0.001", "0.002"})
        for found in (every_two, table.comparisons)
    )
    assert down.val_top1.mean == pytest.approx(-(up.val_top1.mean or 0))
    assert down.p == up.p
    assert [each.p_holm for each in table.comparisons] == pytest.approx(holm([each.p for each in table.comparisons]))
    assert {each.first for each in table_of(tmp_path, filled(tmp_path), compare="attention=positional").comparisons} == {
        "positional"
    }


def test_seeds_that_only_one_has_are_left_out(tmp_path: Path) -> None:
    sweep = filled(tmp_path)
    next(run for run in sweep.runs if run.label == "digits-content-lr0.002-s1").directory(tmp_path).result_json.unlink()
    first, _, third, *_ = table_of(tmp_path, sweep, compare="optim.lr").comparisons
    assert (first.seeds, first.wanted) == ([0, 2], 3)
    assert first.val_top1.mean == pytest.approx(0.10)
    assert third.val_top1.n == 2


def test_best_cell_is_named_with_those_that_it_cannot_be_told_apart_from(tmp_path: Path) -> None:
    table = table_of(tmp_path, filled(tmp_path))
    (best,) = table.best
    cells = [(attention, rate) for attention in POINTS for rate in RATES]
    means = {cell: sum(top1(*cell, seed) for seed in range(3)) / 3 for cell in cells}
    first = max(means, key=lambda cell: means[cell])
    assert best.cell == f"{first[0]} lr={first[1]}"
    assert best.mean == pytest.approx(means[first])
    pairs = [(a, b) for index, a in enumerate(cells) for b in cells[index + 1 :]]
    p_values = [stats.ttest_rel(*([top1(*cell, seed) for seed in range(3)] for cell in pair)).pvalue for pair in pairs]
    corrected = holm(p_values)
    alike = [pair for pair, p in zip(pairs, corrected, strict=True) if first in pair and p is not None and p >= 0.05]
    assert len(best.alike) == len(alike) > 0
    assert f"Best of digits: {best.cell}, 72.33 %; better than {5 - len(alike)} of 5 other cells" in markdown(table)
    assert not table_of(tmp_path / "plain", make_sweep(tmp_path / "plain")).best, "two attentions are compared anyway"


def test_clear_differences_are_told() -> None:
    seeds = range(6)
    noise = [0.001, -0.001, 0.002, -0.002, 0.0005, -0.0005]
    cells = [
        Scores("digits", {"attention": "content", "optim.lr": rate}, {seed: mean + noise[seed] * sign for seed in seeds})
        for rate, mean, sign in (("1", 0.5, 1), ("2", 0.6, -1), ("3", 0.7, 1))
    ]
    (best,) = best_cells(cells)
    assert (best.cell, best.others, best.alike) == ("content lr=3", 2, [])
    assert all(each.p_holm is not None and each.p_holm < 0.05 for each in comparisons(cells, "optim.lr"))


def test_best_is_better_only_where_the_seeds_that_both_have_say_so(tmp_path: Path) -> None:
    """The mean of a cell without its worse seeds is the highest, and it is worse on each seed that both have."""
    sweep = make_sweep(tmp_path, seeds=5, axes={"optim.lr": [1e-3, 2e-3]})
    top1 = {"0.001": [0.90, 0.91, 0.92], "0.002": [0.92, 0.93, 0.941, 0.70, 0.71]}
    for run in sweep.runs:
        if run.attention == "content" and run.seed < len(top1[run.settings["optim.lr"]]):
            write_result(tmp_path, run, val_top1=top1[run.settings["optim.lr"]][run.seed])
    (best,) = (table := table_of(tmp_path, sweep)).best
    assert (best.cell, best.others, best.alike) == ("content lr=0.001", 1, [])
    assert (best.above, best.uneven) == (["content lr=0.002"], True)
    text = "Best of digits: content lr=0.001, 91.00 %; better than 0 of 1 other cells (paired t test by seed, 5 %, Holm's "
    text += "correction for all pairs); worse, on the seeds that both have, than: content lr=0.002. The cells have results of "
    assert text + "different seeds: means are of all that each has, tests of those that both have." in markdown(table)


def test_a_small_difference_that_the_test_tells_from_none_is_shown(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=4, axes={"optim.lr": [1e-3, 2e-3]})
    for run in sweep.runs:
        lower = (4e-5 if run.seed % 2 else 3e-5) * (run.settings["optim.lr"] == "0.002")
        write_result(tmp_path, run, val_top1=0.5 + 0.01 * run.seed - lower)
    text = markdown(table_of(tmp_path, sweep, compare="lr"))
    assert re.search(r"\| 0\.002 - 0\.001 +\| -0\.0035 ± 0\.0006 +\| \[-0\.0044, -0\.0026\] +\| 0\.00", text)


def with_networks(root: Path, *kinds: str) -> Sweep:
    """Both attentions of a ViT and networks without attention, 3 seeds, two rates."""
    make_sweep(root, seeds=3)
    path = root / "small.yaml"
    axes = {"model.kind": list(kinds), "optim.lr": [1e-3, 2e-3]}
    exclude = {"model.kind": [kind for kind in kinds if kind != "vit"], "attention": "positional"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "axes": axes, "exclude": [exclude]}))
    sweep = load_sweep(str(path), root)
    for run in sweep.runs:
        top1 = {"content": 0.5, "positional": 0.6}.get(run.config.network_name, 0.8 + 0.001 * run.seed**2)
        write_result(root, run, val_top1=top1 + 0.01 * run.seed)
    return sweep


def test_a_network_without_attention_is_compared_with_each_attention(tmp_path: Path) -> None:
    sweep = with_networks(tmp_path, "vit", "resnet18")
    table = table_of(tmp_path, sweep, compare="kind")
    found = [(dict(each.common), each.first, each.second, each.seeds) for each in table.comparisons]
    assert found == [
        ({"attention": attention, "optim.lr": rate}, "vit", "resnet18", [0, 1, 2])
        for attention in ("content", "positional")
        for rate in ("0.001", "0.002")
    ]
    means = [each.val_top1.mean for each in table.comparisons]
    assert means == pytest.approx([0.3 + 0.005 / 3, 0.3 + 0.005 / 3, 0.2 + 0.005 / 3, 0.2 + 0.005 / 3])
    assert re.search(r"^\| digits +\| positional +\| 0\.001 +\| resnet18 - vit +\| \+20\.17 ", markdown(table), re.M)
    sentences = [each.text for each in compared(table)]
    assert sentences[2].startswith("digits positional lr=0.001: resnet18 is better than vit by 20.17 points")
    turned = table_of(tmp_path, sweep, compare="kind=resnet18")
    assert [(dict(each.common), each.first, each.second) for each in turned.comparisons] == [
        (common, second, first) for common, first, second, _ in found
    ]
    assert compared(turned)[2].text.startswith("digits positional lr=0.001: resnet18 is better than vit by 20.17 points")
    along_rate = [(each.common["attention"], each.first) for each in table_of(tmp_path, sweep, compare="lr").comparisons]
    assert along_rate == [("content", "0.001"), ("positional", "0.001"), ("resnet18", "0.001")]
    assert "No comparison" not in markdown(table)


def test_two_networks_without_attention_are_compared(tmp_path: Path) -> None:
    cells = [Scores("digits", {"attention": kind, "model.kind": kind}, {0: 0.5, 1: 0.6}) for kind in ("resnet18", "resnet50")]
    (its,) = comparisons(cells, "model.kind")
    assert (its.common, its.first, its.second, its.seeds) == ({"attention": "-"}, "resnet18", "resnet50", [0, 1])


def test_that_nothing_is_compared_is_said(tmp_path: Path) -> None:
    sweep = filled(tmp_path)
    states = StateReader(tmp_path).states([run for run in sweep.runs if run.config.optim.lr == 1e-3])
    text = markdown(collect(sweep, states, tmp_path, compare="lr"))
    assert "\nNo comparison along optim.lr: all cells have 0.001.\n" in text
    states = [state for state in StateReader(tmp_path).states(sweep.runs) if state.run.seed == 0][1:3]
    text = markdown(collect(sweep, states, tmp_path, compare="lr"))
    assert "\nNo comparison along optim.lr: no two cells of a data set differ in it alone.\n" in text


def test_pivot_is_a_table_along_two_axes(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, seeds=2, axes={"augment.permute_block_px": [0, 4], "optim.lr": [1e-3, 2e-3]})
    for number, run in enumerate(sweep.runs):
        if run.label != "digits-positional-permute_block_px4-lr0.001-s1":
            write_result(tmp_path, run, val_top1=0.5 + 0.01 * number)
    table = table_of(tmp_path, sweep, pivot=PIVOT)
    text = markdown(table)
    assert re.search(r"^\| digits attention=content: permute_block_px +\| lr=0\.001 +\| lr=0\.002 +\|$", text, re.M)
    assert re.search(r"^\| 0 +\| 54\.00 ± 5\.66 +\| 56\.00 ± 5\.66 +\|$", text, re.M)
    assert re.search(r"^\| 4 +\| 55\.00 \(1/2 incomplete\) +\| 61\.00 ± 5\.66 +\|$", text, re.M)
    assert latex(table).count(r"\begin{tabular}") == 4
    write_report(table_of(tmp_path, sweep, pivot=PIVOT, compare="lr"), tmp_path / "report")
    document = json.loads((tmp_path / "report/report.json").read_text())
    assert document["compared"] == "optim.lr"
    assert len(document["comparisons"]) == 4
    assert document["best"][0]["others"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--compare depth", "depth: the sweep has no such axis; there is attention, optim.lr"),
        ("--compare lr=4e-3", "--compare optim.lr=4e-3: no run has that value; there is 0.001, 0.002, 0.003"),
        ("--compare lr=", "--compare optim.lr=: no run has that value"),
        ("--pivot lr depth", "depth: the sweep has no such axis"),
        ("--pivot lr optim.lr", "--pivot optim.lr twice: name two axes, one for the rows and one for the columns"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    SweepDir(tmp_path, "small").record(filled(tmp_path))
    report = SweepDir(tmp_path, "small").report
    report.mkdir()
    (report / "table.md").touch()
    assert main(["sweep", "collect", str(tmp_path / "small.yaml"), "--root", str(tmp_path), *words.split()]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in report.iterdir()} == {"table.md"}, "the report stays where it is"


def test_command_prints_comparison_and_pivot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SweepDir(tmp_path, "small").record(filled(tmp_path))
    words = ["--compare", "lr", "--pivot", "lr", "attention"]
    assert main(["sweep", "collect", str(tmp_path / "small.yaml"), "--root", str(tmp_path), *words]) == 0
    out = capsys.readouterr().out
    assert "lr, difference in points" in out
    assert re.search(r"^\| digits: lr +\| attention=content +\| attention=positional +\|$", out, re.M)
