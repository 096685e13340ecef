"""Random numbers that depend only on what they are for: a counter-based generator.

Every number is a hash of (seed, purpose, epoch, sample, ...), so a resumed, re-sharded or re-ordered run draws the same
ones, on the CPU and on a GPU alike. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over
int64 tensors, whose multiplication wraps modulo 2^64 as C's does.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

Counters = Int64[Tensor, "*#S"]
Stream = int | Counters
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    INIT = 1
    ORDER = 2
    CROP = 3
    FLIP = 4
    DROP_PATH = 5
    POLICY = 6
    ERASE = 7
    CUTOUT = 8
    MIX = 9
    ERASE_NOISE = 10
    SHUFFLE_BUFFER = 11
    BLOCKS = 12
    HOLDOUT = 13
    COLOR_JITTER = 14


def key(seed: int, purpose: Purpose, *counters: int) -> int:
    """A signed 64-bit key for one stream, such as key(seed, Purpose.CROP, epoch)."""
    words = (seed, int(purpose), *counters)
    digest = hashlib.blake2b(struct.pack(f"<{len(words)}q", *words), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch's >> keeps the sign


def random_bits(stream: Stream, counters: Counters) -> Int64[Tensor, "*S"]:
    """64 random bits for each of `counters`, in the stream of that key, or each in its own."""
    z = counters * _GOLDEN + stream
    for _ in range(2):  # twice, since streams may differ by small multiples of the increment
        z = (z ^ _shift(z, 30)) * _MIX1
        z = (z ^ _shift(z, 27)) * _MIX2
        z = z ^ _shift(z, 31)
    return z


def uniform(stream: Stream, counters: Counters, draw: Stream = 0) -> Float32[Tensor, "*S"]:
    """Numbers in [0, 1) with 24 random bits, one for each of `counters`; `draw` numbers several per counter."""
    bits = random_bits(stream + draw, counters)  # nearby keys are as good as distant ones after the mixing
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def randint(stream: Stream, counters: Counters, high: int, draw: Stream = 0) -> Int64[Tensor, "*S"]:
    """Numbers in [0, high), one for each of `counters`."""
    return _shift(random_bits(stream + draw, counters), 33) % high  # 31 bits: the bias is below high / 2^31


def permutation(stream: int, n: int, device: torch.device | None = None) -> Int64[Tensor, " n"]:
    """A random order of 0 .. n-1."""
    return torch.argsort(random_bits(stream, torch.arange(n, device=device)), stable=True)


def materialize(values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
    """The same values, computed once where they are compiled into kernels that use them many times.

    torch.compile would rather compute a random number again for each pixel that asks for it; a view with given strides
    must have memory to look at.
    """
    return values.as_strided(values.shape, values.stride())
