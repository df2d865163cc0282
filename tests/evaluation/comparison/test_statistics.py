"""Intervals and paired tests: the numbers of statsmodels 0.15.0 and scipy 1.17.1 (computed once, written down here)."""

import math
from itertools import product
from statistics import NormalDist, stdev

import pytest

from zeda_megatron.evaluation.comparison.statistics import (
    Estimate,
    accuracy,
    average,
    difference,
    p_value_of,
    paired_p_value,
    wilson,
)

GAPS = [0.5, 0.25, -0.125, 0.375, 0, 0.125, -0.25, 0.5]


@pytest.mark.parametrize(
    ("hits", "size", "low", "high"),  # proportion_confint(hits, size, method="wilson")
    [
        (8, 10, 0.49016247153664183, 0.9433178485456247),
        (0, 20, 0.0, 0.1611251580528194),
        (20, 20, 0.8388748419471804, 1.0),
        (137, 200, 0.6176504391426965, 0.7453767900977151),
    ],
)
def test_wilsons_interval(hits, size, low, high):
    assert wilson(hits / size, size) == pytest.approx((low, high), abs=1e-12)


def test_one_answer_per_question_is_wilsons_interval():
    # The unbiased variance makes the effective size one less than the number of questions.
    made = accuracy([1.0] * 137 + [0.0] * 63, 200)
    assert (made.low, made.high) == pytest.approx(wilson(137 / 200, 199), abs=1e-12)
    none = accuracy([0.0] * 20, 20)
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(0.1611251580528194)


def test_answers_to_one_question_do_not_count_as_independent():
    # 12 questions, 4 answers each; OLS with cluster-robust errors: 0.09238982 without, 0.09649802 with 12/11.
    hits = [4, 2, 2, 0, 4, 1, 3, 2, 1, 2, 0, 1]
    made = accuracy([h / 4 for h in hits], 48)
    mean = sum(hits) / 48
    assert made.value == pytest.approx(0.45833333)
    assert (made.low, made.high) == pytest.approx(wilson(mean, mean * (1 - mean) / 0.09649802**2), abs=1e-6)
    naive = wilson(mean, 48)
    assert made.high - made.low > 1.2 * (naive[1] - naive[0])


def test_questions_that_agree_are_worth_no_more_than_their_answers():
    made = accuracy([0.5] * 10, 40)
    assert (made.low, made.high) == pytest.approx(wilson(0.5, 10))
    nearly = accuracy([0.5] * 9 + [0.75], 40)
    assert nearly.high - nearly.low == pytest.approx(
        wilson(nearly.value, 40)[1] - wilson(nearly.value, 40)[0]
    )


def test_paired_difference_is_students_interval():
    made = difference(GAPS)  # scipy.stats.ttest_1samp(GAPS, 0).confidence_interval(0.95)
    assert (made.value, made.low, made.high) == pytest.approx((0.171875, -0.06470286, 0.40845286), abs=1e-8)
    two = difference([0.0, 1.0])  # one degree of freedom: t is 12.7, the interval all that there is
    assert (two.low, two.high) == (-1.0, 1.0)


def test_no_difference_seen_is_not_certainty():
    made = difference([0.0] * 60)
    assert made.value == 0 and made.high == -made.low == pytest.approx(3 / 60, rel=0.01)
    assert difference([0.0]).high == 1.0


def test_single_answers_give_mcnemars_exact_test():
    # scipy.stats.binomtest(3, 13), (40, 95), (0, 1)
    assert paired_p_value([1.0] * 3 + [-1.0] * 10 + [0.0] * 50) == pytest.approx(0.09228515625)
    assert paired_p_value([1.0] * 40 + [-1.0] * 55) == pytest.approx(0.1505180638902294)
    assert paired_p_value([1.0]) == 1.0
    assert paired_p_value([0.0] * 9) == 1.0


def test_sign_flips_are_all_tried_when_few():
    # scipy.stats.permutation_test((GAPS,), mean, permutation_type="samples", n_resamples=inf)
    assert paired_p_value(GAPS) == pytest.approx(0.171875)
    flips = [sum(s * g for s, g in zip(signs, GAPS)) for signs in product((1, -1), repeat=len(GAPS))]
    assert paired_p_value(GAPS) == sum(abs(f) >= sum(GAPS) - 1e-9 for f in flips) / len(flips)


def test_many_questions_are_flipped_at_random_and_alike_each_time():
    gaps = [((7 * i) % 11 - 4) / 10 for i in range(80)]
    p = paired_p_value(gaps)
    z = (sum(gaps) / 80) / (math.sqrt(sum(g * g for g in gaps)) / 80)
    assert p == paired_p_value(gaps)
    assert p == pytest.approx(2 * (1 - NormalDist().cdf(abs(z))), abs=0.01)


def test_benchmarks_count_alike_in_the_average():
    made = average([Estimate(0.5, 0.4, 0.6), Estimate(0.7, 0.7, 0.7)])
    assert (made.value, made.low, made.high) == pytest.approx((0.6, 0.55, 0.65))
    assert p_value_of(Estimate(0.1, 0.0, 0.2)) == pytest.approx(0.05, abs=1e-9)
    assert stdev([1.0, 2.0])  # the unbiased one


def test_nothing_to_average_is_an_error():
    for function in (lambda: accuracy([], 0), lambda: difference([])):
        with pytest.raises(ValueError, match="no questions"):
            function()
