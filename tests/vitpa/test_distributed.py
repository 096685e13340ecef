"""The processes of one run: their variables are checked, and the others that do not come are named."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import pytest

from vitpa import distributed
from vitpa.arguments import ConfigError


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets torchrun's variables as a text such as RANK=1 WORLD_SIZE=2 says, and no others."""
    for name in (*distributed.TORCHRUN_VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(text: str) -> None:
        for pair in text.split():
            name, _, value = pair.partition("=")
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 1, 0, 1)),
        ("WORLD_SIZE=1", (0, 1, 0, 1)),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", (3, 4, 1, 2)),
    ],
)
def test_torchrun_says_which_process_this_is(variables: Callable[[str], None], text: str, expected: tuple[int, ...]) -> None:
    variables(text)
    assert distributed.processes() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RANK=3 WORLD_SIZE=4", "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a", "MASTER_PORT is not set"),
        ("RANK=3", "RANK=3: there is no such process"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1: there is no such process"),
        ("RANK=x WORLD_SIZE=1", "RANK=x WORLD_SIZE=1: there is no such process"),
        ("RANK=-1", "RANK=-1: there is no such process"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0: there is no such process"),
        ("RANK=", "RANK=: there is no such process"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "there is no such process"),
    ],
)
def test_variables_that_contradict_each_other_are_one_line(variables: Callable[[str], None], text: str, said: str) -> None:
    variables(text)
    with pytest.raises(ConfigError) as error:
        distributed.processes()
    assert said in str(error.value)
    assert "torchrun" in str(error.value)


def test_processes_that_do_not_come_are_named_with_their_address(
    variables: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables(f"RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(ConfigError, match=f"RANK=1 of WORLD_SIZE=2: the other processes do not answer at 127.0.0.1:{port}"):
        distributed.init_process_group("cpu")
