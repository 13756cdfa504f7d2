"""What every iteration of a run did: the log that the plain loop fills, and the arrays it becomes.

The loop writes one row per iteration into a buffer that the caller empties when it is full, so it
allocates nothing. Without a log it is compiled without these lines and loses no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import inner
from simulator.state import ENDS, FREE_BLOCKS, HEAD, RUNNING, STACKED, TAIL
from simulator.timing import in_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from simulator.policies.batch import Batch
    from simulator.state import Limits, State

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

# Columns of IterationLog.counts.
_REPLICA, _TOKENS, _DECODES, _SAMPLED, _RUNNING, _WAITING, _FREE = range(7)
_COUNT_COLUMNS = 7


class IterationLog(NamedTuple):
    """Buffer of C iterations in the order in which they start.

    Attributes
    ----------
    times_ps
        (C, 2) start and end.
    counts
        (C, 7) columns named above.
    used
        (1,) rows filled.

    """

    times_ps: Ints
    counts: Ints
    used: Ints


def empty_log(capacity: int) -> IterationLog:
    """Room for ``capacity`` iterations."""
    times_ps, counts = (np.zeros((capacity, n), np.int64) for n in (2, _COUNT_COLUMNS))
    return IterationLog(times_ps, counts, np.zeros(1, np.int64))


@inner
def log_iteration(
    log: IterationLog, state: State, batch: Batch, r: int, slot: int, now_ps: int
) -> None:
    """Write down the batch that replica ``r`` has just begun in ``slot``; there must be room."""
    row = log.used[0]
    log.used[0] = row + 1
    log.times_ps[row, 0] = now_ps
    log.times_ps[row, 1] = state.slot[r, slot, ENDS]
    replica, counts = state.replica, log.counts
    counts[row, _REPLICA] = r
    counts[row, _TOKENS] = batch.tokens
    counts[row, _DECODES] = batch.decodes
    counts[row, _SAMPLED] = batch.sampled
    counts[row, _RUNNING] = replica[r, RUNNING]
    counts[row, _WAITING] = replica[r, TAIL] - replica[r, HEAD] + replica[r, STACKED]
    counts[row, _FREE] = replica[r, FREE_BLOCKS]


@dataclass(frozen=True)
class Iterations:
    """Every iteration of a run, in order of start, the lower replica first; arrays are (I,).

    Parameters
    ----------
    replica
        Where it ran.
    start_s, end_s
        When it ran, on the clock of the arrivals.
    tokens
        Tokens computed.
    decodes
        Those of them that continue a sequence with all else cached, one per sequence; the rest
        are prompt tokens, which a preempted request computes again together with its output.
    sampled
        Sequences that emit a token when it ends.
    running
        Requests in the batch.
    waiting
        Requests that have reached the scheduler by its start, or were preempted, and are not in
        the batch.
    free_blocks
        KV pages left once the batch is formed, of ``num_blocks`` per replica.
    replicas, num_blocks
        Of the run.

    """

    replica: Ints
    start_s: Floats
    end_s: Floats
    tokens: Ints
    decodes: Ints
    sampled: Ints
    running: Ints
    waiting: Ints
    free_blocks: Ints
    replicas: int
    num_blocks: int

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def prompt_tokens(self) -> Ints:
        """Tokens that are no decodes, (I,)."""
        return self.tokens - self.decodes

    @property
    def kv_usage(self) -> Floats:
        """Share of the replica's KV pages that requests hold, (I,), from 0 to 1."""
        return (self.num_blocks - self.free_blocks) / self.num_blocks


def iterations_of(chunks: Sequence[IterationLog], state: State, limits: Limits) -> Iterations:
    """Join the emptied buffers of a run.

    Parameters
    ----------
    chunks
        Filled rows only, in order.
    state, limits
        Of the run at its end.

    """
    none = empty_log(0)
    times_s = in_s(np.concatenate([none.times_ps, *(chunk.times_ps for chunk in chunks)]))
    counts = np.concatenate([none.counts, *(chunk.counts for chunk in chunks)])
    columns = [np.ascontiguousarray(counts[:, i]) for i in range(_COUNT_COLUMNS)]
    return Iterations(
        replica=columns[_REPLICA],
        start_s=np.ascontiguousarray(times_s[:, 0]),
        end_s=np.ascontiguousarray(times_s[:, 1]),
        tokens=columns[_TOKENS],
        decodes=columns[_DECODES],
        sampled=columns[_SAMPLED],
        running=columns[_RUNNING],
        waiting=columns[_WAITING],
        free_blocks=columns[_FREE],
        replicas=state.replica.shape[0],
        num_blocks=limits.num_blocks,
    )
