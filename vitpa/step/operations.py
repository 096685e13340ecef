"""Which operations the network runs on a GPU: our kernels where they take its sizes and pass a trial there, else torch's own.

The trial runs a kernel and its gradients once, on random numbers, and compares them with torch's own: a kernel that needs
more than the GPU has, that cannot be built there, or whose results are wrong, is not used, and the user is told why.

Axes: R replicas, B images of each, N tokens, D embed_dim, H heads, d head_dim, T = R * B * N tokens of all images.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitpa.config import ModelConfig
from vitpa.models.stacked import PLAIN, Operations

MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16
TRIAL_IMAGES = 16
TRIAL_TOKENS = 2**16  # from here on, the norm is launched in another way
MAX_ERROR = 0.02  # relative to the 2-norm; bfloat16 has 8 bits, so roundings alone give 0.002 to 0.005
EPS = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A kernel that may do an operation, and why it does not take the network's sizes; None if it does."""

    kernel: Callable[..., Any]
    unsupported_reason: str | None


def choose_operations(
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_images: int,
    torch_operations: Collection[str] = (),
) -> tuple[Operations, list[str]]:
    """The fastest operations for a network whose tokens are of `dtype`, and what the user should know about the choice.

    `num_images` is R * B, the images of a step; `torch_operations` are torch's own on request.
    """
    if device.type != "cuda":
        return PLAIN, []
    reason = kernels_unsupported_reason(torch.cuda.get_device_capability(device), dtype)
    if reason:
        return PLAIN, [f"the network runs as torch's own operations, which are slower than our kernels: {reason}"]
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    chosen, notes = PLAIN._asdict(), []
    for name, found in candidates(model, shared_memory).items():
        if name in torch_operations:
            continue
        reasons = []
        for candidate in found:
            reason = candidate.unsupported_reason or trial(
                candidate.kernel, chosen[name], trial_inputs(name, model, num_images, device=device, dtype=dtype)
            )
            if reason is None:
                chosen[name] = candidate.kernel
                break
            reasons.append(reason)
        if chosen[name] is getattr(PLAIN, name):
            notes.append(f"{name} runs as torch's own operation, which is slower: {'; '.join(reasons)}")
    torch.cuda.empty_cache()
    return Operations(**chosen), notes


def kernels_unsupported_reason(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why none of our kernels runs on a GPU of that capability for tokens of that type; None if they do."""
    if dtype != torch.bfloat16:
        return f"train.precision={str(dtype).removeprefix('torch.')}, and the kernels are made for bfloat16"
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {found}, and they need {needed}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def candidates(model: ModelConfig, shared_memory: int) -> dict[str, list[Candidate]]:
    """The kernels for each operation of the network, the fastest first; a multiprocessor has `shared_memory` bytes."""
    # Here, as Triton is needed on a GPU only.
    from vitpa.kernels import attention, gelu, mixing, norm, tiled_attention, tiled_mixing  # noqa: PLC0415

    tokens, head_dim = model.num_tokens, model.embed_dim // model.num_heads
    both = {
        "attention": [
            Candidate(attention.attention, attention.unsupported_reason(tokens, head_dim)),
            Candidate(tiled_attention.tiled_attention, tiled_attention.unsupported_reason(tokens, head_dim, shared_memory)),
        ],
        "mix": [
            Candidate(mixing.mix, mixing.unsupported_reason(tokens, head_dim)),
            Candidate(tiled_mixing.tiled_mix, tiled_mixing.unsupported_reason(head_dim)),
        ],
    }
    mixes = "attention" if model.attention == "content" else "mix"  # the network never calls the other one
    return {
        mixes: both[mixes],
        "add_norm": [Candidate(norm.add_norm, norm.unsupported_reason(model.embed_dim))],
        "bias_gelu": [Candidate(gelu.bias_gelu, None)],
    }


def trial_inputs(
    name: str, model: ModelConfig, num_images: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Any]]:
    """Random inputs of an operation that have gradients, and the others after them, for one replica.

    The same numbers in every process. Attention takes a few images; the norm as many tokens as change how it is launched.
    """
    generator = torch.Generator(device).manual_seed(0)
    N, D, H = model.num_tokens, model.embed_dim, model.num_heads

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    few, many = min(num_images, TRIAL_IMAGES), min(num_images, -(-TRIAL_TOKENS // N))
    if name == "attention":
        return [random(few, N, 3, H, D // H, dtype=dtype), random(1, D)], []
    if name == "mix":
        matrix = torch.softmax(2 * random(1, H, N, N).detach(), -1).requires_grad_()
        return [matrix, random(1, few, N, H, D // H, dtype=dtype)], []
    if name == "bias_gelu":
        hidden = int(D * model.mlp_ratio)
        return [random(1, few * N, hidden, dtype=dtype), random(1, hidden)], []
    scale = None
    if model.drop_path_rate:
        scale = torch.where(torch.arange(many, device=device) % 3 == 1, 0.0, 1.25)[None]
    stream = [random(1, many * N, D, dtype=dtype) for _ in range(2)]
    return [*stream, *(random(1, D) for _ in range(3))], [EPS, scale]


def trial(kernel: Callable[..., Any], reference: Callable[..., Any], inputs: tuple[list[Tensor], list[Any]]) -> str | None:
    """Why `kernel` cannot take the place of `reference` for such inputs on their device; None if it can.

    Both are run with their gradients; the reference computes in float32.

    Raises:
        torch.OutOfMemoryError: there is no room for the inputs; nothing is known of the kernel then.
    """
    from triton.errors import TritonError  # noqa: PLC0415 - as above

    leaves, others = inputs
    name = getattr(kernel, "__name__", str(kernel))
    try:
        got = _results(kernel, leaves, others)
        exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
        expected = _results(reference, exact, others)
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:  # of compilers and drivers
        first = str(error).strip().splitlines() or [""]
        return f"{name} does not run on this GPU ({type(error).__name__}: {first[0]})"
    if not all(error < MAX_ERROR for error in errors):  # NaN is not below
        worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
        return f"{name} computes something else on this GPU: relative error {worst:.2g}"
    return None


def _results(function: Callable[..., Any], leaves: list[Tensor], others: list[Any]) -> list[Tensor]:
    """The outputs, and the gradients of their sums of squares / 2 by the leaves."""
    out = function(*leaves, *others)
    outs = [out] if isinstance(out, Tensor) else list(out)
    return [*(each.detach() for each in outs), *torch.autograd.grad(outs, leaves, [each.detach() for each in outs])]
