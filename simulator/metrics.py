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

from simulator.timing import in_s
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from simulator.workload import Workload

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

PERCENTILES = (50, 90, 95, 99)
STATISTICS = ("mean", *(f"p{q}" for q in PERCENTILES))

_QUEUE_FACTOR = 2.0
_QUEUE_SHARE = 0.0025
"""Requests queue as long as every TTFT is above this factor times the shortest of the run, and
above it by this share of the span of arrivals; the second is what an overload of half a percent
adds in half the span."""
_CENTRE = (0.05, 0.95)
"""Quantiles of first tokens between which their rate is measured: a straggler changes neither."""


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
    arrival_ps: Ints, first_token_ps: Ints, finish_ps: Ints, output_tokens: Ints
) -> Latencies:
    """Per-request latencies from per-request times, picoseconds; also of lower bounds on those."""
    gaps = output_tokens - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        tpot = np.where(gaps > 0, in_s(finish_ps - first_token_ps) / gaps, np.nan)
    return Latencies(in_s(first_token_ps - arrival_ps), tpot, in_s(finish_ps - arrival_ps))


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


def makespan_s(arrival_ps: Ints, finish_ps: Ints) -> float:
    """From the first arrival to the last token, seconds."""
    return float(in_s(finish_ps.max() - arrival_ps.min()))


def good(values: Latencies, limits_s: Mapping[str, float]) -> npt.NDArray[np.bool_]:
    """Which requests meet every limit (metric name to seconds); no TPOT counts as met."""
    met = np.ones(len(values.ttft_s), np.bool_)
    for metric, limit_s in limits_s.items():
        value_s = {"ttft": values.ttft_s, "tpot": values.tpot_s, "e2e": values.e2e_s}[metric]
        met &= ~(value_s > limit_s)  # NaN compares false: an undefined TPOT breaks nothing
    return met


def overloaded(values: Latencies, arrival_s: Floats, workload: Workload | None = None) -> bool:
    """Whether requests arrive faster than they are served, so that a longer run only queues more.

    Two things make it so. Requests queued throughout the second half of the arrivals: the shortest
    TTFT in it is above ``_QUEUE_FACTOR`` times the run's shortest, and by ``_QUEUE_SHARE`` of the
    span of arrivals. Then the rate of first tokens of that half is what the server can serve, and
    it is below the mean rate of all arrivals. A burst at the end, after idle times, passes the
    first and not the second; a queue that empties at times does not pass the first.

    Neither depends on how long the run is, so a longer one of the same arrivals decides alike. Of
    1,000 simulated M/D/1 queues with 1,000 requests each, 0.1 % at a load of 0.9 are called
    overloaded and 99.0 % at 1.1; with 4,000 requests none and all. Loads nearer to 1 take 16,000
    requests: none at 0.97, 99 % at 1.03. Bursts (Gamma gaps, CV 3) take 16 times as many for the
    same certainty. A run so short that its batches are still filling at its end shows no queue and
    is not called overloaded.

    Parameters
    ----------
    values, arrival_s
        Latencies and arrivals of the run.
    workload
        What ran: only requests sent by the clock count, which are none in a closed loop and the
        first turns of sessions. ``None``: all are.

    """
    sent = slice(None) if workload is None else workload.known
    sent_s, ttft_s = arrival_s[sent], values.ttft_s[sent]
    span_s = float(sent_s[-1] - sent_s[0])
    late = sent_s >= sent_s[0] + span_s / 2
    shortest_s = float(ttft_s.min())
    threshold_s = max(_QUEUE_FACTOR * shortest_s, shortest_s + _QUEUE_SHARE * span_s)
    low, high = (int(share * late.sum()) for share in _CENTRE)
    if span_s == 0 or high - low < 2 or ttft_s[late].min() <= threshold_s:
        return False
    first_s = np.sort(sent_s[late] + ttft_s[late])
    served_in_s = float(first_s[high - 1] - first_s[low])
    # (high - 1 - low) / served_in_s < (len - 1) / span_s, without a division by zero
    return (high - 1 - low) * span_s < (len(sent_s) - 1) * served_in_s


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
