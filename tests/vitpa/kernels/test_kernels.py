"""Kernels against slow, obvious references in float64: by Triton's interpreter on the CPU, and on a GPU.

Run as a program (with TRITON_INTERPRET=1, which counts only before Triton is imported), it prints the errors as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vitpa.kernels.attention
import vitpa.kernels.mixing
import vitpa.kernels.norm
import vitpa.kernels.tiled_attention
import vitpa.kernels.tiled_mixing
from tests.support.interpreter import report_of
from vitpa.kernels.attention import attention
from vitpa.kernels.gelu import bias_gelu
from vitpa.kernels.mixing import mix
from vitpa.kernels.norm import add_norm
from vitpa.kernels.partials import ONE_PASS, sum_partials
from vitpa.kernels.tiled_attention import tiled_attention
from vitpa.kernels.tiled_mixing import tiled_mix

Function = Callable[..., Any]
Sizes = tuple[int, int, int, int, int]  # R, B, N, H, d
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
INTERPRETED: list[Sizes] = [(2, 3, 17, 2, 16), (1, 17, 17, 1, 32), (1, 1, 65, 1, 64), (1, 1, 197, 2, 64), (2, 5, 70, 1, 32)]
INTERPRETED += [(1, 2, 64, 1, 32)]  # without a class token
EPS = 1e-6
RESULTS = {  # how many outputs and gradients
    "attention": 3,
    "attention, apart": 3,
    "tiled_attention": 3,
    "tiled_attention, apart": 3,
    "mix": 3,
    "tiled_mix": 3,
    "add_norm": 7,
    "add_norm, apart": 7,
    "add_norm, scaled": 7,
    "bias_gelu": 3,
    "bias_gelu, apart": 3,
}


def takes(name: str, sizes: Sizes) -> bool:
    """Whether the kernel of this name takes so many tokens; head_dim is one that all take."""
    modules = {"attention": vitpa.kernels.attention, "attention, apart": vitpa.kernels.attention, "mix": vitpa.kernels.mixing}
    _, _, N, _, d = sizes
    return name not in modules or modules[name].unsupported_reason(N, d) is None


def slow_attention(qkv: Tensor, q_bias: Tensor) -> Tensor:
    M, N, _, H, d = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = q + q_bias.repeat_interleave(M // len(q_bias), 0).view(M, H, 1, d)
    out: Tensor = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, -1) @ v
    return out.transpose(1, 2).reshape(M, N, H * d)


def slow_mix(matrix: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = torch.einsum("rhnm,rbmhd->rbnhd", matrix, v)
    return mixed.flatten(3)


def slow_add_norm(x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch + bias[:, None]
    return total, F.layer_norm(total, total.shape[-1:], eps=EPS) * weight[:, None] + norm_bias[:, None]


def slow_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias[:, None])


def fast_add_norm(x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor]:
    return add_norm(x, branch, bias, weight, norm_bias, EPS)


def dropped(x: Tensor, sizes: Sizes) -> Tensor:
    """What stochastic depth multiplies the branches of images by: (R, B), some are left out."""
    R, B, *_ = sizes
    return torch.where(torch.arange(R * B, device=x.device).view(R, B) % 3 == 1, 0.0, 1.25)


def slow_scaled_add_norm(sizes: Sizes, x: Tensor, branch: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
    bias, *others = rows
    scale = dropped(x, sizes).to(x.dtype).repeat_interleave(sizes[2], 1)[:, :, None]
    return slow_add_norm(x, scale * (branch + bias[:, None]), torch.zeros_like(bias), *others)


def fast_scaled_add_norm(sizes: Sizes, x: Tensor, branch: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
    bias, weight, norm_bias = rows
    return add_norm(x, branch, bias, weight, norm_bias, EPS, dropped(x, sizes))


def cases(device: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[tuple[str, Function, Function, list[Tensor]]]:
    """Name, kernel, reference and fresh random inputs of every operation; "apart": replicas' vectors that are views."""
    R, B, N, H, d = sizes

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def rows(count: int, *, apart: bool) -> list[Tensor]:
        """Vectors of R replicas: of their own, or views of one buffer with NaN between them."""
        buffer = torch.full((R, 2 * count, H * d), torch.nan, device=device)
        views = [buffer[:, 2 * index] if apart else torch.empty(R, H * d, device=device) for index in range(count)]
        return [view.normal_().requires_grad_() for view in views]

    qkv = random(R * B, N, 3, H, d)
    if takes("attention", sizes):
        yield "attention", attention, slow_attention, [qkv, *rows(1, apart=False)]
        yield "attention, apart", attention, slow_attention, [qkv, *rows(1, apart=True)]
    yield "tiled_attention", tiled_attention, slow_attention, [qkv, *rows(1, apart=False)]
    yield "tiled_attention, apart", tiled_attention, slow_attention, [qkv, *rows(1, apart=True)]
    matrix = torch.softmax(2 * torch.randn(R, H, N, N, device=device), -1).requires_grad_()
    values = random(R, B, N, H, d)
    if takes("mix", sizes):
        yield "mix", mix, slow_mix, [matrix, values]
    yield "tiled_mix", tiled_mix, slow_mix, [matrix, values]
    stream = [random(R, B * N, H * d) for _ in range(2)]
    yield "add_norm", fast_add_norm, slow_add_norm, [*stream, *rows(3, apart=False)]
    yield "add_norm, apart", fast_add_norm, slow_add_norm, [*stream, *rows(3, apart=True)]
    scaled = partial(fast_scaled_add_norm, sizes), partial(slow_scaled_add_norm, sizes)
    yield "add_norm, scaled", *scaled, [*stream, *rows(3, apart=True)]
    yield "bias_gelu", bias_gelu, slow_bias_gelu, [stream[0], *rows(1, apart=False)]
    yield "bias_gelu, apart", bias_gelu, slow_bias_gelu, [stream[0], *rows(1, apart=True)]


