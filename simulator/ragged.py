"""Lists of unequal length, one per request, kept as one array and where each list begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

MAX_IDS: Final = 50_000_000
"""Most block ids of one workload: 400 MB, and 1.2 GB at the peak of making them. Mooncake's
conversation trace, 12,031 prompts of 12,035 tokens, has 9 million in blocks of 16."""


def starts_of(counts: Ints) -> Ints:
    """(N + 1,) where each of N lists of ``counts`` entries begins, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(counts)))


def runs(first: Ints, counts: Ints) -> Ints:
    """``first[i], first[i] + 1, ...``, ``counts[i]`` of them, for every ``i`` in turn.

    Raises
    ------
    ValueError
        When there would be more than ``MAX_IDS``.
    """
    starts = starts_of(counts)
    total = int(starts[-1])
    if total > MAX_IDS:
        raise ValueError(f"{total:,} blocks of prompts are above {MAX_IDS:,}")
    entries = np.repeat(first - starts[:-1], counts)
    entries += np.arange(total)
    return entries
