"""Faults are a Poisson process that a seed replays, and every kind of them is done."""

import math
from collections import Counter

import pytest

from slurm.chaos.faults import BLOWS
from slurm.chaos.schedule import KINDS, LASTS_S, schedule


def test_a_seed_replays_its_faults() -> None:
    faults = schedule(7, mean_s=60, duration_s=7200)
    assert faults == schedule(7, mean_s=60, duration_s=7200)
    assert faults != schedule(8, mean_s=60, duration_s=7200)
    assert faults[:20] == schedule(7, mean_s=60, duration_s=3600)[:20], "a longer test begins like a shorter one"


def test_a_seed_means_the_same_on_every_machine() -> None:
    first = schedule(1, mean_s=100, duration_s=3600)[0]
    assert first.kind == "trainer killed"
    assert first.at_s == pytest.approx(14.4, abs=0.1)


def test_times_between_faults_are_exponential() -> None:
    times = [fault.at_s for fault in schedule(3, mean_s=10, duration_s=100_000)]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    count = len(gaps)
    mean = sum(gaps) / count
    assert mean == pytest.approx(10, abs=4 * 10 / math.sqrt(count))
    assert sum(gap > 10 for gap in gaps) / count == pytest.approx(math.exp(-1), abs=4 * 0.5 / math.sqrt(count))
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / count) == pytest.approx(10, abs=0.5)


def test_every_ten_faults_have_all_kinds() -> None:
    faults = schedule(5, mean_s=1, duration_s=1000)
    for begin in range(0, len(faults) - 10, 10):
        assert Counter(fault.kind for fault in faults[begin : begin + 10]) == Counter(list(KINDS))
    assert len({tuple(fault.kind for fault in faults[begin : begin + 10]) for begin in range(0, 500, 10)}) > 40


def test_what_is_left_out_does_not_come() -> None:
    kinds = [kind for kind in KINDS if kind != "disk full"]
    assert {fault.kind for fault in schedule(5, mean_s=1, duration_s=100, kinds=kinds)} == set(kinds)
    assert schedule(5, mean_s=1, duration_s=100, kinds=[]) == []


def test_faults_last_as_long_as_their_kind_may() -> None:
    for fault in schedule(5, mean_s=1, duration_s=1000):
        low_s, high_s = LASTS_S.get(fault.kind, (0, 0))
        assert low_s <= fault.lasts_s <= high_s
        assert 0 <= fault.whom < 1


def test_there_is_a_deed_for_each_kind() -> None:
    assert list(BLOWS) == list(KINDS)
    assert len(KINDS) == 10
