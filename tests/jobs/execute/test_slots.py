"""Slots: at most so many holders, dead holders replaced once, slots of several GPUs."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest

from jobs.execute.slots import Slot, take_slot
from tests.support.waiting import wait_for
from vitpa.records import ProcessId, write_json

DEAD = ProcessId.mine().model_copy(update={"start_ticks": 1})


def slots(*units: list[str]) -> list[Slot]:
    return [Slot(units=names, gpus=[]) for names in units]


def records(root: Path, unit: str) -> Path:
    return root / "slots" / socket.gethostname() / unit


def occupy(root: Path, unit: str, holder: ProcessId) -> None:
    records(root, unit).mkdir(parents=True)
    write_json(records(root, unit) / "000001.json", {"process": holder.model_dump()})


def test_a_free_slot_is_taken_and_then_not_free(tmp_path: Path) -> None:
    both = slots(["cpu0"], ["cpu1"])
    assert take_slot(tmp_path, both, lambda: True) == both[0]
    assert take_slot(tmp_path, both, lambda: True) == both[1]
    answers = iter([True, False])
    assert take_slot(tmp_path, both, lambda: next(answers)) is None, "it gives up when nothing is left to do"


def test_the_slot_of_a_dead_holder_is_free(tmp_path: Path) -> None:
    occupy(tmp_path, "cpu0", DEAD)
    assert take_slot(tmp_path, slots(["cpu0"]), lambda: True) is not None
    assert (records(tmp_path, "cpu0") / "000002.json").is_file()


@pytest.mark.parametrize("record", ["{}", '{"process": 1', '{"process": {}}'])
def test_a_damaged_record_holds_nothing(tmp_path: Path, record: str) -> None:
    records(tmp_path, "cpu0").mkdir(parents=True)
    (records(tmp_path, "cpu0") / "000001.json").write_text(record)
    assert take_slot(tmp_path, slots(["cpu0"]), lambda: True) is not None


def test_several_units_are_taken_together(tmp_path: Path) -> None:
    occupy(tmp_path, "gpu0.0", ProcessId.mine())
    groups = slots(["gpu0.0", "gpu1.0"], ["gpu2.0", "gpu3.0"])
    assert take_slot(tmp_path, groups, lambda: True) == groups[1]
    assert not records(tmp_path, "gpu1.0").exists()


def contend(root: Path, start: multiprocessing.synchronize.Barrier, taken: multiprocessing.Queue[bool]) -> None:
    start.wait()
    tries = iter([True, False])
    taken.put(take_slot(root, slots(["cpu0"]), lambda: next(tries)) is not None)
    start.wait()  # nobody ends, and so frees the slot, before all have tried


def test_of_many_exactly_one_replaces_a_dead_holder(tmp_path: Path) -> None:
    occupy(tmp_path, "cpu0", DEAD)
    fork = multiprocessing.get_context("fork")
    start, taken = fork.Barrier(8), fork.Queue()
    processes = [fork.Process(target=contend, args=(tmp_path, start, taken)) for _ in range(8)]
    for process in processes:
        process.start()
    wait_for(lambda: not any(process.is_alive() for process in processes))
    assert sorted(taken.get() for _ in processes) == [False] * 7 + [True]
