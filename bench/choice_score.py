"""Choices against measured values: the only module that reads any.

A plan's share is its measured value over the best of its group where higher is better, the best
over its own for latencies. Uncovered groups score 0. ``within_3pct`` is the fraction of groups
whose share is at least 0.97.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.choice_groups import read_table
from planner.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bench.choice_groups import Candidate, Group
    from bench.choice_rules import Choice

WITHIN: Final = 0.97
"""Least share that counts as within 3 %."""

_TAIL: Final = 5
"""Percentile of the shares that ``p5_share`` states."""

_RESAMPLES: Final = 10_000
"""Draws of the bootstrap: its bounds then repeat to about half a percentage point."""

_SEED: Final = 0

Values = dict[tuple[str, str], float]
"""Measured values by group and plan."""


def read_values(path: Path) -> Values:
    """Measured values by group and plan.

    Raises
    ------
    InputError
        If a value is no positive number.
    """
    values = {}
    for row in read_table(path, ("group_id", "plan", "value")):
        try:
            value = float(row["value"])
        except ValueError:
            value = 0.0
        if not value > 0:
            raise InputError(
                source=str(path),
                field=f"group {row['group_id']}, value of {row['plan']}",
                value=row["value"],
                rule="must be a positive number",
            )
        values[row["group_id"], row["plan"]] = value
    return values


@dataclass(frozen=True)
class Scored:
    """One group with what the choice and the simple rules score in it.

    Parameters
    ----------
    choice
        The group and what was chosen.
    chosen, best
        The plan chosen, or ``None``, and the plan that measured best (of equals the first by name).
    share
        Share of the chosen plan, 0 where the group is uncovered.
    rules
        By rule: expected share, and chance of a share within 3 %.
    """

    choice: Choice
    chosen: str | None
    best: str
    share: float
    rules: dict[str, tuple[float, float]]


def score_group(choice: Choice, values: Values) -> Scored:
    """Score one group.

    The rules draw evenly among all plans, or among those with the fewest or the most GPUs; their
    scores are expected values.
    """
    plans = choice.group.candidates
    counts = [candidate.n_gpus for candidate in plans]
    drawn = {
        "fewest_gpus": [c for c in plans if c.n_gpus == min(counts)],
        "most_gpus": [c for c in plans if c.n_gpus == max(counts)],
        "random": plans,
    }
    return _scored(choice, drawn, values)


def score_same_gpus(choice: Choice, values: Values) -> Scored:
    """Score one set of plans with equal GPU counts.

    Beside a random plan, the rule ``pure_tp`` takes the plan split by nothing but tensor
    parallelism, and draws evenly where the set has none.
    """
    plans = choice.group.candidates
    pure = [c for c in plans if c.shape is not None and c.shape.is_pure_tp]
    return _scored(choice, {"pure_tp": pure or plans, "random": plans}, values)


def _scored(choice: Choice, drawn: Mapping[str, Sequence[Candidate]], values: Values) -> Scored:
    shares = _shares(choice.group, values)
    rules = {}
    for name, plans in drawn.items():
        own = np.array([shares[candidate.plan] for candidate in plans])
        rules[name] = (float(own.mean()), float((own >= WITHIN).mean()))
    chosen = None if choice.chosen is None else choice.chosen.plan
    best = min(shares, key=lambda plan: (-shares[plan], plan))
    return Scored(choice, chosen, best, shares[chosen] if chosen else 0.0, rules)


def _shares(group: Group, values: Values) -> dict[str, float]:
    """By plan: its measured value over the best, or for latencies the best over it."""
    own = {c.plan: values[group.group_id, c.plan] for c in group.candidates}
    if group.is_latency:
        best = min(own.values())
        return {plan: best / value for plan, value in own.items()}
    best = max(own.values())
    return {plan: value / best for plan, value in own.items()}


def figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Figures of the contract for a set of groups; also of those covered, and over clusters."""
    shares = np.array([s.share for s in scored])
    out: dict[str, Any] = {
        "groups": len(scored),
        "covered": sum(s.chosen is not None for s in scored),
        **_summary(shares, shares >= WITHIN),
        "covered_only": _summary(*_of_covered(scored)),
        "cluster_weighted": _by_cluster(scored),
        "within_3pct_interval": bootstrap([(s.choice.group.cluster, s.share) for s in scored]),
        "rules": {},
    }
    for name in scored[0].rules if scored else ():
        pairs = np.array([s.rules[name] for s in scored])
        out["rules"][name] = _summary(pairs[:, 0], pairs[:, 1])
    return out


