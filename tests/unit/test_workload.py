"""Workloads: refusals, known arrivals and random draws."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.arrivals import (
    OUTPUTS,
    PROMPTS,
    RateWindows,
    diurnal_arrivals_s,
    gamma_arrivals_s,
    generator,
    lognormal_lengths,
    weibull_arrivals_s,
    windowed_arrivals_s,
)
from simulator.run import Run
from simulator.workload import poisson_arrivals_s, uniform_lengths
from tests.builders import GATED, limits, linear_cost, workload


@pytest.mark.parametrize(
    ("prompts", "outputs", "arrivals", "message"),
    [
        ([], [], [], "at least one request"),
        ([1, 2], [1], [0, 0], "differ in length"),
        ([1], [1, 2], [0, 0], "differ in length"),
        ([1, 1], [1, 1], [1, 0], "not in order"),
        ([1, 0], [1, 1], [0, 0], "at least one token"),
        ([1, 1], [0, 1], [0, 0], "at least one token"),
    ],
)
def test_a_workload_that_means_nothing_is_refused(
    prompts: list[int], outputs: list[int], arrivals: list[float], message: str
) -> None:
    """Empty, ragged, disordered or token-less requests raise with a reason."""
    with pytest.raises(ValueError, match=message):
        workload(prompts, outputs, arrivals)


def test_equal_arrivals_are_in_order() -> None:
    """Requests may arrive together."""
    assert workload([1, 1], [1, 1], [3, 3]).num_requests == 2


@pytest.mark.parametrize(("concurrency", "known"), [(0, 4), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_a_closed_loop_knows_only_its_first_arrivals(concurrency: int, known: int) -> None:
    """Open loop knows all; a closed loop as many as it has clients."""
    requests = workload([1] * 4, [1] * 4, concurrency=concurrency)
    assert requests.known.tolist() == list(range(known))


def test_poisson_arrivals_start_at_zero_and_have_the_rate() -> None:
    """The mean gap of 100,000 is within four standard errors (1.3 %) of 1 / rate."""
    arrival_s = poisson_arrivals_s(100_001, 4.0, seed=3)
    gaps_s = np.diff(arrival_s)
    assert arrival_s[0] == 0.0
    assert gaps_s.min() >= 0
    # An exponential's standard deviation is its mean, so the error of the mean is 1 / sqrt(n).
    tolerance = 4 / np.sqrt(100_000)
    assert gaps_s.mean() == pytest.approx(0.25, rel=tolerance)
    # Its squared coefficient of variation is 1; the error of that is sqrt(8 / n).
    variation = gaps_s.var() / gaps_s.mean() ** 2
    assert variation == pytest.approx(1.0, abs=4 * np.sqrt(8 / 100_000))


def test_poisson_arrivals_scale_with_the_rate_and_depend_on_the_seed() -> None:
    """One seed at twice the rate is the same pattern twice as fast; another seed differs."""
    slow, fast = poisson_arrivals_s(50, 2.0, seed=1), poisson_arrivals_s(50, 4.0, seed=1)
    np.testing.assert_allclose(slow, 2 * fast, rtol=1e-12)
    assert np.array_equal(slow, poisson_arrivals_s(50, 2.0, seed=1))
    assert not np.array_equal(slow, poisson_arrivals_s(50, 2.0, seed=2))


def test_uniform_lengths_include_both_ends() -> None:
    """Each whole number from low to high is drawn, about equally often, and nothing else."""
    drawn = uniform_lengths(6000, 3, 8, np.random.default_rng(0))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6, 7, 8]
    # Binomial standard deviation sqrt(6000 * 5 / 36) = 29; four of them.
    assert np.abs(counts - 1000).max() < 116
    assert drawn.dtype == np.int64
    assert uniform_lengths(5, 7, 7, np.random.default_rng(0)).tolist() == [7] * 5


def test_a_request_too_long_for_the_blocks_is_refused() -> None:
    """17 tokens need 5 blocks of 4; with 4 the run would never end."""
    what = workload([10], [7])
    assert Run(what, 1, limits(blocks=5), linear_cost(), GATED).finish().iterations == 7
    with pytest.raises(ValueError, match="a request of 17 tokens needs more than the 4 KV blocks"):
        Run(what, 1, limits(blocks=4), linear_cost(), GATED)


def test_a_request_longer_than_the_compiled_context_is_refused() -> None:
    """The cost has no time for tokens beyond its last column."""
    short = linear_cost(max_context=16)
    assert Run(workload([10], [6]), 1, limits(), short, GATED).finish().iterations
    with pytest.raises(ValueError, match="the cost is compiled for 16"):
        Run(workload([10], [7]), 1, limits(), short, GATED)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seqs": 3}, "3 sequences occur; the cost is compiled for 2"),
        ({"tokens": 300}, "300 tokens of one iteration occur"),
        ({"seqs": 0}, "max_num_seqs is 0"),
        ({"tokens": 0}, "the token budget 0; both must be >= 1"),
    ],
)
def test_batches_beyond_the_compiled_cost_are_refused(bad: dict[str, int], message: str) -> None:
    """The loops do not check their indices, so a run that could leave the cost never starts."""
    cost = linear_cost(max_seqs=2, max_tokens=256)
    requests = workload([1] * 10, [1] * 10)
    with pytest.raises(ValueError, match=message):
        Run(requests, 1, limits(**{"seqs": 2, "tokens": 64, **bad}), cost, GATED)


@pytest.mark.parametrize("arrival_s", [[0.0, np.nan], [0.0, np.inf]])
def test_arrivals_that_are_no_time_are_refused(arrival_s: list[float]) -> None:
    """A request that never arrives would keep the loop waiting for ever."""
    with pytest.raises(ValueError, match="finite"):
        workload([1, 1], [1, 1], arrival_s)


GAPS = 200_000

# First draws of seed 0.
GAMMA = [0.0, 0.144876717675388, 1.0732591872772694, 1.1563502360226616]
WEIBULL = [0.0, 0.0998958141414446, 0.19319948769995843, 0.3524532208693556]
DIURNAL = [0.3950353732317964, 0.5164273746428654, 0.6929188309823, 1.6223785016986607]
LOGNORMAL = [775, 198, 1327, 784, 73]


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_arrivals_have_the_rate_and_the_variation(cv: float) -> None:
    """Mean and CV of 200,000 gaps are within four standard errors of what was asked."""
    gaps_s = np.diff(gamma_arrivals_s(GAPS + 1, 4.0, cv, seed=5))
    assert gaps_s.mean() == pytest.approx(0.25, rel=4 * cv / np.sqrt(GAPS))
    # Excess kurtosis of a Gamma is 6 cv**2, so Var(s**2) / s**4 = (2 + 6 cv**2) / n; with the
    # covariance of mean and variance (skewness 2 cv) that of the CV is (1 + cv**2) / (2 n).
    measured = gaps_s.std() / gaps_s.mean()
    assert measured == pytest.approx(cv, rel=4 * np.sqrt((1 + cv**2) / (2 * GAPS)))


@pytest.mark.parametrize(("shape", "variation"), [(0.5, np.sqrt(5)), (1.0, 1.0), (2.0, 0.5227232)])
def test_weibull_arrivals_have_the_rate_and_the_variation(shape: float, variation: float) -> None:
    """Known CVs: sqrt(5) at shape 1/2, 1 at 1 (exponential), sqrt(4/pi - 1) at 2 (Rayleigh)."""
    gaps_s = np.diff(weibull_arrivals_s(GAPS + 1, 4.0, shape, seed=5))
    assert gaps_s.mean() == pytest.approx(0.25, rel=4 * variation / np.sqrt(GAPS))
    # The tail at shape 1/2 is heavy (kurtosis 87.7): standard error 1 % of the CV.
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(variation, rel=0.03)


def test_gamma_and_weibull_of_variation_one_are_poisson() -> None:
    """Kolmogorov's distance to the exponential law stays below its 0.1 % bound, 1.95 / sqrt(n)."""
    for arrival_s in (
        gamma_arrivals_s(GAPS + 1, 1.0, 1.0, seed=1),
        weibull_arrivals_s(GAPS + 1, 1.0, 1.0, seed=1),
        diurnal_arrivals_s(GAPS + 1, 1.0, 0.0, 10.0, seed=1),
    ):
        law = 1 - np.exp(-np.sort(np.diff(arrival_s)))
        assert np.abs(law - np.arange(GAPS) / GAPS).max() < 1.95 / np.sqrt(GAPS)


