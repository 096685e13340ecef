"""What checkpoints and restarts cost a training that fails now and then, at best: the models of Young and Daly.

J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM 17 (9), 1974.
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22 (3), 2006. Failures are a Poisson process, also during restarts; M is the mean time between two of one run, delta
what a checkpoint takes, R what a restart takes, tau the training between two checkpoints; all in seconds.
"""

from __future__ import annotations

import math


def efficiency(interval_s: float, *, checkpoint_s: float, restart_s: float, mttf_s: float) -> float:
    """The share of the time that trains, expected by Daly's complete model: tau / (M e^(R/M) (e^((tau+delta)/M) - 1)).

    `mttf_s` may be infinite: then only checkpoints take time.
    """
    if math.isinf(mttf_s):
        return interval_s / (interval_s + checkpoint_s)
    rate = 1 / mttf_s
    return interval_s * rate / (math.exp(restart_s * rate) * math.expm1((interval_s + checkpoint_s) * rate))


def young_interval_s(*, checkpoint_s: float, mttf_s: float) -> float:
    """The best interval to first order: sqrt(2 delta M)."""
    return math.sqrt(2 * checkpoint_s * mttf_s)


def daly_interval_s(*, checkpoint_s: float, mttf_s: float) -> float:
    """Daly's: sqrt(2 delta M) (1 + sqrt(delta / 2M) / 3 + (delta / 2M) / 9) - delta; M where delta is 2M or more."""
    if math.isinf(mttf_s):
        return math.inf
    share = checkpoint_s / (2 * mttf_s)
    if share >= 1:
        return mttf_s
    return math.sqrt(2 * checkpoint_s * mttf_s) * (1 + math.sqrt(share) / 3 + share / 9) - checkpoint_s
