"""The kernels of augmentation give the CPU's bytes: by Triton's interpreter on the CPU, and on a GPU.

Run as a program (with TRITON_INTERPRET=1, which counts only before Triton is imported), it prints what differs as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import vitpa.kernels.erase
import vitpa.kernels.policy
from tests.support.augmentation import CIFAR10, CPU, FILL, every_operation, pictures, random_images, some
from tests.support.interpreter import report_of
from vitpa.config import AugmentConfig
from vitpa.data.augment.auto_augment import Operation, Operations
from vitpa.data.augment.pipeline import Augmentation, epoch_keys
from vitpa.data.augment.rand_augment import KINDS, PillowOperations, RandAugment

ERASING: dict[str, Any] = {"crop": "none", "hflip": False, "erase_prob": 0.7, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def timm_table(size: int, count: int) -> list[Operation]:
    """`count` operations of each name of timm's RandAugment."""
    policy = RandAugment(num_ops=1, strengths=[(9, 0.5)], fill=FILL, img_size=size, device=CPU)
    table = list(policy.operations.names)
    return [table[index] for index in some(table, count)]


def torchvision_table(size: int, count: int) -> list[Operation]:
    """`count` operations of each name of torchvision's policies."""
    table = every_operation(10, size)
    return [table[index] for index in some(table, count)]


def erased(images: Tensor, whole: Augmentation, keys: Tensor, *, mixed: bool) -> Tensor:
    """By the kernel, whatever the device: normalised and erased, and mixed if asked for."""
    samples = torch.arange(len(images))
    erasing = whole._erasing(images, samples, keys)
    if not mixed:
        return vitpa.kernels.erase.normalize_and_erase(images, whole.scale, whole.shift, *erasing)
    assert whole.mixup is not None
    _, weights, cuts = whole.mixup.draws(samples, keys, size=(images.shape[2], images.shape[3]))
    return vitpa.kernels.erase.normalize_erase_and_mix(images, whole.scale, whole.shift, *erasing, weights, cuts)


def main() -> None:
    torch.set_num_threads(1)
    vitpa.kernels.policy.TILE, vitpa.kernels.policy.TILE_OF_NEIGHBOURS, vitpa.kernels.erase.TILE = 128, 64, 128
    report: dict[str, object] = {}
    for size, count in ((7, 1), (13, 2)):
        images = pictures(size)[[2, 3, 6]]
        table = timm_table(size, count)
        batch, choice = images.repeat(len(table), 1, 1, 1), torch.arange(len(table)).repeat_interleave(len(images))
        both = PillowOperations(table, fill=FILL, height=size, width=size, device=CPU)
        wrong = (both.by_kernel(batch, choice) != both(batch, choice)).flatten(1).any(1)
        report[f"operations {size}"] = sorted({table[index][0] for index in choice[wrong].tolist()})
        report[f"operations {size}, kinds"] = sorted({table[index][0] for index in choice.tolist()})
    images, keys = random_images(20, 17), epoch_keys([3], 1)
    for mode in ("const", "pixel"):
        config = AugmentConfig.model_validate({**ERASING, "erase_mode": mode})
        whole, samples = Augmentation([config], CIFAR10, img_size=17, device=CPU), torch.arange(20)
        single, mixed = whole(images, samples, keys), whole.mixed(images, samples, samples, keys)[0]
        report[f"erased {mode}"] = float((erased(images, whole, keys, mixed=False) - single).abs().max())
        report[f"mixed {mode}"] = float((erased(images, whole, keys, mixed=True) - mixed).abs().max())

    both = PillowOperations([("Rotate", 9.0)], fill=FILL, height=7, width=7, device=CPU)
    images, kind = pictures(7), both.kind.repeat(11)
    torch.library.opcheck(torch.ops.vitpa.image_statistics.default, (images, kind))
    arguments = (images, kind, both.values.expand(11, 3, 256), both.ratios.repeat(11, 1), both.matrix.repeat(11, 1))
    torch.library.opcheck(torch.ops.vitpa.image_operations.default, (*arguments, both.fill))
    boxes, words = torch.tensor([[1, 2, 3, 4]]).repeat(10, 1), torch.arange(10)
    vectors = (images[:10], whole.scale, whole.shift, boxes, words, whole.normals)
    torch.library.opcheck(torch.ops.vitpa.normalize_and_erase.default, vectors)
    torch.library.opcheck(torch.ops.vitpa.normalize_erase_and_mix.default, (*vectors, torch.rand(5), boxes[:5]))
    json.dump(report, sys.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, object]:
    report: dict[str, object] = report_of("tests.vitpa.data.augment.test_augment_kernels")
    return report


