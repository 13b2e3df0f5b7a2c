"""Percentile bootstrap over prompts, paired and pooled (Efron & Tibshirani 1993, chapter 13).

Plain percentiles are too narrow for few prompts: of ten, one comparison of equals in nine looks
like a difference. The tails are therefore expanded as Student's are beside the normal's (Hesterberg
2015, "expanded percentile interval").

Figures are ratios of sums, so a resample draws prompts and forms the ratio of *their* sums: long
prompts weigh what they weigh. Two drafters are compared on the same resampled prompts, which takes
the difficulty of the prompts out of the difference.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NORMAL = NormalDist()
FEW = 8  # prompts below which no resampling makes an honest interval


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def clear_of(self, reference: float) -> bool:
        """Whether the interval lies wholly on one side of `reference`."""
        return self.low > reference or self.high < reference


def resamples(num_prompts: int, num_resamples: int, seed: int) -> NDArray[np.int64]:
    """[R, P] indices of prompts; hand the same to every figure of a comparison."""
    return np.random.default_rng(seed).integers(num_prompts, size=(num_resamples, num_prompts))


def ratio(numerator: Array, denominator: Array, draws: NDArray[np.int64]) -> Interval:
    """Σ numerator / Σ denominator over prompts.

    Args:
        numerator: [P] sums of each prompt.
        denominator: [P].
        draws: [R, P] of `resamples`.
    """
    return interval(
        divide(numerator.sum(), denominator.sum()),
        divide(numerator[draws].sum(1), denominator[draws].sum(1)),
        draws.shape[1],
    )


def ratio_of_ratios(
    numerator: Array,
    denominator: Array,
    other_numerator: Array,
    other_denominator: Array,
    draws: NDArray[np.int64],
) -> Interval:
    """(Σ n / Σ d) / (Σ n' / Σ d'), both on the same prompts of each resample."""

    def figure(rows: NDArray[np.int64] | slice) -> Array:
        axis = -1
        ours = divide(numerator[rows].sum(axis), denominator[rows].sum(axis))
        theirs = divide(other_numerator[rows].sum(axis), other_denominator[rows].sum(axis))
        return divide(ours, theirs)

    return interval(figure(slice(None)), figure(draws), draws.shape[1])


def divide(a: Array, b: Array) -> Array:
    """The quotient, NaN where b is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0, np.nan, np.divide(a, b))


def interval(value: Array, samples: Array, num_prompts: int) -> Interval:
    """A figure and the expanded percentiles of its resamples."""
    if np.isnan(value) or np.isnan(samples).all():
        return Interval(float("nan"), float("nan"), float("nan"))
    outside = tail(num_prompts)
    low, high = np.nanquantile(samples, (outside, 1 - outside))
    return Interval(float(value), float(low), float(high))


def tail(num_prompts: int) -> float:
    """Share below the interval: Φ(-t √(n / (n - 1))), with t by Cornish and Fisher's expansion."""
    if num_prompts < 2:
        return 0.0
    z, degrees = -NORMAL.inv_cdf(0.025), num_prompts - 1
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return NORMAL.cdf(-t * math.sqrt(num_prompts / degrees))
