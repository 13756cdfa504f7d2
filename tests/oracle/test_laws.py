"""Operational laws: Little's on every run, exactly, and those of closed loops.

A closed loop of thinking users before one server with exponential service is the machine repairman
model, whose throughput mean value analysis gives in closed form.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given, settings

from simulator.run import Run
from simulator.state import ARRIVAL, FINISH, REPLICA
from simulator.timing import in_ps
from simulator.workload import Workload
from tests.builders import GATED, TICK_S, Case, cases, limits, linear_cost, workload

SEED = 11
DEVIATIONS = 4.0
"""Standard errors allowed: a right engine fails one seed in 16,000."""


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_littles_law_holds_on_every_run(case: Case) -> None:
    """The integral of the number in the system is the sum of the times in it, to the picosecond.

    The number is what the log of iterations says, batch by batch; the times are the requests' own.
    The log counts a request from the first batch that starts once it has reached the scheduler. A
    closed loop has one replica here: with several, one that starts a batch does not know what a
    client of the next replica sends at that very instant.
    """
    if case.workload.concurrency:
        case = replace(case, replicas=1)
    run = case.start()
    run.record_iterations()
    result = run.finish()
    log = result.log
    assert log is not None
    event(f"preemptions: {min(result.preemptions, 3)}")
    start_ps, end_ps = in_ps(log.start_s), in_ps(log.end_s)
    area_ps = int(((log.running + log.waiting) * (end_ps - start_ps)).sum())
    time_ps, unseen_ps = run.state.time_ps, 0
    for r in range(case.replicas):
        mine = time_ps[run.state.request[:, REPLICA] == r]
        queued_ps = np.sort(mine[:, ARRIVAL] + case.limits.ingress_ps)
        starts_ps = start_ps[log.replica == r]
        if len(mine):
            seen_ps = starts_ps[np.searchsorted(starts_ps, queued_ps)]
            unseen_ps += int(seen_ps.sum()) - int(mine[:, ARRIVAL].sum())
    assert area_ps + unseen_ps == int((time_ps[:, FINISH] - time_ps[:, ARRIVAL]).sum())


def sessions(users: int, turns: int, think_s: np.ndarray, prompts: np.ndarray) -> Workload:
    """Users who send at time 0 and then, after thinking, again: request i follows i - users."""
    n = users * turns
    after = np.arange(n) - users
    after[:users] = -1
    return Workload(
        np.zeros(n), prompts, np.ones(n, np.int64), after=after, think_s=np.asarray(think_s)
    )


@pytest.mark.parametrize(("users", "think"), [(1, 0), (1, 7), (3, 9), (4, 3), (6, 2)])
def test_a_deterministic_closed_loop_meets_its_bounds(users: int, think: int) -> None:
    """One tick of service and Z of thought: X is the lesser of N / (1 + Z) and 1 per tick.

    Without variance the asymptotic bounds of a closed system (Denning and Buzen 1978) are attained
    once the first round has spread the users out.
    """
    turns = 50
    n = users * turns
    what = sessions(users, turns, np.full(n, think * TICK_S), np.ones(n, np.int64))
    result = Run(what, 1, limits(seqs=1), linear_cost(), GATED).finish()
    ends = np.sort(result.finish_s) / TICK_S
    throughput = (n - users) / (ends[-1] - ends[users - 1])
    assert throughput == pytest.approx(min(users / (1 + think), 1.0), rel=1e-12)


@pytest.mark.parametrize(("users", "think_services"), [(4, 0.0), (8, 5.0), (20, 12.0)])
def test_a_closed_loop_has_the_throughput_of_mean_value_analysis(
    users: int, think_services: float
) -> None:
    """X = N / (R + Z) with R(n) = S (1 + X(n - 1) R(n - 1)), within four standard errors.

    Exponential service on one seat, and thought of any law (here uniform): a product form (Reiser
    and Lavenberg 1980).
    """
    service_s, mean_tokens, longest = 0.01, 1000, 1 << 14
    turns = 40_000 // users
    n = users * turns
    rng = np.random.default_rng(SEED)
    prompts = np.ceil(rng.exponential(mean_tokens, n)).astype(np.int64)
    think_s = rng.uniform(0.0, 2.0, n) * think_services * service_s
    size = longest + 1
    cost = linear_cost(
        0.0, token_s=service_s / mean_tokens, max_tokens=size, max_seqs=1, max_context=size
    )
    under = limits(seqs=1, tokens=longest, blocks=longest)
    what = sessions(users, turns, think_s, prompts)
    result = Run(what, 1, under, cost, GATED).finish()

    response_s, queue = 0.0, 0.0
    for number in range(1, users + 1):
        response_s = service_s * (1 + queue)
        queue = number * response_s / (response_s + think_services * service_s)
    expected = users / (response_s + think_services * service_s)

    # Batch means, without the first tenth and the last, in which users run out of turns.
    ends_s = np.sort(result.finish_s)[n // 10 : -n // 10]
    batches = np.array_split(ends_s, 40)
    rates = np.array([(len(batch) - 1) / (batch[-1] - batch[0]) for batch in batches])
    error = rates.std(ddof=1) / np.sqrt(len(rates))
    assert error < 0.01 * expected
    assert abs(rates.mean() - expected) < DEVIATIONS * error


def test_users_think_between_their_turns_and_nowhere_else() -> None:
    """Each turn is sent a think time after the finish of the one before, to the picosecond."""
    users, turns = 5, 8
    n = users * turns
    rng = np.random.default_rng(SEED)
    what = sessions(users, turns, rng.uniform(0, 0.1, n), rng.integers(1, 30, n))
    run = Run(what, 2, limits(seqs=2), linear_cost(token_s=TICK_S / 64), GATED)
    run.finish()
    time_ps = run.state.time_ps
    sent_ps, finished_ps = time_ps[users:, ARRIVAL], time_ps[:-users, FINISH]
    assert np.array_equal(sent_ps, finished_ps + in_ps(what.think_s[users:]))
    # So responses and thoughts fill each user's time: N T = C (R + Z) but for who ends early.
    whole_ps = (time_ps[:, FINISH] - time_ps[:, ARRIVAL]).sum() + in_ps(what.think_s[users:]).sum()
    assert whole_ps == time_ps[-users:, FINISH].sum()


def test_a_closed_loop_that_fills_its_batch_repeats_itself() -> None:
    """Five clients, five seats, requests of 4 tokens: five of them every 4 ticks, without end."""
    n, clients, tokens = 100, 5, 4
    what = workload([1] * n, [tokens] * n, concurrency=clients)
    result = Run(what, 1, limits(seqs=clients), linear_cost(), GATED).finish()
    assert result.makespan_s == n / clients * tokens * TICK_S
    assert (result.values.e2e_s == tokens * TICK_S).all()