def test_kinds_are_those_of_the_kernels() -> None:
    assert KINDS == vitpa.kernels.policy.KINDS


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 13])
def test_operations_by_kernels_are_those_of_the_reference(interpreted: dict[str, object], size: int) -> None:
    assert len(interpreted[f"operations {size}, kinds"]) == 16  # type: ignore[arg-type]
    assert interpreted[f"operations {size}"] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["erased const", "erased pixel", "mixed const", "mixed pixel"])
def test_erasing_and_mixing_by_kernels_are_those_of_the_reference(interpreted: dict[str, object], what: str) -> None:
    assert interpreted[what] == pytest.approx(0, abs=1e-6)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("size", [28, 33, 63, 64, 224])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operations_on_a_gpu_are_those_of_the_cpu(size: int, layout: torch.memory_format) -> None:
    images = pictures(size)[:: 1 if size < 100 else 4]
    timm, torchvision = timm_table(size, 2), torchvision_table(size, 2)  # drawn once, for both devices

    def timm_operations(device: torch.device) -> PillowOperations:
        return PillowOperations(timm, fill=FILL, height=size, width=size, device=device)

    def torchvision_operations(device: torch.device) -> Operations:
        return Operations(torchvision, height=size, width=size, device=device)

    for operations in (timm_operations, torchvision_operations):
        reference, there = operations(CPU), operations(torch.device("cuda"))
        table = list(reference.names)
        batch, choice = images.repeat(len(table), 1, 1, 1), torch.arange(len(table)).repeat_interleave(len(images))
        expected = reference(batch, choice)
        for function in (there, torch.compile(there, fullgraph=True, dynamic=False)):
            got = function(batch.cuda().contiguous(memory_format=layout), choice.cuda()).cpu()
            assert not {table[index] for index in choice[(got != expected).flatten(1).any(1)].tolist()}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("policy", ["none", "randaugment_timm", "autoaugment_imagenet"])
def test_a_gpu_augments_large_images_as_the_cpu_does_in_a_cuda_graph_too(policy: str) -> None:
    images, samples = random_images(48, 96).contiguous(memory_format=torch.channels_last), torch.arange(48)
    keys = epoch_keys([5, 6], 1).repeat_interleave(24, 0)
    config = AugmentConfig.model_validate(
        {**ERASING, "hflip": True, "policy": policy, "erase_mode": "pixel", "permute_block_px": 8}
    )
    on_cpu, on_gpu = (Augmentation([config], CIFAR10, img_size=96, device=torch.device(name)) for name in ("cpu", "cuda"))
    inputs = [tensor.cuda() for tensor in (images, samples, keys)]
    for function in (on_gpu, torch.compile(on_gpu, fullgraph=True, dynamic=False)):
        torch.testing.assert_close(function(*inputs).cpu(), on_cpu(images, samples, keys), rtol=0, atol=1e-5)
    compiled = torch.compile(on_gpu.mixed, fullgraph=True, dynamic=False)
    inputs.insert(1, inputs[1] + 7)  # labels
    for mixing in (on_gpu.mixed, compiled):
        for got, expected in zip(mixing(*inputs), on_cpu.mixed(images, samples + 7, samples, keys), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(*inputs)
    inputs[2].add_(1000)  # the same graph, other samples
    graph.replay()
    for got, expected in zip(out, on_cpu.mixed(images, samples + 7, samples + 1000, keys), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    main()