def test_diurnal_arrivals_follow_the_sine() -> None:
    """Counts by phase over 100 periods are Poisson about the integral of the rate."""
    rate, amplitude, period_s, periods, bins = 10.0, 0.8, 200.0, 100, 20
    arrival_s = diurnal_arrivals_s(260_000, rate, amplitude, period_s, seed=2)
    whole = arrival_s[arrival_s < periods * period_s]
    assert arrival_s[-1] > periods * period_s
    counts, edges = np.histogram(whole % period_s, bins=bins, range=(0, period_s))
    angle = 2 * np.pi * edges / period_s
    expected = (
        periods
        * rate
        * (np.diff(edges) - amplitude * period_s / (2 * np.pi) * np.diff(np.cos(angle)))
    )
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()
    # 4.5 sigma of the whole
    assert abs(len(whole) - rate * periods * period_s) < 4.5 * np.sqrt(rate * periods * period_s)


def test_windowed_arrivals_follow_rates_and_shapes() -> None:
    """Each window has its rate and its variation, and an idle one has no arrival."""
    windows = RateWindows(
        start_s=(1000.0, 11000.0, 21000.0, 31000.0),
        end_s=(11000.0, 21000.0, 31000.0, 41000.0),
        rate=(5.0, 0.0, 20.0, 1.0),
        is_weibull=(False, False, True, False),
        shape=(0.25, 1.0, 0.5, 4.0),
    )
    assert windows.mean_requests == 260_000
    arrival_s = windowed_arrivals_s(windows, None, seed=4)
    assert arrival_s[0] == 0.0
    for start_s, rate, cv in ((0, 5.0, 2.0), (20000, 20.0, np.sqrt(5)), (30000, 1.0, 0.5)):
        inside = arrival_s[(arrival_s >= start_s) & (arrival_s < start_s + 10000)]
        # Counts of a renewal process have the variance cv**2 times the mean.
        count = rate * 10000
        assert abs(len(inside) - count) < 4 * cv * np.sqrt(count)
        gaps_s = np.diff(inside)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)
    assert not ((arrival_s > 10000) & (arrival_s < 20000)).any()
    assert np.array_equal(windowed_arrivals_s(windows, 100, seed=4), arrival_s[:100])