def results(function: Function, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The outputs and the gradients of the inputs."""
    out = function(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = torch.autograd.grad(outs, inputs, [grad.to(x.dtype) for grad, x in zip(gradients, outs, strict=True)])
    return [x.detach() for x in (*outs, *grads)]


def errors(kernel: Function, reference: Function, inputs: list[Tensor]) -> list[float]:
    """Relative errors of the outputs and of the gradients of the inputs, in this order."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.no_grad():
        out = reference(*exact)
    dtype = inputs[1 if kernel in {mix, tiled_mix} else 0].dtype
    gradients = [torch.randn(x.shape, device=x.device).to(dtype) for x in ([out] if isinstance(out, Tensor) else out)]
    got = results(kernel, inputs, gradients)
    assert [x.dtype for x in got[-len(inputs) :]] == [x.dtype for x in inputs]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, results(reference, exact, gradients), strict=True)]


def chain(leaves: list[Tensor], sizes: Sizes) -> Tensor:
    """All operations, one after another: a number to differentiate by the leaves of `chain_leaves`."""
    R, B, N, H, d = sizes
    matrix, x, branch, bias, weight, norm_bias = leaves
    total, normed = add_norm(x, branch, bias, weight, norm_bias, EPS)
    branch = bias_gelu(branch, bias)
    qkv = torch.cat([normed, total, branch], -1)
    mixed = mix(matrix, attention(qkv.view(R * B, N, 3, H, d), bias).view(R, B, N, H, d))
    return (mixed.float() ** 2).mean()