def same_gpus_figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Figures of the sets with equal GPU counts, and of those measured at one date."""

    def short(some: Sequence[Scored]) -> dict[str, Any]:
        whole = figures(some)
        rules = {name: rule["within_3pct"] for name, rule in whole["rules"].items()}
        kept = ("covered", "within_3pct", "within_3pct_interval", "mean_share")
        return {"n": len(some), **{name: whole[name] for name in kept}, "rules": rules}

    out = short(scored)
    out["one_date"] = short([s for s in scored if not s.choice.group.mixed_date])
    out["choices"] = [_line(s) for s in scored]
    return out


def choices(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """One entry per group, in the order given."""
    return [_line(s) for s in scored]


def slices(
    scored: Sequence[Scored], labels: dict[str, Callable[[Choice], str]]
) -> dict[str, dict[str, Any]]:
    """Figures by label, as ``name=value``."""
    sets: dict[str, list[Scored]] = {}
    for name, label in labels.items():
        for one in scored:
            sets.setdefault(f"{name}={label(one.choice)}", []).append(one)
    return {name: figures(some) for name, some in sorted(sets.items())}


def uncovered(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Reasons why groups are not covered, commonest first."""
    counts = Counter(s.choice.why_uncovered for s in scored if s.chosen is None)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"reason": reason, "n": n} for reason, n in ordered]


def _line(s: Scored) -> dict[str, Any]:
    return {
        "group_id": s.choice.group.group_id,
        "chosen": s.chosen,
        "best": s.best,
        "share": s.share,
        "why_uncovered": s.choice.why_uncovered or None,
    }


def _summary(shares: Any, within: Any) -> dict[str, float]:
    if not len(shares):
        return {"within_3pct": 0.0, "mean_share": 0.0, "p5_share": 0.0}
    return {
        "within_3pct": float(np.mean(within)),
        "mean_share": float(np.mean(shares)),
        "p5_share": float(np.percentile(shares, _TAIL)),
    }


def _of_covered(scored: Sequence[Scored]) -> tuple[Any, Any]:
    """Shares of covered groups, and which are within 3 %."""
    shares = np.array([s.share for s in scored if s.chosen is not None])
    return shares, shares >= WITHIN


def bootstrap(shares: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The 90 % interval of ``within_3pct`` if other clusters had been measured.

    Whole clusters are drawn with replacement, since the groups of one share its model, device,
    engine and errors (Field and Welsh 2007, the randomised cluster bootstrap); percentiles of the
    fraction over the drawn groups.

    Parameters
    ----------
    shares
        Cluster and share of each group.
    """
    sets: dict[str, list[bool]] = {}
    for cluster, share in shares:
        sets.setdefault(cluster, []).append(share >= WITHIN)
    if not sets:
        return {"low": 0.0, "high": 0.0}
    hits = np.array([sum(own) for _, own in sorted(sets.items())])
    sizes = np.array([len(own) for _, own in sorted(sets.items())])
    drawn = np.random.default_rng(_SEED).integers(len(sets), size=(_RESAMPLES, len(sets)))
    fractions = hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(fractions, (5, 95))
    return {"low": float(low), "high": float(high)}


def _by_cluster(scored: Sequence[Scored]) -> dict[str, float]:
    sets: dict[str, list[float]] = {}
    for s in scored:
        sets.setdefault(s.choice.group.cluster, []).append(s.share)
    each = [np.array(shares) for _, shares in sorted(sets.items())]
    return {
        "clusters": len(each),
        "within_3pct": float(np.mean([(e >= WITHIN).mean() for e in each])) if each else 0.0,
        "mean_share": float(np.mean([e.mean() for e in each])) if each else 0.0,
    }
