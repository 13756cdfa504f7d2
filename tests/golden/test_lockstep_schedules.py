"""Hand-worked schedules of two attention groups in lockstep, under vLLM's V1 policy.

Requests go to groups in turn: even ones to group 0, odd ones to group 1. A table row reads: start
tick, group, (request, tokens) in running order; a group without work has no row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from simulator.lockstep_cost import BATCH_COLUMNS, graph_sizes_by_tokens, lockstep_ps
from simulator.state import FINISH, FIRST_TOKEN
from tests.builders import GATED, TICK_S, limits, linear_cost, workload
from tests.lockstep import GroupRow, play_groups, rules_of, together
from tests.schedules import TICK_PS, ticks

if TYPE_CHECKING:
    from simulator.engine_rules import Padding
    from simulator.lockstep_cost import Lockstep

OWN_S, SHARED_S = np.zeros(65), np.arange(129.0) * TICK_S
"""A tick for each token of all groups, and nothing else."""


def by_tokens(idle_tokens: int = 0) -> Lockstep:
    """Two groups whose iteration lasts a tick for each token of both."""
    return together(OWN_S, SHARED_S, groups=2, rules=rules_of(idle_tokens=idle_tokens))


def test_groups_begin_together_and_a_group_without_work_runs_along() -> None:
    """Request 1 arrives while group 0 computes alone; it waits for that iteration's end."""
    rows, state = play_groups(
        workload([4, 2], [3, 2], [0.0, TICK_S]), limits(), linear_cost(0.0), by_tokens()
    )
    assert rows == [
        GroupRow(0, 0, [(0, 4)]),  # 4 tokens: 4 ticks; group 1 idles, though 1 arrives at tick 1
        GroupRow(4, 0, [(0, 1)]),  # 1 + 2 tokens: 3 ticks, also for the decode
        GroupRow(4, 1, [(1, 2)]),
        GroupRow(7, 0, [(0, 1)]),  # both decode: 2 ticks
        GroupRow(7, 1, [(1, 1)]),
    ]
    assert ticks(state, FIRST_TOKEN) == [4, 7]
    assert ticks(state, FINISH) == [9, 9]


def test_a_dummy_token_counts_while_the_other_group_works() -> None:
    """The same with a dummy token of the idle group: 5 ticks for the first iteration."""
    rows, state = play_groups(
        workload([4, 2], [3, 4], [0.0, TICK_S]), limits(), linear_cost(0.0), by_tokens(1)
    )
    assert [row[:2] for row in rows] == [(0, 0), (5, 0), (5, 1), (8, 0), (8, 1), (10, 1), (12, 1)]
    assert ticks(state, FINISH) == [10, 14]  # request 1 ends alone, beside a dummy: 2 ticks each


def test_nothing_runs_where_no_group_has_work() -> None:
    """The groups stop, and an arrival in either starts both at its own time."""
    rows, _ = play_groups(
        workload([1, 1, 1], [1, 1, 1], [0.0, 10 * TICK_S, 10.5 * TICK_S]),
        limits(),
        linear_cost(0.0),
        by_tokens(),
    )
    assert rows == [
        GroupRow(0, 0, [(0, 1)]),
        GroupRow(10, 1, [(1, 1)]),
        GroupRow(11, 0, [(2, 1)]),  # arrived at 10.5, while group 1 computed
    ]


def test_overlapped_scheduling_sees_arrivals_an_iteration_late() -> None:
    """Request 1 arrives at tick 1 and misses the batch formed while the first one runs."""
    late = GATED._replace(late_results=True)
    rows, _ = play_groups(
        workload([4, 2], [3, 1], [0.0, TICK_S]), limits(), linear_cost(0.0), by_tokens(), late
    )
    assert rows == [
        GroupRow(0, 0, [(0, 4)]),
        GroupRow(4, 0, [(0, 1)]),
        GroupRow(5, 0, [(0, 1)]),
        GroupRow(5, 1, [(1, 2)]),
    ]


def test_replicas_and_their_groups_take_turns() -> None:
    """Two replicas of two groups: requests 0 to 3 go to replicas 0, 1, 0, 1, then groups."""
    rows, _ = play_groups(
        workload([1, 2, 1, 1], [1, 1, 1, 1]), limits(), linear_cost(0.0), by_tokens(), GATED, 2
    )
    # Replica 0 holds groups 0 and 2, replica 1 groups 1 and 3.
    assert rows == [
        GroupRow(0, 0, [(0, 1)]),
        GroupRow(0, 2, [(2, 1)]),
        GroupRow(0, 1, [(1, 2)]),
        GroupRow(0, 3, [(3, 1)]),
    ]


