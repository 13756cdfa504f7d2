"""What is known of each plan during a search, and when two plans behave identically."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from planner.objective import Score
    from simulator.plan import Plan
    from simulator.run import RunResult, Usage
    from simulator.state import Limits
    from simulator.timing import IterationCost


UNKNOWN_SCORE: Final = (0, 0)
"""Below every score and every bound, which count at least one device."""


class Fate(str, Enum):
    """How a plan was settled, or that it was not."""

    OPEN = "open"
    BOUNDED = "bounded"
    """Its bound is worse than the best plan; never simulated."""
    ABORTED = "aborted"
    """Its bound passed the best plan's value while it was simulated."""
    SIMULATED = "simulated"
    """Simulated to the end."""
    IDENTICAL = "identical"
    """Behaves exactly as a plan that was simulated: the limits that differ never bind."""
    BREAKS_SLO = "breaks_slo"
    """Its bound, or its run, breaks a constraint."""


@dataclass
class Candidate:
    """A plan of the space and what is known of it.

    Parameters
    ----------
    plan, rank
        The plan and its place in the canonical tie order.
    score
        Its score if ``exact``, else a lower bound on it.
    exact
        Whether ``score`` is the simulated value.
    fate
        How it was settled.
    iterations
        Iterations simulated for it.
    result
        The finished run where it was simulated.
    seen, seen_at
        The plan whose unfinished run raised the bound, its own or one that runs alike so far, and
        the iterations of that run; ``None`` and 0 where the bound is that before any simulation.
    twin
        The plan whose run it shares, where it is identical to one.
    broken
        Names of constraints that it breaks.
    has_own_bound
        Whether a bound for its own limits was looked at, beside that of its family.
    own
        Whether its bound before any simulation rests on its own limits, not on its family's.
    """

    plan: Plan
    rank: int
    score: Score
    exact: bool = False
    fate: Fate = Fate.OPEN
    iterations: int = 0
    result: RunResult | None = None
    seen: Plan | None = None
    seen_at: int = 0
    twin: Plan | None = None
    broken: tuple[str, ...] = ()
    has_own_bound: bool = False
    own: bool = False

    @property
    def is_unknown(self) -> bool:
        """Whether nothing at all is known of it: a search was stopped before its first bound."""
        return not (self.exact or self.broken or self.score > UNKNOWN_SCORE)

    def raise_own(self, score: Score, *, breaks: bool) -> None:
        """Raise the bound to ``score``, which its own limits show before anything is run."""
        if breaks or score > self.score:
            self.score, self.own = score, True

    def raise_to(self, score: Score, seen: Plan, iterations: int) -> None:
        """Raise the bound to ``score``, which ``iterations`` of the run of ``seen`` show."""
        if score > self.score:
            self.score, self.seen, self.seen_at = score, seen, iterations

    @property
    def key(self) -> tuple[Score, int]:
        """Place in the order of plans: score, then the canonical tie order."""
        return self.score, self.rank


@dataclass(frozen=True)
class Trace:
    """How far one plan's run has come and what it used of its limits.

    Parameters
    ----------
    plan, limits, cost
        What ran.
    usage
        Peaks so far, and which limits ever held a request back.
    """

    plan: Plan
    limits: Limits
    cost: IterationCost
    usage: Usage

    def same_for(self, plan: Plan, limits: Limits, cost: IterationCost) -> bool:
        """Whether ``plan`` runs through the same states as far as this run has come.

        It does if both have the same shape, if each limit that differs neither held anything
        back here nor lies below what was used, and if the costs agree wherever they were used.
        """
        used = self.usage
        if not plan.same_devices(self.plan):
            return False
        pairs = (
            (limits.max_num_seqs, self.limits.max_num_seqs, used.seats, used.seats_bound),
            (
                limits.max_num_batched_tokens,
                self.limits.max_num_batched_tokens,
                used.tokens,
                used.tokens_bound,
            ),
            (limits.num_blocks, self.limits.num_blocks, used.demanded_blocks, used.blocks_bound),
        )
        for theirs, ours, peak, bound in pairs:
            if theirs != ours and (bound or theirs < peak):
                return False
        return self._costs_agree(cost)

    def _costs_agree(self, other: IterationCost) -> bool:
        mine, tokens, seats = self.cost, self.usage.tokens + 1, self.usage.seats + 1
        used = {"decode_ps": tokens, "mixed_ps": tokens, "sampled_ps": seats, "attention_ps": seats}
        return all(
            np.array_equal(a[:, : used[name]], b[:, : used[name]])
            if name in used
            else np.array_equal(a, b)
            for name, a, b in zip(mine._fields, mine, other, strict=True)
            if name not in ("attention_slope_ps", "send_ps")  # follow from, or go with, the others
        )
