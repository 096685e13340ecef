"""The processes of one run: who this one is, and the few things they say to each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from vitpa.arguments import ConfigError

T = TypeVar("T")

TORCHRUN_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # and without it
JOIN_TIMEOUT = timedelta(minutes=10)  # for the other processes to join, and for each exchange with them


@dataclass(frozen=True)
class Group:
    """This process among those that train one run (torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def cpus(self) -> int:
        """The CPUs this process may use: those the scheduler allows, shared among the processes of the node."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """The element-wise minimum of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def broadcast(self, value: T) -> T:
        """The main process's `value` (anything that pickles), in all processes."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Every process's `value` (anything that pickles), by rank, in all processes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def processes() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them; what is not set is as in a single process.

    Raises:
        ConfigError: some are missing, are no numbers or contradict each other; a lone RANK=1 would train and write nothing.
    """
    said = " ".join(f"{name}={os.environ[name]}" for name in TORCHRUN_VARIABLES if name in os.environ)
    advice = "start the processes with torchrun, or unset these variables to train in one process"
    rank, world_size, local_rank, local_world_size = (
        int_of(os.environ.get(name, default)) for name, default in TORCHRUN_VARIABLES.items()
    )
    if world_size > 1:
        missing = [name for name in (*TORCHRUN_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"{said}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; {advice}")
    if not (0 <= local_rank < local_world_size <= world_size and local_rank <= rank < world_size):
        raise ConfigError(f"{said}: there is no such process; {advice}")
    return rank, world_size, local_rank, local_world_size


def int_of(text: str) -> int:
    """The whole number that a variable holds; -1, which none of them may be, if it holds none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def init_process_group(device: Literal["auto", "cpu", "cuda"]) -> Group:
    """Find this process's place from torchrun's environment and, if it is one of several, join the others.

    Raises:
        ConfigError: torchrun's variables contradict each other, the other processes are not there, CUDA was asked for and
            there is none, or there are too few GPUs for the processes of this node.
    """
    rank, world_size, local_rank, local_world_size = processes()
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device={device}: {local_world_size} processes on this node, {torch.cuda.device_count()} visible GPUs; "
            "start fewer processes, ask for more GPUs, or set runtime.device=cpu"
        )
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if world_size > 1:
        try:
            dist.init_process_group(
                "nccl" if use_cuda else "gloo", timeout=JOIN_TIMEOUT, device_id=place if use_cuda else None
            )
        except (dist.DistError, ValueError) as error:  # ValueError: a port that is no number
            where, cause = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
            raise ConfigError(
                f"RANK={rank} of WORLD_SIZE={world_size}: the other processes do not answer at {where} ({cause}); "
                "start all of them with torchrun, or unset RANK and WORLD_SIZE to train in this one"
            ) from error
    return Group(rank, world_size, local_rank, local_world_size, place)


def destroy_process_group() -> None:
    """Leave the group that `init_process_group` made."""
    if dist.is_initialized():
        dist.destroy_process_group()
