"""The engine against queueing theory, in scenarios that theory describes exactly.

One seat, one output token and a constant iteration time make a replica a single server with
deterministic service: M/D/1 under Poisson arrivals, D/D/1 under regular ones. Time per prompt token
and exponential lengths make it M/M/1, and time per token in a batch without end makes it processor
sharing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from simulator.run import Run
from simulator.workload import Workload, poisson_arrivals_s
from tests.builders import GATED, TICK_S, limits, linear_cost, workload

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.timing import IterationCost

SERVICE_S = 0.01
REQUESTS = 200_000
SEED = 7
DEVIATIONS = 4.0
"""Standard errors allowed: a right engine fails one seed in 16,000."""


def waits_s(arrival_s: npt.NDArray[np.float64], replicas: int = 1) -> npt.NDArray[np.float64]:
    """Waiting times in a system of single servers with constant service."""
    ones = np.ones(len(arrival_s), np.int64)
    run = Run(
        Workload(arrival_s, ones, ones), replicas, limits(seqs=1), linear_cost(SERVICE_S), GATED
    )
    result = run.finish()
    assert run.iterations == len(arrival_s)
    return result.first_token_s - result.arrival_s - SERVICE_S


def standard_error(value: npt.NDArray[np.float64], begins: npt.NDArray[np.bool_]) -> float:
    """Standard error of the mean by regeneration: busy periods are independent.

    With W_i the sum of values and N_i the customers of busy period i, the ratio estimator W/N of
    the mean m has variance (sum of (W_i - m N_i)^2) / n^2 (Crane and Lemoine 1977).

    Parameters
    ----------
    value
        (n,) of each customer.
    begins
        (n,) whether it begins a busy period.

    """
    starts = np.flatnonzero(begins)
    total = np.add.reduceat(value, starts)
    size = np.diff(np.append(starts, len(value)))
    return float(np.sqrt(np.sum((total - value.mean() * size) ** 2)) / len(value))


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_mean_wait_is_that_of_an_m_d_1_queue(rho: float) -> None:
    """Mean wait equals rho D / (2 (1 - rho)) within four standard errors (3 % to 7 %)."""
    wait_s = waits_s(poisson_arrivals_s(REQUESTS, rho / SERVICE_S, SEED))
    expected_s = rho * SERVICE_S / (2 * (1 - rho))  # Pollaczek-Khinchine, no service variance
    error_s = standard_error(wait_s, wait_s < 1e-9)
    assert error_s < 0.02 * expected_s  # the comparison has teeth
    assert abs(wait_s.mean() - expected_s) < DEVIATIONS * error_s


def test_share_of_requests_that_do_not_wait_is_one_minus_rho() -> None:
    """Poisson arrivals see time averages: a share 1 - rho finds the server idle."""
    rho = 0.6
    wait_s = waits_s(poisson_arrivals_s(REQUESTS, rho / SERVICE_S, SEED))
    # Those who do not wait begin busy periods. Their sizes are Borel: mean 1 / (1 - rho), variance
    # rho / (1 - rho)^3; so N customers begin N (1 - rho) of them, with variance N rho.
    error = np.sqrt(rho / REQUESTS)
    assert abs(np.mean(wait_s < 1e-9) - (1 - rho)) < DEVIATIONS * error


def test_every_wait_follows_lindleys_recursion() -> None:
    """Each wait is what the one before left over: max(0, wait + service - gap)."""
    arrival_s = poisson_arrivals_s(5000, 0.9 / SERVICE_S, SEED)
    expected_s = np.zeros(len(arrival_s))
    for i, gap_s in enumerate(np.diff(arrival_s)):
        expected_s[i + 1] = max(0.0, expected_s[i] + SERVICE_S - gap_s)
    assert expected_s.max() > 5 * SERVICE_S
    np.testing.assert_allclose(waits_s(arrival_s), expected_s, rtol=0, atol=1e-9)


def test_round_robin_splits_a_stream_into_independent_servers() -> None:
    """Replica r of 3 waits exactly as a lone server fed every third request would."""
    arrival_s = poisson_arrivals_s(3000, 3 * 0.8 / SERVICE_S, SEED)
    together_s = waits_s(arrival_s, replicas=3)
    for r in range(3):
        np.testing.assert_array_equal(together_s[r::3], waits_s(arrival_s[r::3]))
    assert together_s.max() > SERVICE_S


def test_regular_arrivals_below_capacity_never_wait() -> None:
    """D/D/1 with gaps longer than, or just as long as, the service has no queue."""
    n = 1000
    for gap in (1, 2, 5):
        arrivals = np.arange(n) * gap * TICK_S
        what = workload([1] * n, [1] * n, arrivals)
        result = Run(what, 1, limits(seqs=1), linear_cost(), GATED).finish()
        assert (result.first_token_s - result.arrival_s == TICK_S).all()


def test_regular_arrivals_above_capacity_wait_longer_and_longer() -> None:
    """D/D/1 with a service of 4 gaps: customer n waits n times the difference, 3 gaps each."""
    n, gap_s = 1000, TICK_S / 4
    arrivals = np.arange(n) * gap_s
    what = workload([1] * n, [1] * n, arrivals)
    result = Run(what, 1, limits(seqs=1), linear_cost(), GATED).finish()
    wait_s = result.first_token_s - result.arrival_s - TICK_S
    assert np.array_equal(wait_s, np.arange(n) * (TICK_S - gap_s))


MEAN_TOKENS = 1000
LONGEST = 1 << 14
"""Of 200,000 draws one in 40 reaches 16 times the mean."""


def exponential_lengths(n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Whole lengths of mean ``MEAN_TOKENS`` and a half, from an exponential law rounded up."""
    drawn = np.ceil(rng.exponential(MEAN_TOKENS, n)).astype(np.int64)
    return np.minimum(drawn, LONGEST)