def test_prompts_wait_until_every_group_has_one() -> None:
    """TensorRT-LLM's balance: requests 2 (group 0) and 3 (group 1) are admitted together.

    At tick 2 group 0 has request 2 and group 1 has none: both go on decoding. At tick 4 request 3
    is there too, and both prompts run. Request 4 waits alone: three iterations later its time is
    up.
    """
    what = workload(
        [1, 1, 1, 1, 1], [20, 20, 20, 20, 1], [0.0, 0.0, TICK_S, 3 * TICK_S, 5 * TICK_S]
    )
    rules = rules_of(hold_iterations=3)
    joined = together(OWN_S, SHARED_S[:129], groups=2, rules=rules)
    rows, _ = play_groups(what, limits(), linear_cost(0.0), joined)
    sizes = [(row.tick, row.group, len(row.batch)) for row in rows[:16]]
    assert sizes == [
        (0, 0, 1),
        (0, 1, 1),
        (2, 0, 1),  # request 2 is held back: wait 1 of 3
        (2, 1, 1),
        (4, 0, 2),  # requests 2 and 3 join their groups
        (4, 1, 2),
        (8, 0, 2),  # request 4, here since tick 5, is held back: wait 1
        (8, 1, 2),
        (12, 0, 2),  # wait 2
        (12, 1, 2),
        (16, 0, 3),  # wait 3: it is let in
        (16, 1, 2),
        (21, 0, 2),
        (21, 1, 2),
        (25, 0, 2),
        (25, 1, 2),
    ]


def test_more_prompts_are_waited_for_where_every_group_has_one() -> None:
    """With ``batching_wait_iters`` 1 two prompts that could run wait for one more iteration."""
    what = workload([1, 1, 1, 1], [20, 20, 2, 2], [0.0, 0.0, TICK_S, TICK_S])
    rules = rules_of(hold_iterations=9, gather_iterations=1)
    joined = together(OWN_S, SHARED_S, groups=2, rules=rules)
    rows, _ = play_groups(what, limits(), linear_cost(0.0), joined)
    assert [(row.tick, len(row.batch)) for row in rows[:6:2]] == [(0, 1), (2, 1), (4, 2)]


def iteration_ticks(joined: Lockstep, batches: list[tuple[int, int, int, int, bool]]) -> float:
    """Ticks of one iteration of (tokens, decodes, context, sampled, has prompts) per group."""
    cost = linear_cost(0.0, context_s=TICK_S, sequence_s=TICK_S)
    table = np.zeros((len(batches), BATCH_COLUMNS), np.int64)
    for row, (tokens, decodes, context, sampled, prompts) in zip(table, batches, strict=True):
        row[:] = tokens, decodes, context, sampled, 0, prompts
    return int(lockstep_ps(cost, joined, table)) / TICK_PS


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        # Own work is a tick per token, experts' two per token, attention one per context token,
        # sampling one per sequence; graphs of 2, 4 and 8 tokens without prompts.
        # Both padded to 4: own 4, attention of the slower 9, experts 2 * 8, sampling 3.
        ([(3, 3, 9, 3, False), (1, 1, 7, 1, False)], 4 + 9 + 16 + 3),
        # An idle group is padded all the same: 2 + 5 + 2 * 4 + 1.
        ([(1, 1, 5, 1, False), (0, 0, 0, 0, False)], 2 + 5 + 8 + 1),
        # Beyond the graphs each brings its own: own 9, experts 2 * (9 + 1), the slower is the
        # second one: 2 (its own graph's) + 20 against 9 + 9 of the first.
        ([(9, 9, 9, 9, False), (1, 1, 20, 1, False)], 22 + 20 + 9),
        # Prompts in one group: no graph for either.
        ([(6, 0, 0, 1, True), (3, 3, 3, 3, False)], 8 + 18 + 3),
    ],
)
def test_an_iteration_lasts_as_long_as_the_slowest_group(
    batches: list[tuple[int, int, int, int, bool]], expected: float
) -> None:
    """Padding, the slower group's attention, and the experts over all groups' tokens."""
    sizes = graph_sizes_by_tokens((2, 4, 8), 64, padded=True)
    own_s = np.maximum(sizes, np.arange(65.0)) * TICK_S  # graphs compute padded tokens too
    joined = together(own_s, 2 * TICK_S * np.arange(129.0), groups=2, sizes=sizes)
    assert iteration_ticks(joined, batches) == expected


@pytest.mark.parametrize(
    ("padding", "tokens", "expected"),
    [
        ("none", (6, 1), 6 + 2 * 7),
        ("widest", (6, 1), 6 + 2 * 12),
        ("widest_if_half", (6, 0), 6 + 2 * 12),  # exactly half of 12 are real
        ("widest_if_half", (6, 0, 0), 6 + 2 * 6),  # a third of 18 are
    ],
)
def test_padding_without_a_graph(
    padding: Padding, tokens: tuple[int, ...], expected: float
) -> None:
    """How many tokens the experts meet where groups differ, by engine."""
    rules = rules_of(padding=padding)
    own_s, shared_s = np.arange(65.0) * TICK_S, 2 * TICK_S * np.arange(193.0)
    joined = together(own_s, shared_s, groups=len(tokens), rules=rules)
    assert iteration_ticks(joined, [(n, 0, 0, 0, False) for n in tokens]) == expected


def test_graph_sizes() -> None:
    """Padded up to the next captured size, or replayed at captured sizes alone."""
    assert graph_sizes_by_tokens((1, 2, 4), 6, padded=True).tolist() == [0, 1, 2, 4, 4, 0, 0]
    assert graph_sizes_by_tokens((1, 2, 4), 6, padded=False).tolist() == [0, 1, 2, 0, 4, 0, 0]
    assert graph_sizes_by_tokens((), 2, padded=True).tolist() == [0, 0, 0]
