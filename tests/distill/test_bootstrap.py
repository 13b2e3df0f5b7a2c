"""The bootstrap against analytic answers and known truths."""

import math

import numpy as np
from scipy import stats

from distill.report.bootstrap import Array, Interval, ratio, ratio_of_ratios, resamples, tail


def prompts(rng: np.random.Generator, count: int, rate: float) -> tuple[Array, Array]:
    """[P] accepted and tried tokens of prompts that differ in length and in difficulty."""
    tried = rng.integers(20, 200, size=count)
    accepted = rng.binomial(tried, np.clip(rng.normal(rate, 0.1, size=count), 0, 1))
    return accepted.astype(float), tried.astype(float)


def test_the_interval_is_as_wide_as_the_delta_method_says() -> None:
    accepted, tried = prompts(np.random.default_rng(0), 400, 0.5)
    interval = ratio(accepted, tried, resamples(400, 4000, seed=0))
    residual = accepted - interval.value * tried
    error = math.sqrt(np.sum(residual**2)) / tried.sum()
    assert math.isclose(interval.high - interval.low, 2 * 1.96 * error, rel_tol=0.06)
    assert interval.low < interval.value < interval.high


def test_a_paired_ratio_covers_the_truth_and_is_tighter_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(1)
    draws, others = resamples(40, 400, seed=2), resamples(40, 400, seed=3)
    covered, widths, unpaired = 0, [], []
    for _ in range(200):
        steps = rng.integers(50, 100, size=40).astype(float)
        ease = rng.normal(2.0, 0.5, size=40)  # the same prompt is easy for both drafters
        old = steps * (ease + rng.normal(0, 0.05, size=40))
        new = steps * (1.1 * ease + rng.normal(0, 0.05, size=40))
        paired = ratio_of_ratios(new, steps, old, steps, draws)
        covered += paired.low <= 1.1 <= paired.high
        widths.append(paired.high - paired.low)
        ours, theirs = new[draws].sum(1) / steps[draws].sum(1), old[others].sum(1)
        apart = ours / (theirs / steps[others].sum(1))
        unpaired.append(np.ptp(np.percentile(apart, [2.5, 97.5])))
    assert 0.88 <= covered / 200 <= 0.99
    assert np.mean(widths) < 0.2 * np.mean(unpaired)


def test_the_seed_decides() -> None:
    accepted, tried = prompts(np.random.default_rng(0), 30, 0.5)
    one, same, other = (ratio(accepted, tried, resamples(30, 200, s)) for s in (1, 1, 2))
    assert one == same
    assert (one.low, one.high) != (other.low, other.high)


def test_what_has_no_denominator_is_undefined_and_proves_nothing() -> None:
    nothing = ratio(np.zeros(5), np.zeros(5), resamples(5, 20, seed=0))
    assert math.isnan(nothing.value)
    assert not nothing.clear_of(1.0)
    assert Interval(1.2, 1.1, 1.3).clear_of(1.0)
    assert not Interval(1.2, 1.0, 1.3).clear_of(1.0)


def test_a_few_prompts_do_not_make_equals_differ() -> None:
    rng = np.random.default_rng(4)
    draws = resamples(10, 1000, seed=5)
    trials = 1000
    told_apart, by_plain_percentiles = 0, 0
    for _ in range(trials):
        steps = rng.integers(40, 110, size=10).astype(float)
        old = steps * rng.normal(1.8, 0.35, size=10)
        new = old * (1 + rng.normal(0, 0.08, size=10))
        told_apart += ratio_of_ratios(new, steps, old, steps, draws).clear_of(1.0)
        low, high = np.percentile(new[draws].sum(1) / old[draws].sum(1), [2.5, 97.5])
        by_plain_percentiles += low > 1 or high < 1
    assert told_apart / trials < 0.08 < by_plain_percentiles / trials


def test_the_tails_are_those_of_student() -> None:
    for count in (8, 30, 1000):
        exact = stats.norm.cdf(-stats.t.ppf(0.975, count - 1) * math.sqrt(count / (count - 1)))
        assert math.isclose(tail(count), exact, rel_tol=0.04)
