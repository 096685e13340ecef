"""The accumulator of training metrics against loops that anybody can check."""

from __future__ import annotations

import math

import pytest
import torch

from vitpa.step.accumulator import NEVER, MetricAccumulator

CPU = torch.device("cpu")


@pytest.mark.parametrize("replicas", [1, 3])
def test_sums_are_those_of_a_loop_and_a_row_begins_new_ones(replicas: int) -> None:
    R = replicas
    generator = torch.Generator().manual_seed(0)
    accumulator = MetricAccumulator(R, CPU)
    for steps in (5, 3):
        expected = [[0.0, 0, 0] for _ in range(R)]
        norms = torch.zeros(R)
        for step in range(steps):
            losses, images = torch.rand(R, generator=generator), 7 + step
            correct = torch.randint(0, images, (R,), generator=generator)
            norms = torch.rand(R, generator=generator)
            accumulator.add(losses, correct, images)
            accumulator.check(step + 1, losses, norms)
            for replica in range(R):
                expected[replica][0] += losses[replica].item() * images
                expected[replica][1] += correct[replica].item()
                expected[replica][2] += images
        row = accumulator.take()
        assert row.done()
        values = row.result()
        assert (values.dtype, values.shape) == (torch.float64, (R, 5))
        assert values[:, :3].tolist() == expected  # from 0 again after a row; float64, so that nothing is lost
        assert values[:, 3].tolist() == norms.double().tolist()  # of the newest step
        assert [int(step) for step in values[:, 4]] == [NEVER] * R
    assert accumulator.sums.tolist() == [[0.0] * 3] * R


def test_a_row_is_not_changed_by_the_steps_after_it() -> None:
    accumulator = MetricAccumulator(2, CPU)
    accumulator.add(torch.tensor([1.0, 2.0]), torch.tensor([3, 4]), 5)
    accumulator.check(1, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
    row = accumulator.take()
    accumulator.add(torch.tensor([7.0, 7.0]), torch.tensor([1, 1]), 5)
    accumulator.check(2, torch.tensor([7.0, math.nan]), torch.tensor([9.0, 9.0]))
    assert row.result().tolist() == [[5.0, 3.0, 5.0, 0.5, float(NEVER)], [10.0, 4.0, 5.0, 0.25, float(NEVER)]]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("replicas", [1, 3])
def test_bad_step_is_the_first_that_was_not_finite(replicas: int, as_tensor: bool) -> None:
    R = replicas
    steps = [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ([1.0, math.nan, 1.0], [1.0, 1.0, 1.0]),  # a loss
        ([1.0, 1.0, 1.0], [1.0, 1.0, math.inf]),  # a gradient
        ([math.inf, 1.0, -math.inf], [1.0, math.nan, 1.0]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ]
    accumulator, expected = MetricAccumulator(R, CPU), [NEVER] * R
    for number, (losses, norms) in enumerate(steps, start=41):
        accumulator.check(torch.tensor(number) if as_tensor else number, torch.tensor(losses[:R]), torch.tensor(norms[:R]))
        for replica in range(R):
            finite = math.isfinite(losses[replica]) and math.isfinite(norms[replica])
            if not finite and expected[replica] == NEVER:
                expected[replica] = number
        assert accumulator.first_nonfinite_step.tolist() == expected
        assert [int(step) for step in accumulator.take().result()[:, 4]] == expected  # a row does not forget it
    assert expected == [44, 42, 43][:R]