def test_lognormal_lengths_have_mean_and_variation() -> None:
    """Both within 2 %, whole numbers from 1, and cut at the longest."""
    drawn = lognormal_lengths(GAPS, 500.0, 1.2, None, generator(7, PROMPTS))
    assert drawn.dtype == np.int64
    assert drawn.min() >= 1
    assert drawn.mean() == pytest.approx(500, rel=4 * 1.2 / np.sqrt(GAPS))
    assert drawn.std() / drawn.mean() == pytest.approx(1.2, rel=0.04)
    # The median is exp(mu) = mean / sqrt(1 + cv**2).
    assert np.median(drawn) == pytest.approx(500 / np.sqrt(1 + 1.2**2), rel=0.01)
    cut = lognormal_lengths(GAPS, 500.0, 1.2, 900, generator(7, PROMPTS))
    assert np.array_equal(cut, np.minimum(drawn, 900))
    assert lognormal_lengths(50, 1.0, 0.01, None, generator(7, PROMPTS)).tolist() == [1] * 50


def test_streams_of_one_seed_are_independent() -> None:
    """Gaps and lengths of one seed do not go together: 4 standard errors of a correlation."""
    gaps_s = np.diff(gamma_arrivals_s(GAPS + 1, 1.0, 1.0, seed=3))
    prompts = lognormal_lengths(GAPS, 500.0, 1.0, None, generator(3, PROMPTS))
    outputs = lognormal_lengths(GAPS, 500.0, 1.0, None, generator(3, OUTPUTS))
    for one, other in ((gaps_s, prompts), (gaps_s, outputs), (prompts, outputs)):
        ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
        assert abs(np.corrcoef(*ranks)[0, 1]) < 4 / np.sqrt(GAPS)


def test_draws_of_a_seed_stay_what_they_are() -> None:
    """Figures that a scenario with this seed gave must be found again by later versions."""
    near = pytest.approx
    assert gamma_arrivals_s(4, 2.0, 2.5, 0).tolist() == near(GAMMA, rel=1e-12)
    assert weibull_arrivals_s(4, 2.0, 0.7, 0).tolist() == near(WEIBULL, rel=1e-12)
    assert diurnal_arrivals_s(4, 2.0, 0.5, 9.0, 0).tolist() == near(DIURNAL, rel=1e-12)
    assert lognormal_lengths(5, 500.0, 1.0, None, generator(0, PROMPTS)).tolist() == LOGNORMAL
