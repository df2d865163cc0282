"""Uncertainty of a score, and of the difference of two on the same questions.

Answers to one question are not independent, so the question is the unit: everything here takes one mean per question.
Sources: E. B. Wilson, Probable Inference (1927), with the effective sample size of Korn and Graubard (1998); the paired
sign-flip test of R. A. Fisher (1935), which is McNemar's exact test where every question was answered once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy

from ...errors import library

stats = library("scipy.stats")
CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
_FLIPS = 100_000
"""Sign flips that are tried: all of them where they are no more (up to 16 questions that differ)."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval (95%)."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Standard error that a normal interval of this width has."""
        return (self.high - self.low) / (2 * _Z)


def accuracy(means_Q: Sequence[float], answers: int) -> Estimate:
    """Mean over questions, with Wilson's interval.

    Args:
        means_Q: share of right answers, one per question.
        answers: answers behind them; each question has equally many.

    The effective size is the one at which single independent answers would vary as much; at most `answers`.
    Raises `ValueError` without questions.
    """
    if not means_Q:
        raise ValueError("no questions")
    mean, size = fmean(means_Q), len(means_Q)
    variance = stdev(means_Q) ** 2 / size if size > 1 else 0.0
    effective = min(mean * (1 - mean) / variance, answers) if variance > 0 else size
    return Estimate(mean, *wilson(mean, effective))


def wilson(share: float, size: float) -> tuple[float, float]:
    """Wilson's interval of a share seen in `size` independent trials (which need be no whole number)."""
    squared = _Z * _Z / size
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def difference(gaps_Q: Sequence[float]) -> Estimate:
    """Mean difference over questions, with Student's interval.

    Where all differences are equal no spread is seen; the interval then is what `size` trials without an event leave
    open (the rule of three). Raises `ValueError` without questions.
    """
    if not gaps_Q:
        raise ValueError("no questions")
    mean, size = fmean(gaps_Q), len(gaps_Q)
    spread = stdev(gaps_Q) if size > 1 else 0.0
    if spread == 0.0:
        half = min(-math.log(1 - CONFIDENCE) / size, 1.0)
    else:
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, size - 1)) * spread / math.sqrt(size)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0))


def paired_p_value(gaps_Q: Sequence[float]) -> float:
    """Two-sided p-value of "no difference": how often random signs give a mean as far from 0.

    Exact up to 16 questions that differ, and for any number of them where all differ by the same amount (single
    answers); otherwise over 100,000 flips from a fixed seed.
    """
    gaps = numpy.array([gap for gap in gaps_Q if gap != 0.0])
    if len(gaps) == 0:
        return 1.0
    sizes = numpy.abs(gaps)
    if numpy.allclose(sizes, sizes[0]):
        return float(stats.binomtest(int((gaps > 0).sum()), len(gaps)).pvalue)
    test = stats.permutation_test(
        (gaps,),
        lambda flipped, axis: numpy.abs(flipped.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=_FLIPS,
        vectorized=True,
        batch=1000,
        rng=0,
    )
    return float(test.pvalue)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over benchmarks, which count alike and are independent."""
    if len(estimates) == 1:
        return estimates[0]
    value = fmean(one.value for one in estimates)
    half = _Z * math.sqrt(sum(one.error**2 for one in estimates)) / len(estimates)
    return Estimate(value, value - half, value + half)


def p_value_of(estimate: Estimate) -> float:
    """Two-sided p-value that the estimated quantity is 0, by its normal interval."""
    if estimate.error == 0:
        return 1.0 if estimate.value == 0 else 0.0
    return 2 * (1 - NormalDist().cdf(abs(estimate.value) / estimate.error))
