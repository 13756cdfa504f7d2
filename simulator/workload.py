"""The requests of one run: when they arrive and how long they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]


def _no_ints() -> Ints:
    return np.zeros(0, np.int64)


def _no_floats() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True)
class Workload:
    """Requests in arrival order.

    Parameters
    ----------
    arrival_s
        (N,) float64, seconds from the start, non-decreasing. In a closed loop only the first
        ``concurrency`` entries (all zero) are known beforehand; the others are decided by the run,
        as are those of requests that follow another.
    prompt_tokens, output_tokens
        (N,) int64, at least 1.
    concurrency
        Requests in flight in a closed loop; 0 means open loop.
    after
        (N,) the earlier request whose finish sends this one, or -1 (sessions of several turns);
        empty: none.
    think_s
        (N,) from that finish to the send, seconds; empty with ``after``.
    block_ids
        Content of the full blocks of every prompt, one prompt after another: equal ids mean the
        same tokens and the same tokens before them. 0 .. K - 1 in order of first appearance; empty
        where no content is known.
    block_starts
        (N + 1,) where each prompt's ids begin in ``block_ids``; empty with it.
    block_tokens
        Tokens of one such block; 0 without.

    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    concurrency: int = 0
    after: Ints = field(default_factory=_no_ints)
    think_s: Floats = field(default_factory=_no_floats)
    block_ids: Ints = field(default_factory=_no_ints)
    block_starts: Ints = field(default_factory=_no_ints)
    block_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        n = len(self.arrival_s)
        if n == 0:
            raise ValueError("a workload needs at least one request")
        if len(self.prompt_tokens) != n or len(self.output_tokens) != n:
            raise ValueError("arrivals, prompts and outputs differ in length")
        if not np.isfinite(self.arrival_s).all():
            raise ValueError("arrivals must be finite")
        if self.concurrency < 0:
            raise ValueError(f"concurrency is {self.concurrency}; it must not be negative")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("every prompt and output needs at least one token")
        self._check_sessions()
        known_s = self.arrival_s[self.known]
        if len(known_s) == 0 or np.any(np.diff(known_s) < 0) or known_s[0] < 0:
            raise ValueError("arrivals are not in order from 0 on")
        self._check_blocks()

    def _check_sessions(self) -> None:
        n = self.num_requests
        if len(self.after) not in (0, n) or len(self.think_s) != len(self.after):
            raise ValueError("after and think_s must be empty or have one entry per request")
        if len(self.after) == 0:
            return
        if self.concurrency:
            raise ValueError("sessions send their own requests: no closed loop with them")
        if np.any(self.after >= np.arange(n)) or np.any(self.after < -1):
            raise ValueError("a request can only follow an earlier one")
        followed = self.after[self.after >= 0]
        if len(np.unique(followed)) != len(followed):
            raise ValueError("two requests follow the same one")
        if not np.isfinite(self.think_s).all() or np.any(self.think_s < 0):
            raise ValueError("think times must be finite and not negative")

    def _check_blocks(self) -> None:
        starts = self.block_starts
        if self.block_tokens == 0:
            if len(starts) or len(self.block_ids):
                raise ValueError("block ids need block_tokens")
            return
        if len(starts) != self.num_requests + 1 or starts[0] != 0:
            raise ValueError("block_starts needs one entry per request and one more")
        blocks = np.diff(starts)
        if np.any(blocks < 0) or starts[-1] != len(self.block_ids):
            raise ValueError("block_starts must ascend to the number of block ids")
        if np.any(blocks * self.block_tokens > self.prompt_tokens):
            raise ValueError("a prompt has more block ids than full blocks")

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    @property
    def known(self) -> Ints:
        """(A,) requests whose arrival is known before the run, in order of arrival."""
        if len(self.after):
            return np.flatnonzero(self.after < 0)
        return np.arange(min(self.concurrency, self.num_requests) or self.num_requests)

    def successors(self) -> Ints:
        """(N,) request that each one's finish sends, or -1; empty without sessions."""
        if len(self.after) == 0:
            return _no_ints()
        successor = np.full(self.num_requests, -1)
        later = np.flatnonzero(self.after >= 0)
        successor[self.after[later]] = later
        return successor


def poisson_arrivals_s(num_requests: int, request_rate: float, seed: int) -> Floats:
    """Arrival times of a Poisson process with mean ``request_rate`` per second, first at 0."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0 / request_rate, num_requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def uniform_lengths(num_requests: int, low: int, high: int, rng: np.random.Generator) -> Ints:
    """Lengths drawn uniformly from the whole numbers low..high, both included, tokens."""
    drawn: npt.NDArray[Any] = rng.integers(low, high + 1, num_requests)
    return drawn.astype(np.int64)
