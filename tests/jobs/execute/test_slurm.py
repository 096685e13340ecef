"""What a SLURM job tells the other nodes of it."""

from __future__ import annotations

import socket

import pytest

from jobs.execute.slurm import address_of


def test_node_0_is_found_also_where_its_name_is_no_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, port: object) -> list[object]:
        if name != "node17":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [name]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    launched = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.17"}
    assert address_of("node17", launched) == "node17"
    assert address_of("rack-1-slot-7", launched) == "10.0.0.17"
    assert address_of("rack-1-slot-7", {}) == "rack-1-slot-7"