def chain_leaves(device: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    operations = {name: inputs for name, _, _, inputs in cases(device, dtype, sizes)}
    return [operations["mix"][0], *operations["add_norm"]]


def chain_step(function: Function, leaves: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """The chain's number and its gradients."""
    out = function(leaves, sizes)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


def fix_bfloat16_of_the_interpreter() -> None:
    """Triton's interpreter keeps bfloat16 as integers, multiplies matrices of those, and cuts off what it should round."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(x: Any) -> Any:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = widened(a), widened(b)
        return multiply(self, a, b, *rest)

    def create_fp_trunc(self: Any, x: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            bits = x.data.view(np.uint32)
            nearest = bits + 0x7FFF + (bits >> 16 & 1)
            return TensorHandle((nearest >> 16).astype(np.uint16), tl.bfloat16)
        return truncate(self, x, kind)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def main() -> None:
    fix_bfloat16_of_the_interpreter()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report = {}
    for dtype in LIMITS:
        for sizes in INTERPRETED:
            for name, kernel, reference, inputs in cases("cpu", dtype, sizes):
                report[f"{name} {dtype} {sizes}"] = errors(kernel, reference, inputs)
    launches = vitpa.kernels.norm.BACKWARD
    for launch in launches.values():  # however many tokens there are
        vitpa.kernels.norm.BACKWARD = {(0, 2048): launch}
        for name, kernel, reference, inputs in cases("cpu", torch.float32, (2, 3, 17, 2, 16)):
            if name == "add_norm, scaled":
                report[f"launch {launch}"] = errors(kernel, reference, inputs)
    vitpa.kernels.norm.BACKWARD = launches
    report["sum_partials"] = []
    for count in (1, 70, ONE_PASS + 1, 3000):
        parts = torch.randn(2, count, 40)
        total = parts.double().sum(1)
        report["sum_partials"].append(float((sum_partials(parts) - total).norm() / total.norm()))
    sizes, dtype = (1, 1, 17, 1, 16), torch.float32
    leaves = chain_leaves("cpu", dtype, sizes)
    compiled = torch.compile(chain, fullgraph=True, dynamic=False, backend="aot_eager")
    both = zip(chain_step(compiled, leaves, sizes), chain_step(chain, leaves, sizes), strict=True)
    report["compiled"] = [float((a - b).norm() / b.norm()) for a, b in both]
    for name, _, _, inputs in cases("cpu", dtype, sizes):  # raises what is wrong with schema, fake tensors or autograd
        operation = getattr(torch.ops.vitpa, name.partition(",")[0]).default
        scale = dropped(inputs[0], sizes) if "scaled" in name else None
        torch.library.opcheck(operation, (*inputs, EPS, scale) if "norm" in name else tuple(inputs))
    json.dump(report, sys.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    report: dict[str, list[float]] = report_of("tests.vitpa.kernels.test_kernels")
    return report


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("name", "sizes"), [(name, sizes) for sizes in INTERPRETED for name in RESULTS if takes(name, sizes)])
def test_kernels_and_their_gradients_are_those_of_the_reference(
    interpreted: dict[str, list[float]], name: str, dtype: torch.dtype, sizes: Sizes
) -> None:
    found = interpreted[f"{name} {dtype} {sizes}"]
    assert len(found) == RESULTS[name]
    assert all(error < LIMITS[dtype] for error in found), found  # NaN is not below


@pytest.mark.slow
@pytest.mark.parametrize("launch", vitpa.kernels.norm.BACKWARD.values())
def test_the_norm_does_not_depend_on_how_it_is_launched(
    interpreted: dict[str, list[float]], launch: tuple[int, int, int]
) -> None:
    found = interpreted[f"launch {launch}"]
    assert len(found) == RESULTS["add_norm, scaled"]
    assert all(error < LIMITS[torch.float32] for error in found), found


@pytest.mark.slow
def test_kernels_compile_whole_and_give_the_same(interpreted: dict[str, list[float]]) -> None:
    assert interpreted["compiled"] == [0.0] * 7


@pytest.mark.slow
def test_partial_results_are_summed_whatever_their_number(interpreted: dict[str, list[float]]) -> None:
    assert len(interpreted["sum_partials"]) == 4
    assert max(interpreted["sum_partials"]) < 1e-6


@pytest.mark.parametrize("kernel", [vitpa.kernels.attention, vitpa.kernels.mixing])
def test_sizes_that_do_not_fit_are_named(kernel: Any) -> None:
    assert [kernel.unsupported_reason(1 + patches, d) for patches in (16, 32, 64) for d in (16, 32, 64)] == [None] * 9
    assert "196 patches" in str(kernel.unsupported_reason(197, 64))
    assert "8 patches" in str(kernel.unsupported_reason(9, 64))
    assert "head_dim 48" in str(kernel.unsupported_reason(65, 48))
    assert "head_dim 8" in str(kernel.unsupported_reason(65, 8))


def test_sizes_that_do_not_fit_tiles_are_named() -> None:
    attends, mixes = vitpa.kernels.tiled_attention.unsupported_reason, vitpa.kernels.tiled_mixing.unsupported_reason
    assert [attends(tokens, d, 167936) for tokens in (2, 65, 197, 256) for d in (16, 32, 64)] == [None] * 12
    assert [mixes(d) for d in (16, 32, 64)] == [None] * 3
    assert "257 tokens" in str(attends(257, 64, 167936))
    assert "head_dim 48" in str(attends(197, 48, 167936))
    assert "102400 bytes" in str(attends(197, 64, 102400))
    assert "head_dim 48" in str(mixes(48))


def test_rows_that_do_not_fit_the_norm_are_named() -> None:
    assert [vitpa.kernels.norm.unsupported_reason(D) for D in (16, 192, 384, 2048)] == [None] * 4
    assert "embed_dim 4096" in str(vitpa.kernels.norm.unsupported_reason(4096))
    assert "embed_dim 8" in str(vitpa.kernels.norm.unsupported_reason(8))


def test_shapes_are_known_without_running() -> None:
    with torch.device("meta"):
        qkv = torch.empty(6, 65, 3, 12, 32, dtype=torch.bfloat16)
        stream, row = torch.empty(2, 195, 384, dtype=torch.bfloat16), torch.empty(2, 384)
        matrix, v = torch.empty(2, 12, 65, 65), torch.empty(2, 3, 65, 12, 32, dtype=torch.bfloat16)
    assert (attention(qkv, row).shape, attention(qkv, row).dtype) == ((6, 65, 384), torch.bfloat16)
    assert (mix(matrix, v).shape, mix(matrix, v).dtype) == ((2, 3, 65, 384), torch.bfloat16)
    assert (tiled_attention(qkv, row).shape, tiled_attention(qkv, row).dtype) == ((6, 65, 384), torch.bfloat16)
    assert (tiled_mix(matrix, v).shape, tiled_mix(matrix, v).dtype) == ((2, 3, 65, 384), torch.bfloat16)
    assert (bias_gelu(stream, row).shape, bias_gelu(stream, row).dtype) == (stream.shape, torch.bfloat16)
    assert [x.shape for x in add_norm(stream, stream, row, row, row, eps=EPS)] == [stream.shape] * 2


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU_SIZES: list[Sizes] = [
    (2, 3, 65, 12, 32),
    (1, 37, 17, 3, 16),
    (3, 5, 33, 2, 64),
    (1, 7, 65, 6, 64),
    (2, 260, 65, 4, 32),
    (1, 40, 64, 12, 32),
    (1, 40, 197, 3, 64),
    (1, 340, 197, 1, 64),
    (3, 5, 70, 1, 16),
    (1, 3, 256, 2, 64),
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", GPU_SIZES)
def test_gpu_kernels_and_their_gradients_are_those_of_the_reference_and_repeat(sizes: Sizes, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name, kernel, reference, inputs in cases("cuda", dtype, sizes):
        found = errors(kernel, reference, inputs)
        assert all(error < LIMITS[dtype] for error in found), (name, found)
        out = kernel(*inputs)
        gradients = [torch.randn_like(x) for x in ([out] if isinstance(out, Tensor) else out)]
        first, second = (results(kernel, inputs, gradients) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kernel", [attention, tiled_attention])
def test_a_batch_may_have_more_images_than_a_grid_has_rows(kernel: Function) -> None:
    torch.manual_seed(0)
    images = 2**16 + 40  # CUDA: 65,535 along the second axis of a grid
    inputs = [
        torch.randn(shape, device="cuda").to(dtype)
        for shape, dtype in (((images, 17, 3, 1, 16), torch.bfloat16), ((2, 16), torch.float32))
    ]
    for each in inputs:
        each.requires_grad_()
    assert all(error < LIMITS[torch.bfloat16] for error in errors(kernel, slow_attention, inputs))


@pytest.mark.gpu
@on_gpu
def test_gpu_kernels_compile_whole_and_replay_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    sizes = (2, 6, 65, 12, 32)
    leaves = chain_leaves("cuda", torch.bfloat16, sizes)
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    eager = chain_step(chain, leaves, sizes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            chain_step(compiled, leaves, sizes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain_step(compiled, leaves, sizes)
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2e-2  # the compiler rounds sums of gradients once


if __name__ == "__main__":
    main()
