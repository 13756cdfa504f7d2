"""The state of a run: a few arrays that the engine loop advances in place.

Rows are requests or replicas and columns are named below, so that what one step touches lies
together in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

NEVER_S = np.inf
"""Time of an event that has not been decided."""

# Columns of State.request, (N, 8) int64. HELD_TOKENS is what fits into the pages held.
PROMPT, OUTPUT, COMPUTED, GENERATED, HELD_BLOCKS, HELD_TOKENS, PREEMPTIONS, REPLICA = range(8)
_REQUEST_COLUMNS = 8  # one cache line

# Columns of State.time_s, (N, 4) float64; ARRIVAL is the client's send. NEVER_S until it happens.
ARRIVAL, FIRST_TOKEN, LAST_TOKEN, FINISH = range(4)

# Columns of State.replica, (R, 16) int64: queue and stack positions, running requests, blocks not
# held, whether an iteration is in flight; then largest seats, tokens and blocks used and blocks
# demanded; then whether seats, budget or blocks ever held a request back.
HEAD, TAIL, STACKED, RUNNING, FREE_BLOCKS, IN_FLIGHT = range(6)
PEAK_SEATS, PEAK_TOKENS, PEAK_BLOCKS, PEAK_DEMAND = range(6, 10)
BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS = range(10, 13)
_REPLICA_COLUMNS = 16

# Columns of State.clock_s, (R, 2) float64: the next event, and when the iteration in flight began.
EVENT, STARTED = range(2)

# Entries of State.counters, (4,) int64.
ITERATIONS, FINISHED, NEXT_REQUEST, NEXT_REPLICA = range(4)


class Limits(NamedTuple):
    """What one replica's scheduler may use.

    Attributes
    ----------
    max_num_seqs, max_num_batched_tokens
        Limits of one iteration.
    num_blocks, block_tokens
        KV pages of the replica, and the tokens that one of them holds for one group of layers.
    reserve_full_prompt
        Whether a request is admitted only if all its known tokens fit, not just its first chunk.
    ingress_s
        From arrival to the scheduler's queue.
    growing, windowed, window_blocks, fixed
        Groups of layers that keep every token; groups with a sliding window, and the blocks that
        it spans at most; pages that a sequence holds whatever its length (recurrent state).

    """

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_tokens: int
    reserve_full_prompt: bool
    ingress_s: float
    growing: int = 1
    windowed: int = 0
    window_blocks: int = 0
    fixed: int = 0


class State(NamedTuple):
    """Arrays of one run of N requests on R replicas with S seats each.

    Attributes
    ----------
    request, time_s, replica, clock_s, counters
        Tables whose columns are named above.
    queue
        (R, N) requests waiting for first admission, in arrival order, from HEAD to TAIL.
    preempted
        (R, S) stack of preempted requests; its top is the head of the waiting queue.
    running, scheduled
        (R, S) running requests in admission order, and their tokens in the iteration in flight.

    """

    request: Ints
    time_s: Floats
    queue: Ints
    preempted: Ints
    running: Ints
    scheduled: Ints
    replica: Ints
    clock_s: Floats
    counters: Ints


def initial_state(workload: Workload, replicas: int, limits: Limits) -> State:
    """Fresh state: every request whose arrival is known sits in its replica's queue.

    The router deals requests to replicas in turn, in arrival order.
    """
    n, seats = workload.num_requests, min(limits.max_num_seqs, workload.num_requests)
    known = workload.known_arrivals
    request = np.zeros((n, _REQUEST_COLUMNS), np.int64)
    request[:, PROMPT] = workload.prompt_tokens
    request[:, OUTPUT] = workload.output_tokens
    request[:, REPLICA] = -1
    request[:known, REPLICA] = np.arange(known) % replicas
    time_s = np.full((n, 4), NEVER_S)
    time_s[:known, ARRIVAL] = workload.arrival_s[:known]
    queue = np.zeros((replicas, n), np.int64)
    replica = np.zeros((replicas, _REPLICA_COLUMNS), np.int64)
    replica[:, FREE_BLOCKS] = limits.num_blocks
    clock_s = np.full((replicas, 2), NEVER_S)
    for r in range(min(replicas, known)):
        mine = np.arange(r, known, replicas)
        queue[r, : len(mine)] = mine
        replica[r, TAIL] = len(mine)
        clock_s[r, EVENT] = time_s[mine[0], ARRIVAL] + limits.ingress_s
    return State(
        request=request,
        time_s=time_s,
        queue=queue,
        preempted=np.zeros((replicas, seats), np.int64),
        running=np.zeros((replicas, seats), np.int64),
        scheduled=np.zeros((replicas, seats), np.int64),
        replica=replica,
        clock_s=clock_s,
        counters=np.array([0, 0, known, known % replicas], np.int64),
    )
