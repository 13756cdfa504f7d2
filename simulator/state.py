"""The state of a run: a few arrays that the engine loop advances in place.

Rows are requests, replicas or batches and columns are named below, so that what one step touches
lies together in memory. Clocks are whole picoseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from simulator.prefix_cache import initial_pool
from simulator.rules import ROUND_ROBIN, TRTLLM
from simulator.timing import in_ps

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.prefix_cache import BlockPool
    from simulator.rules import Rules
    from simulator.timing import IterationCost
    from simulator.workload import Workload

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

NEVER_PS: Any = np.int64(np.iinfo(np.int64).max)
"""Time of an event that has not been decided. Not a plain int: numba would compile a function again
for each literal."""

# Columns of State.request, (N, 8) int64. HELD_TOKENS is what fits into the pages held.
PROMPT, OUTPUT, COMPUTED, GENERATED, HELD_BLOCKS, HELD_TOKENS, PREEMPTIONS, REPLICA = range(8)
_REQUEST_COLUMNS = 8  # one cache line

# Columns of State.time_ps, (N, 4); ARRIVAL is the client's send. NEVER_PS until it happens.
ARRIVAL, FIRST_TOKEN, LAST_TOKEN, FINISH = range(4)

# Columns of State.replica, (R, 24) int64: positions in queue and stack, running requests, blocks
# not held; batches in flight, the slot of the oldest of them and that of the next; requests and
# their prompt tokens that it has not finished; seats and blocks of requests that finished while
# the next batch was being formed (Rules.late_results); then largest seats, tokens and blocks used
# and blocks demanded; whether seats, budget or blocks ever held a request back; two that a policy
# may use.
HEAD, TAIL, STACKED, RUNNING, FREE_BLOCKS = range(5)
IN_FLIGHT, OLDEST, NEXT_SLOT = range(5, 8)
OUTSTANDING, OUTSTANDING_TOKENS, LEAVING_SEATS, LEAVING_BLOCKS = range(8, 12)
PEAK_SEATS, PEAK_TOKENS, PEAK_BLOCKS, PEAK_DEMAND = range(12, 16)
BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS = range(16, 19)
POLICY_A, POLICY_B = range(19, 21)
_REPLICA_COLUMNS = 24  # three cache lines

# Columns of State.slot, (R, D, 4) int64: when the batch was formed and will end, how many of its
# requests emit a token then, and the instant up to which it saw arrivals.
STARTED, ENDS, EMITTED, SEEN = range(4)
_SLOT_COLUMNS = 4

_POLICY_COLUMNS = 8  # of State.policy_slot, which a policy names itself

# Entries of State.counters, (8,) int64. NEXT_KNOWN: arrivals known beforehand that have reached
# their replica; NEXT_REQUEST: next request of a closed loop; PENDING: sends under way.
ITERATIONS, FINISHED, NEXT_KNOWN, NEXT_REQUEST, NEXT_REPLICA, PENDING, STUCK = range(7)
_COUNTERS = 8


class Limits(NamedTuple):
    """What one replica's scheduler may use.

    Attributes
    ----------
    max_num_seqs, max_num_batched_tokens
        Limits of one iteration.
    num_blocks, block_tokens
        KV pages of the replica, and the tokens that one of them holds for one group of layers.
    ingress_ps
        From arrival to the scheduler's queue.
    growing, windowed, window_blocks, fixed
        Groups of layers that keep every token; groups with a sliding window, and the blocks that
        it spans at most; pages that a sequence holds whatever its length (recurrent state).

    """

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_tokens: int
    ingress_ps: int
    growing: int = 1
    windowed: int = 0
    window_blocks: int = 0
    fixed: int = 0


class State(NamedTuple):
    """Arrays of one run of N requests on R replicas with S seats and D batches in flight each.

    Attributes
    ----------
    request, time_ps, replica, slot, counters
        Tables whose columns are named above.
    event_ps
        (R,) when each replica next has something to do.
    stage_ps
        (R, P) when each pipeline stage is free.
    prefill_ps
        (K,) prompt attention of the batch being formed, by kind of stage.
    queue
        (R, N) ring of requests waiting for admission, from HEAD to TAIL.
    preempted
        (R, S) stack of preempted requests; its top is ahead of the queue.
    running, scheduled
        (R, S) running requests in admission order, and their tokens in the last batch formed.
    emitting
        (R, D, S) requests that emit a token when their batch ends.
    known
        (A,) requests whose arrival is known beforehand, in order of arrival.
    successor
        (N,) request that the finish of each one sends, or -1; empty without sessions.
    think_ps
        (N,) from that finish to the send; empty without sessions.
    pending_ps, pending
        Heap of sends under way by the time at which they reach a scheduler.
    ratio
        (R,) share of the outstanding output that a policy reserves.
    policy_slot
        (R, D, 8) what a policy keeps per batch in flight.
    policy_request
        (N,) what a policy keeps per request; empty with one batch in flight.
    pool
        Contents of the KV blocks, and what the prefix-aware router knows of them.

    """

    request: Ints
    time_ps: Ints
    replica: Ints
    slot: Ints
    counters: Ints
    event_ps: Ints
    stage_ps: Ints
    prefill_ps: Ints
    queue: Ints
    preempted: Ints
    running: Ints
    scheduled: Ints
    emitting: Ints
    known: Ints
    successor: Ints
    think_ps: Ints
    pending_ps: Ints
    pending: Ints
    ratio: Floats
    policy_slot: Ints
    policy_request: Ints
    pool: BlockPool


def initial_state(
    workload: Workload, replicas: int, limits: Limits, rules: Rules, cost: IterationCost
) -> State:
    """Fresh state: no request has arrived.

    With the round-robin router and without sessions, known arrivals are assigned at once.
    """
    n, depth = workload.num_requests, rules.batches_in_flight
    # TensorRT-LLM's limit is one batch's; the others count every running request.
    seats = min(n, limits.max_num_seqs * (depth if rules.policy == TRTLLM else 1))
    known = workload.known
    request = np.zeros((n, _REQUEST_COLUMNS), np.int64)
    request[:, PROMPT] = workload.prompt_tokens
    request[:, OUTPUT] = workload.output_tokens
    request[:, REPLICA] = -1
    if rules.router == ROUND_ROBIN and len(workload.after) == 0:
        request[known, REPLICA] = np.arange(len(known)) % replicas
    time_ps = np.full((n, 4), NEVER_PS)
    time_ps[known, ARRIVAL] = in_ps(workload.arrival_s[known])
    replica = np.zeros((replicas, _REPLICA_COLUMNS), np.int64)
    replica[:, FREE_BLOCKS] = limits.num_blocks
    counters = np.zeros(_COUNTERS, np.int64)
    counters[NEXT_REQUEST] = len(known)
    dynamic = n if len(known) < n else 0
    return State(
        request=request,
        time_ps=time_ps,
        replica=replica,
        slot=np.zeros((replicas, depth, _SLOT_COLUMNS), np.int64),
        counters=counters,
        event_ps=np.full(replicas, NEVER_PS),
        stage_ps=np.zeros((replicas, len(cost.stages)), np.int64),
        prefill_ps=np.zeros(len(cost.host_ps), np.int64),
        queue=np.zeros((replicas, n), np.int64),
        preempted=np.zeros((replicas, seats), np.int64),
        running=np.zeros((replicas, seats), np.int64),
        scheduled=np.zeros((replicas, seats), np.int64),
        emitting=np.zeros((replicas, depth, seats), np.int64),
        known=known,
        successor=workload.successors(),
        think_ps=in_ps(workload.think_s),
        pending_ps=np.zeros(dynamic, np.int64),
        pending=np.zeros(dynamic, np.int64),
        ratio=np.full(replicas, rules.new_token_ratio),
        policy_slot=np.zeros((replicas, depth, _POLICY_COLUMNS), np.int64),
        policy_request=np.zeros(n if depth > 1 else 0, np.int64),
        pool=initial_pool(workload, replicas, seats, limits.num_blocks, limits.block_tokens, rules),
    )
