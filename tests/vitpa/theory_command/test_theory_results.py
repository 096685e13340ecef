"""The README's tables are those of the files in vitpa/theory/results, which are of the default settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.repository import ROOT
from vitpa.theory.experiments import ARMS
from vitpa.theory_command.command import EXPERIMENTS
from vitpa.theory_command.report import interval, per_cent
from vitpa.theory_command.saved import settings_of

README = " ".join((ROOT / "vitpa/theory/README.md").read_text().split())


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"vitpa/theory/results/{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_results_are_those_of_the_defaults(name: str) -> None:
    assert result(name)["settings"] == settings_of(EXPERIMENTS[name][0]())
    assert result(name)["finished"]


def test_the_table_of_figure_4_is_the_files() -> None:
    summary = result("association")["summary"]
    assert len(summary["figure_4"]) == 10
    for row in summary["figure_4"]:
        is_error = row["what"] == "test_error"
        figure = f"{100 * row['figure']:.1f} %" if is_error else f"{row['figure']:.2f}"
        ours = per_cent(row["ours"]) if is_error else interval(row["ours"], digits=2)
        assert f"| {row['figure_step']:,} | {figure} | {ours} | {'yes' if row['agrees'] else 'no'} |" in README
    for text in (
        f"has not moved | {100 * summary['exact_plateau']:.2f} % | {per_cent(summary['plateau'])} |",
        f"(Bayes) | {100 * summary['exact_best']:.2f} % |",
        f"in {summary['associated_seeds']} of 5 seeds, at the figure's step {max(summary['associated_at_figure_step']):,}",
        f"At step {summary['last_figure_step']:,} the test error is {per_cent(summary['last']['test_error'])}",
        f"between sets {interval(summary['last']['association_gap'])}.",
        f"has the error {100 * summary['alternative']['test_error']:.2f} %",
    ):
        assert text in README
    assert summary["alternative"]["overlap_of_top_c_with_own_set"] == 0


def test_the_other_tables_are_the_files() -> None:
    summary = result("gaussian")["summary"]
    for name, key, form in (
        ("test error", "test_error", per_cent),
        ("patches associated", "associated_share", per_cent),
        ("gap within - between", "association_gap", interval),
    ):
        assert f"| {name} | {form(summary['first'][key])} | {form(summary['last'][key])} |" in README
    assert f"under 10 % from step {summary['first_step_under_10_per_cent']:.0f} on" in README
    rows = result("transfer")["summary"]["test_error"]
    assert len(rows) == 9
    for row in rows:
        assert f"| {row['samples']:,} | {' | '.join(per_cent(row[arm]) for arm in ARMS)} |" in README
