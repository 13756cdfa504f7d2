"""The requests of one run: when they arrive and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

OPEN_LOOP = 0
CLOSED_LOOP = 1


@dataclass(frozen=True)
class Workload:
    """Requests in arrival order.

    Parameters
    ----------
    arrival_s
        (N,) float64, seconds from the start, non-decreasing. In a closed loop only the first
        ``concurrency`` entries (all zero) are known beforehand; the others are decided by the run.
    prompt_tokens, output_tokens
        (N,) int64, at least 1.
    concurrency
        Requests in flight in a closed loop; 0 means open loop.

    """

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    concurrency: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        n = len(self.arrival_s)
        if n == 0:
            raise ValueError("a workload needs at least one request")
        if len(self.prompt_tokens) != n or len(self.output_tokens) != n:
            raise ValueError("arrivals, prompts and outputs differ in length")
        if not np.isfinite(self.arrival_s).all():
            raise ValueError("arrivals must be finite")
        if np.any(np.diff(self.arrival_s) < 0):
            raise ValueError("arrivals are not in order")
        if self.concurrency < 0:
            raise ValueError(f"concurrency is {self.concurrency}; it must not be negative")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ValueError("every prompt and output needs at least one token")

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    @property
    def known_arrivals(self) -> int:
        """How many arrival times are known before the run."""
        return min(self.concurrency, self.num_requests) or self.num_requests


def poisson_arrivals_s(
    num_requests: int, request_rate: float, seed: int
) -> npt.NDArray[np.float64]:
    """Arrival times of a Poisson process with mean ``request_rate`` per second, first at 0."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0 / request_rate, num_requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def uniform_lengths(
    num_requests: int, low: int, high: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Lengths drawn uniformly from the whole numbers low..high, both included, tokens."""
    drawn: npt.NDArray[Any] = rng.integers(low, high + 1, num_requests)
    return drawn.astype(np.int64)
