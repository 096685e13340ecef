"""Bugs put into the orchestration on purpose: the simulation finds each of them (`--mutants`; otherwise a quick one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.repository import ROOT
from tests.support.simulation.mutants import MUTANTS, Mutant, finding

QUICK = 1  # found in the first history


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutant" in metafunc.fixturenames:
        chosen = MUTANTS if metafunc.config.getoption("--mutants") else MUTANTS[:QUICK]
        metafunc.parametrize("mutant", chosen, ids=[mutant.name for mutant in chosen])


@pytest.mark.slow
def test_the_simulation_finds_it(mutant: Mutant, tmp_path: Path) -> None:
    found = finding(mutant, tmp_path)
    assert found
    print(found)


def test_every_bug_can_still_be_put_in() -> None:
    assert all(mutant.text in (ROOT / mutant.path).read_text() for mutant in MUTANTS)
