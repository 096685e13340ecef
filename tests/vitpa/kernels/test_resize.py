"""The kernel that crops images of all sizes against Pillow: by Triton's interpreter on the CPU, and on a GPU.

Run as a program (with TRITON_INTERPRET=1, which counts only before Triton is imported), it prints the differences as JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.interpreter import report_of
from tests.support.resizing import BILINEAR, slow_resize
from vitpa.data.decode.gpu import most_taps
from vitpa.data.manifest import Pixels
from vitpa.kernels import resize as kernels


def resize(plan: Tensor, out: Tensor) -> None:
    """With the weights in memory of its own."""
    taps = most_taps(*plan[:, 4:8].cpu().numpy().T)
    weights = torch.full((kernels.room(len(out), out.shape[-1], taps),), 77, dtype=torch.int32, device=out.device)
    kernels.resize(plan, weights, out, taps=taps)


def images_and_plan(rng: np.random.Generator, size: int, longest: int, count: int) -> tuple[list[Pixels], np.ndarray]:
    """Random images (H, W, 3), smooth and noisy, and what to show of them: all but the first four columns of a plan."""
    images, plan = [], []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(1, longest + 1, 2))
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        images.append(noise if number % 2 else np.array(small.resize((width, height), Image.Resampling.BICUBIC)))
        to_height, to_width = (
            int(side) for side in rng.integers(size, size + 10, 2) * (number % 3 > 0) + size * (number % 3 == 0)
        )
        top, left = (int(rng.integers(0, side - size + 1)) for side in (to_height, to_width))
        plan.append([height, width, to_height, to_width, top, left])
    return images, np.array(plan)


def placed(images: list[Pixels], shown: np.ndarray, device: str) -> tuple[list[Tensor], Tensor]:
    """The images on a device, some planar and some interleaved, each within a larger one, and the whole plan."""
    tensors, addresses = [], []
    for number, pixels in enumerate(images):
        framed = np.pad(pixels, ((2, 1), (3, 2), (0, 0)), constant_values=255)  # a region of what is stored
        H, W, _ = framed.shape
        planar = number % 4 < 2
        tensor = torch.from_numpy(framed.transpose(2, 0, 1).copy() if planar else framed).to(device)
        row, column, channel = (W, 1, H * W) if planar else (3 * W, 3, 1)
        tensors.append(tensor)
        addresses.append([tensor.data_ptr() + 2 * row + 3 * column, row, column, channel])
    return tensors, torch.from_numpy(np.concatenate([np.array(addresses), shown], 1)).to(device)


def differences(device: str, size: int, longest: int, count: int) -> list[int]:
    """The largest difference of each image to `slow_resize`, in grey levels; the last image has no pixels."""
    images, shown = images_and_plan(np.random.default_rng(), size, longest, count)
    tensors, plan = placed(images, shown, device)
    plan[-1, 4:] = torch.tensor([0, 0, 1, 1, 0, 0])
    out = torch.full((count, 3, size, size), 77, dtype=torch.uint8, device=device)
    resize(plan, out)
    expected = torch.empty(out.shape, dtype=torch.uint8)
    on_cpu, its_plan = placed(images, shown, "cpu")
    its_plan[-1, 4:] = plan[-1, 4:].cpu()
    slow_resize(its_plan, torch.empty(0), expected, taps=0)
    assert len(tensors) == len(on_cpu)
    return [int(each) for each in (out.cpu().int() - expected.int()).abs().amax((1, 2, 3))]


def main() -> None:
    torch.set_num_threads(1)
    report = {f"{size} from {longest}": differences("cpu", size, longest, 12) for size, longest in ((8, 40), (17, 30))}
    rng = np.random.default_rng()
    photo = rng.integers(0, 256, (9, 40, 3), np.uint8)
    tensors, plan = placed([photo], np.array([[9, 40, 9, 40, 0, 20]]), "cpu")  # of its own size: as it is
    out = torch.empty(1, 3, 8, 8, dtype=torch.uint8)
    resize(plan, out)
    same = torch.equal(out[0], torch.from_numpy(photo[:8, 20:28].copy()).permute(2, 0, 1))
    report["unchanged"] = [0 if same and len(tensors) == 1 else 1]
    json.dump(report, sys.stdout)


@pytest.mark.slow
def test_crops_are_pillows_to_the_bit() -> None:
    report: dict[str, list[int]] = report_of("tests.vitpa.kernels.test_resize")
    assert report == {"8 from 40": [0] * 12, "17 from 30": [0] * 12, "unchanged": [0]}


def test_rows_first_differs_from_any_pillow_by_one_grey_level() -> None:
    images, shown = images_and_plan(np.random.default_rng(), 32, 90, 40)
    tensors, plan = placed(images, shown, "cpu")
    out = torch.empty(len(tensors), 3, 32, 32, dtype=torch.uint8)
    slow_resize(plan, torch.empty(0), out, taps=0)
    for got, pixels, (_, _, to_height, to_width, top, left) in zip(out, images, shown.tolist(), strict=True):
        whole = Image.fromarray(pixels).resize((to_width, to_height), BILINEAR).crop((left, top, left + 32, top + 32))
        assert (got.int() - torch.from_numpy(np.array(whole)).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("size", "longest"), [(224, 500), (32, 2000), (225, 90), (8, 40)])
def test_gpu_crops_are_pillows_to_the_bit(size: int, longest: int) -> None:
    assert differences("cuda", size, longest, 60) == [0] * 60


if __name__ == "__main__":
    main()
