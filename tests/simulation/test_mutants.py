"""Bugs put into the orchestration on purpose: the simulation finds each of them (`--mutants`; otherwise some quick ones)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.simulation.mutants import MUTANTS, Mutant, finding, mutated

QUICK = 2  # found in the first histories


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutant" in metafunc.fixturenames:
        chosen = MUTANTS if metafunc.config.getoption("--mutants") else MUTANTS[:QUICK]
        metafunc.parametrize("mutant", chosen, ids=[mutant.name for mutant in chosen])


@pytest.mark.slow
def test_the_simulation_finds_it(mutant: Mutant, tmp_path: Path) -> None:
    found = finding(mutant, tmp_path)
    assert found
    print(found)


def test_every_bug_can_still_be_put_in(tmp_path: Path) -> None:
    for number, mutant in enumerate(MUTANTS):
        assert mutated(mutant, tmp_path / str(number)).is_dir()
