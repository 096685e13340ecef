"""Means over seeds, their standard deviation (n - 1 in the denominator) and 95 % interval (Student's t). Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING = 1e-12  # of differences of accuracies, which are shares of fewer than 10^9 images


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds. `std` and the interval exist from two seeds on."""

    n: int
    mean: float | None
    std: float | None
    ci95_low: float | None
    ci95_high: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Mean, standard deviation (ddof = 1) and the 95 % t interval of the mean."""
        n = len(values)
        if n == 0:
            return Estimate(0, None, None, None, None)
        mean = math.fsum(values) / n
        if n == 1:
            return Estimate(1, mean, None, None, None)
        from scipy.special import stdtrit  # noqa: PLC0415 - a quarter of a second that only this needs

        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        quantile = float(stdtrit(n - 1, 0.975))  # 97.5 % of Student's t, n - 1 degrees of freedom
        half = quantile * std / math.sqrt(n)
        return Estimate(n, mean, std, mean - half, mean + half)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p value of Student's t test that the mean of paired differences is 0; None with fewer than two of them.

    Differences that are all the same, as few seeds can have on few images, have no spread to be judged by: the sign test's p,
    2 / 2^n, or 1 if they are 0.
    """
    found = Estimate.of(differences)
    if found.mean is None or found.std is None:
        return None
    if found.std < ROUNDING:
        return 1.0 if abs(found.mean) < ROUNDING else 2.0 ** (1 - found.n)
    from scipy.special import stdtr  # noqa: PLC0415 - as above

    return 2 * float(stdtr(found.n - 1, -abs(found.mean) / (found.std / math.sqrt(found.n))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number (Holm 1979, step-down); None stays None and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


RESAMPLES = 10_000  # of a bootstrap, drawn with a fixed seed: the same values have the same interval


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, the values drawn with replacement; None with fewer than two.

    Of a handful of values it is narrower than Student's t interval: it knows no spread but theirs. Efron and Tibshirani 1993,
    chapter 13.
    """
    if len(values) < 2:
        return None
    import numpy as np  # noqa: PLC0415 - as above

    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def probability_of_superiority(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The share of pairs, one of each, in which the first is larger; equal ones count half. None if one is empty.

    It is Mann and Whitney's U over the number of pairs, as in Agarwal et al. 2021, section 4.3 (arXiv 2108.13264).
    """
    if not first or not second:
        return None
    return sum((a > b) + (a == b) / 2 for a in first for b in second) / (len(first) * len(second))
