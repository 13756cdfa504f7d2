"""The engine against queueing theory, in scenarios that theory describes exactly.

One seat, one output token and a constant iteration time make a replica a single server with
deterministic service: M/D/1 under Poisson arrivals, D/D/1 under regular ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from simulator.engine import advance, empty_gaps
from simulator.run import Run
from simulator.state import EVENT, FINISHED, STARTED, initial_state
from simulator.workload import Workload, poisson_arrivals_s
from tests.builders import TICK_S, limits, linear_cost, workload

if TYPE_CHECKING:
    import numpy.typing as npt

SERVICE_S = 0.01
REQUESTS = 200_000
SEED = 7
DEVIATIONS = 4.0
"""Standard errors allowed: a right engine fails one seed in 16,000."""


def waits_s(arrival_s: npt.NDArray[np.float64], replicas: int = 1) -> npt.NDArray[np.float64]:
    """Waiting times in a system of single servers with constant service."""
    ones = np.ones(len(arrival_s), np.int64)
    one_seat = limits(seqs=1)
    run = Run(Workload(arrival_s, ones, ones), replicas, one_seat, linear_cost(SERVICE_S))
    result = run.finish()
    assert run.iterations == len(arrival_s)
    return result.first_token_s - result.arrival_s - SERVICE_S


def standard_error(wait_s: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean wait by regeneration: busy periods are independent.

    With W_i the sum of waits and N_i the customers of busy period i, the ratio estimator W/N of
    the mean m has variance (sum of (W_i - m N_i)^2) / n^2 (Crane and Lemoine 1977).
    """
    starts = np.flatnonzero(wait_s < 1e-9)  # a customer that does not wait begins a busy period
    total_s = np.add.reduceat(wait_s, starts)
    size = np.diff(np.append(starts, len(wait_s)))
    return float(np.sqrt(np.sum((total_s - wait_s.mean() * size) ** 2)) / len(wait_s))


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_mean_wait_is_that_of_an_m_d_1_queue(rho: float) -> None:
    """Mean wait equals rho D / (2 (1 - rho)) within four standard errors (3 % to 7 %)."""
    wait_s = waits_s(poisson_arrivals_s(REQUESTS, rho / SERVICE_S, SEED))
    expected_s = rho * SERVICE_S / (2 * (1 - rho))  # Pollaczek-Khinchine, no service variance
    error_s = standard_error(wait_s)
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
        result = Run(
            workload([1] * n, [1] * n, arrivals), 1, limits(seqs=1), linear_cost()
        ).finish()
        assert (result.first_token_s - result.arrival_s == TICK_S).all()


def test_regular_arrivals_above_capacity_wait_longer_and_longer() -> None:
    """D/D/1 with a service of 4 gaps: customer n waits n times the difference, 3 gaps each."""
    n, gap_s = 1000, TICK_S / 4
    arrivals = np.arange(n) * gap_s
    result = Run(workload([1] * n, [1] * n, arrivals), 1, limits(seqs=1), linear_cost()).finish()
    wait_s = result.first_token_s - result.arrival_s - TICK_S
    assert np.array_equal(wait_s, np.arange(n) * (TICK_S - gap_s))


@pytest.mark.parametrize("concurrency", [0, 5])
def test_littles_law_holds_on_a_run(concurrency: int) -> None:
    """Mean number in the system, watched event by event, is throughput times mean E2E."""
    rng = np.random.default_rng(SEED)
    n = 60
    prompts, outputs = rng.integers(1, 40, n), rng.integers(1, 30, n)
    what = workload(prompts.tolist(), outputs.tolist(), concurrency=concurrency)
    under = limits(seqs=6, tokens=32, blocks=40)
    cost = linear_cost(TICK_S, token_s=TICK_S / 16, context_s=TICK_S / 64)
    state, gaps = initial_state(what, 1, under), empty_gaps(0)
    area_s = 0.0
    while not advance(state, under, cost, gaps, 1):
        # Between the start and the end of the iteration in flight nobody comes or goes: either
        # all came at time 0, or each finish is replaced until the last request has been sent.
        left = n - int(state.counters[FINISHED])
        inside = min(left, concurrency) if concurrency else left
        area_s += inside * float(state.clock_s[0, EVENT] - state.clock_s[0, STARTED])
    result = Run(what, 1, under, cost).finish()
    assert result.preemptions > 0  # the law holds whatever the scheduler does
    in_system = area_s / result.makespan_s
    throughput = n / result.makespan_s
    assert in_system == pytest.approx(throughput * result.values.e2e_s.mean(), rel=1e-9)
