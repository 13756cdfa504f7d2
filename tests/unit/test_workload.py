"""Workloads: refusals, known arrivals and random draws."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.run import Run
from simulator.workload import poisson_arrivals_s, uniform_lengths
from tests.builders import limits, linear_cost, workload


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
    assert workload([1] * 4, [1] * 4, concurrency=concurrency).known_arrivals == known


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
    assert Run(what, 1, limits(blocks=5), linear_cost()).finish().iterations == 7
    with pytest.raises(ValueError, match="a request of 17 tokens needs more than the 4 KV blocks"):
        Run(what, 1, limits(blocks=4), linear_cost())


def test_a_request_longer_than_the_compiled_context_is_refused() -> None:
    """The cost has no time for tokens beyond its last column."""
    assert Run(workload([10], [6]), 1, limits(), linear_cost(max_context=16)).finish().iterations
    with pytest.raises(ValueError, match="the cost is compiled for 16"):
        Run(workload([10], [7]), 1, limits(), linear_cost(max_context=16))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seqs": 3}, "3 sequences occur; the cost is compiled for 2"),
        ({"tokens": 300}, "300 tokens of one iteration occur"),
        ({"seqs": 0}, "max_num_seqs is 0"),
        ({"seqs": 9, "tokens": 8}, r"max_num_seqs is 9; it must be from 1 to .* \(8\)"),
    ],
)
def test_batches_beyond_the_compiled_cost_are_refused(bad: dict[str, int], message: str) -> None:
    """The loops do not check their indices, so a run that could leave the cost never starts."""
    cost = linear_cost(max_seqs=2, max_tokens=256)
    requests = workload([1] * 10, [1] * 10)
    with pytest.raises(ValueError, match=message):
        Run(requests, 1, limits(**{"seqs": 2, "tokens": 64, **bad}), cost)


@pytest.mark.parametrize("arrival_s", [[0.0, np.nan], [0.0, np.inf]])
def test_arrivals_that_are_no_time_are_refused(arrival_s: list[float]) -> None:
    """A request that never arrives would keep the loop waiting for ever."""
    with pytest.raises(ValueError, match="finite"):
        workload([1, 1], [1, 1], arrival_s)
