"""What a run amounts to: the formula of every metric, in one place.

TTFT = first token - arrival, queueing included. E2E = last token - arrival.
TPOT = (E2E - TTFT) / (output tokens - 1), defined for two output tokens or more.
ITL = gaps between consecutive tokens of one request, over all requests.
Percentiles interpolate linearly between order statistics (numpy's default method).
Throughput counts over the makespan: first arrival to last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)
STATISTICS = ("mean", *(f"p{q}" for q in PERCENTILES))

_OVERLOAD_GROWTH = 2.0
"""A run counts as overloaded when the mean TTFT of its last third of arrivals exceeds
that of its first third by this factor and by ``_OVERLOAD_SHARE`` of the arrival span: a backlog
that a longer trace would only make longer."""
_OVERLOAD_SHARE = 0.05


@dataclass(frozen=True)
class Latencies:
    """Per-request latencies in seconds, (N,) each; ``tpot_s`` is NaN for one-token outputs."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats

    def of(self, metric: str) -> Floats:
        """The defined values of ``ttft``, ``tpot`` or ``e2e``, seconds."""
        if metric == "tpot":
            return self.tpot_s[~np.isnan(self.tpot_s)]
        return self.ttft_s if metric == "ttft" else self.e2e_s


def latencies(
    arrival_s: Floats, first_token_s: Floats, finish_s: Floats, output_tokens: npt.NDArray[np.int64]
) -> Latencies:
    """Per-request latencies from per-request times; also of lower bounds on those times."""
    gaps = output_tokens - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(gaps > 0, (finish_s - first_token_s) / gaps, np.nan)
    return Latencies(first_token_s - arrival_s, tpot, finish_s - arrival_s)


def statistic_s(values_s: Floats, statistic: str) -> float:
    """``mean`` or ``pNN`` of ``values_s``; 0 if there is none.

    Both are monotone in every entry, which is what makes a bound per request a bound here.
    """
    if len(values_s) == 0:
        return 0.0
    if statistic == "mean":
        # Summation order is fixed by the array, so the result is the same on every run.
        return float(np.add.reduce(values_s) / len(values_s))
    return float(np.percentile(values_s, float(statistic[1:])))


def weighted_statistic_s(values_s: Floats, weights: npt.NDArray[np.int64], statistic: str) -> float:
    """``mean`` or ``pNN`` of values of which entry ``i`` occurs ``weights[i]`` times."""
    total = int(weights.sum())
    if total == 0:
        return 0.0
    if statistic == "mean":
        return float(np.dot(values_s, weights) / total)
    order = np.argsort(values_s, kind="stable")
    ends = np.cumsum(weights[order])
    position = (total - 1) * float(statistic[1:]) / 100.0
    low = int(np.floor(position))
    high = min(low + 1, total - 1)
    below, above = values_s[order[np.searchsorted(ends, [low, high], side="right")]]
    return float(below + (above - below) * (position - low))


def makespan_s(workload_start_s: float, finish_s: Floats) -> float:
    """From the first arrival to the last token, seconds."""
    return float(finish_s.max() - workload_start_s)


def good(values: Latencies, limits_s: Mapping[str, float]) -> npt.NDArray[np.bool_]:
    """Which requests meet every limit (metric name to seconds); no TPOT counts as met."""
    met = np.ones(len(values.ttft_s), np.bool_)
    for metric, limit_s in limits_s.items():
        value_s = {"ttft": values.ttft_s, "tpot": values.tpot_s, "e2e": values.e2e_s}[metric]
        met &= ~(value_s > limit_s)  # NaN compares false: an undefined TPOT breaks nothing
    return met


def overloaded(values: Latencies, arrival_s: Floats) -> bool:
    """Whether the backlog grows over the run, so that its figures are no steady state."""
    third = len(arrival_s) // 3
    span_s = float(arrival_s[-1] - arrival_s[0])
    if third == 0 or span_s == 0.0:
        return False
    early, late = values.ttft_s[:third].mean(), values.ttft_s[-third:].mean()
    return bool(late > _OVERLOAD_GROWTH * early and late - early > _OVERLOAD_SHARE * span_s)


def summary(
    values: Latencies,
    workload: Workload,
    span_s: float,
    gaps: tuple[Floats, npt.NDArray[np.int64]] | None,
    goodput_limits_s: Mapping[str, float],
) -> dict[str, float]:
    """Metrics under the names of ``vllm bench serve``.

    Parameters
    ----------
    values, workload
        Latencies of the run and what ran.
    span_s
        Makespan, seconds.
    gaps
        Gaps between tokens and their counts, or ``None`` if they were not recorded.
    goodput_limits_s
        Limits per request; empty leaves goodput out.

    """
    out: dict[str, float] = {
        "completed": workload.num_requests,
        "duration": span_s,
        "total_input_tokens": int(workload.prompt_tokens.sum()),
        "total_output_tokens": int(workload.output_tokens.sum()),
    }
    tokens_in, tokens_out = out["total_input_tokens"], out["total_output_tokens"]
    out["request_throughput"] = workload.num_requests / span_s
    out["output_throughput"] = tokens_out / span_s
    out["total_token_throughput"] = (tokens_in + tokens_out) / span_s
    if goodput_limits_s:
        met = int(good(values, goodput_limits_s).sum())
        out["request_goodput"] = met / span_s
        out["slo_attainment"] = met / workload.num_requests
    for metric, key in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2el")):
        for statistic in STATISTICS:
            value_s = statistic_s(values.of(metric), statistic)
            out[f"{statistic}_{key}_ms"] = value_s * MS_PER_S
    if gaps is not None:
        for statistic in STATISTICS:
            out[f"{statistic}_itl_ms"] = weighted_statistic_s(*gaps, statistic) * MS_PER_S
    return out