def cost_per_prompt_token() -> IterationCost:
    """A cost in which a prompt of mean length takes ``SERVICE_S`` and nothing else takes time."""
    token_s = SERVICE_S / MEAN_TOKENS
    size = LONGEST + 1
    return linear_cost(0.0, token_s=token_s, max_tokens=size, max_seqs=1, max_context=size)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_sojourn_is_that_of_an_m_m_1_queue(rho: float) -> None:
    """Time in the system is exponential with mean S / (1 - rho): its mean, and its tail."""
    rng = np.random.default_rng(SEED + 1)  # not the stream of the arrivals
    arrival_s = poisson_arrivals_s(REQUESTS, rho / SERVICE_S, SEED)
    prompts = exponential_lengths(REQUESTS, rng)
    what = Workload(arrival_s, prompts, np.ones(REQUESTS, np.int64))
    under = limits(seqs=1, tokens=LONGEST, blocks=LONGEST)
    result = Run(what, 1, under, cost_per_prompt_token(), GATED).finish()
    time_s = result.finish_s - result.arrival_s
    wait_s = time_s - prompts * SERVICE_S / MEAN_TOKENS
    begins = wait_s < 1e-9
    # A length rounded up is half a token longer: S grows by 1 / 2000, the mean by 1 / (1 - rho) of
    # that. Both are far below the errors.
    mean_s = SERVICE_S / (1 - rho)
    error_s = standard_error(time_s, begins)
    assert error_s < 0.02 * mean_s
    assert abs(time_s.mean() - mean_s) < DEVIATIONS * error_s
    for share in (0.5, 0.1, 0.01):
        beyond = (time_s > -mean_s * np.log(share)).astype(np.float64)
        error = standard_error(beyond, begins)
        assert error < 0.2 * share
        assert abs(beyond.mean() - share) < DEVIATIONS * error


@pytest.mark.parametrize("spread", [False, True])
def test_a_batch_without_end_is_processor_sharing(spread: bool) -> None:
    """With time per token only, the mean sojourn of n tokens is n S / (1 - rho), whatever the law.

    Each round gives every request one token and takes as many token times as there are requests,
    so each of them moves at the n-th part of the speed (Kleinrock 1967). Sharing among equal
    lengths is the one that FCFS would beat by half.
    """
    n, tokens, rho, token_s = 10_000, 120, 0.5, 1e-4
    rng = np.random.default_rng(SEED + 1)  # not the stream of the arrivals
    outputs = rng.choice([tokens // 2, tokens * 3 // 2], n) if spread else np.full(n, tokens)
    arrival_s = poisson_arrivals_s(n, rho / (tokens * token_s), SEED)
    what = Workload(arrival_s, np.ones(n, np.int64), outputs)
    cost = linear_cost(0.0, token_s=token_s)
    result = Run(what, 1, limits(seqs=64, blocks=10_000), cost, GATED).finish()
    assert not result.usage.seats_bound
    stretch = (result.finish_s - result.arrival_s) / (outputs * token_s)
    begins = np.append(True, result.arrival_s[1:] >= np.maximum.accumulate(result.finish_s)[:-1])
    error = standard_error(stretch, begins)
    assert error < 0.03 / (1 - rho)
    # A request first waits for the round under way, of rho / (1 - rho) token times on average seen
    # by Poisson arrivals, at most twice as many by the inspection paradox, of its own 60 or more.
    rounds = 2 * rho / (1 - rho) / outputs.min()
    assert abs(stretch.mean() - 1 / (1 - rho)) < DEVIATIONS * error + rounds
