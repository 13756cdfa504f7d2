"""Choosing a plan of each group from predictions alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.choice_groups import Candidate, Group, Run, RunIndex
    from bench.choice_predict import Prediction

_FROM_PARTS: Final = "derived"
"""How the cases file begins the objective of a value computed from mean TTFT and TPOT."""

_NOWHERE: Final = math.inf
"""Stands for the limited metric of a plan that does not fit into memory."""


class _Point(NamedTuple):
    """One load of a plan: its value where it is within the limit, and the limited metric."""

    value: float | None
    limited: float


@dataclass(frozen=True)
class Standing:
    """What is predicted for one plan of a group.

    Parameters
    ----------
    candidate
        The plan.
    value
        Its predicted value at the best load within the limit; ``None`` where no load is.
    excess
        Where no load is within the limit, the lowest predicted value of the limited metric.
    """

    candidate: Candidate
    value: float | None
    excess: float = _NOWHERE


@dataclass(frozen=True)
class Choice:
    """The answer for one group, or why there is none.

    Parameters
    ----------
    group
        The group.
    standings
        Its plans, the chosen one first; empty where the group is not covered.
    why_uncovered
        Empty where it is covered.
    """

    group: Group
    standings: tuple[Standing, ...]
    why_uncovered: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The plan that ranks first."""
        return self.standings[0].candidate if self.standings else None


def choose(
    group: Group, index: RunIndex, predictions: Mapping[tuple[str, ...], Prediction]
) -> Choice:
    """Rank the plans of a group.

    The plan with the best predicted value comes first: of an SLO group its highest throughput per
    GPU at a measured load whose limited metric is predicted within the limit. Plans that are
    within it nowhere come after, nearest to the limit first, and those that do not fit into
    memory last. Ties go by :attr:`~bench.choice_groups.Candidate.tie_key`.

    A group is covered where every plan has a prediction for at least one run; loads of a plan
    that have none take no part.
    """
    try:
        group.limit  # noqa: B018  # raises where the text is not understood
    except ValueError as error:
        return Choice(group, (), str(error))
    standings, reasons = [], set()
    for candidate in group.candidates:
        known = [(run, predictions[run.key]) for run in index.runs_of(group, candidate)]
        points, why = _points(group, candidate, known)
        if points:
            standings.append(_standing(group, candidate, points))
        else:
            reasons.add(why)
    if reasons:
        return Choice(group, (), "; ".join(sorted(reasons)))
    if all(s.value is None and s.excess == _NOWHERE for s in standings):
        return Choice(group, (), "no plan is predicted to fit into memory")
    return Choice(group, tuple(sorted(standings, key=lambda s: _rank(group, s))))


def _points(
    group: Group, candidate: Candidate, known: list[tuple[Run, Prediction]]
) -> tuple[list[_Point], str]:
    """What is predicted at each load of a plan, or why nothing is."""
    if candidate.shape is None:
        return [], f"plan {candidate.plan!r} is not of the form tpA[ppB][dpC][epD]"
    points, missing = [], Counter(["no run joins"] if not known else ())
    for run, prediction in known:
        if not prediction.fits:
            points.append(_Point(None, _NOWHERE))
        elif prediction.reason:
            missing[prediction.reason] += 1
        else:
            try:
                points.append(_point(group, candidate, run, prediction.metrics))
            except (KeyError, ValueError) as error:
                missing[f"not known: {error}"] += 1
    commonest = min(missing, key=lambda reason: (-missing[reason], reason), default="")
    return points, commonest


def _point(group: Group, candidate: Candidate, run: Run, metrics: Mapping[str, float]) -> _Point:
    """One load of a plan.

    Raises
    ------
    KeyError
        If a metric that the group asks for is not predicted.
    ValueError
        If the run's load or output length is no number.
    """
    limited = 0.0 if group.limit is None else metrics[group.limit[0]]
    if group.limit is not None and limited > group.limit[1]:
        return _Point(None, limited)
    return _Point(_value(group, candidate, run, metrics), limited)


def _standing(group: Group, candidate: Candidate, points: list[_Point]) -> Standing:
    values = [point.value for point in points if point.value is not None]
    if values:
        return Standing(candidate, min(values) if group.is_latency else max(values))
    return Standing(candidate, None, min(point.limited for point in points))


def _value(group: Group, candidate: Candidate, run: Run, metrics: Mapping[str, float]) -> float:
    """Predicted value of the group's objective: ms, or tokens/s per GPU."""
    objective = group.objective.lower()
    if objective.startswith(_FROM_PARTS):
        output_tokens = float(run.settings["osl"])
        e2e_ms = metrics["ttft_ms"] + metrics["tpot_ms"] * (output_tokens - 1)
        if group.is_latency:
            return e2e_ms
        return MS_PER_S * float(run.settings["load"]) * output_tokens / e2e_ms / candidate.n_gpus
    if group.is_latency:
        return metrics["e2e_ms"]
    total = objective.startswith("total_throughput")
    return metrics["total_tok_per_s" if total else "output_tok_per_s"] / candidate.n_gpus


def _rank(group: Group, standing: Standing) -> tuple[object, ...]:
    value = standing.value
    if value is None:
        return (1, standing.excess, standing.candidate.tie_key)
    return (0, value if group.is_latency else -value, standing.candidate.tie_key)
