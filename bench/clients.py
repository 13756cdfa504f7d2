"""How a measured run's client loaded the server, as a scenario's workload and a window.

The ``arrival`` column of ``runs_columns.md`` names the pattern:

=================== ==============================================================================
closed_loop_burst   ``num_prompts`` requests; ``load`` of them at an empty server at once, then the
                    next one per completion
all_at_once         all ``num_prompts`` queued at time 0
static_batch        one batch of ``load`` requests at time 0, none after it
poisson_rate        open loop, ``load`` requests per second
=================== ==============================================================================

Lengths are uniform between ``*_len_min`` and ``*_len_max`` (equal: fixed), or, where answers ended
by themselves, lognormal with the published mean and median, cut at the cap.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.uncovered import UncoveredError
from simulator.metrics import statistic_s, weighted_statistic_s
from simulator.units import MS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulator.run import RunResult
    from simulator.workload import Workload

MAX_REQUESTS: Final = 30_000
"""Most requests simulated of one run, above every public table's (TensorRT-LLM: 30,000)."""

_ROUNDS: Final = 10
"""Requests per concurrent one where the table does not say: SemiAnalysisAI/InferenceX
``benchmark_lib.sh`` and NVIDIA's AIPerf runner both send ten."""

_LEAST_CV: Final = 0.01
"""Least spread that a scenario's lognormal length takes; below it the length is fixed."""

_CUT: Final = 10
"""Longest length drawn over the mean where no cap is published: of a lognormal with a coefficient
of variation of 1, one draw in 1,400 is longer."""

_PATTERNS: Final = ("closed_loop_burst", "all_at_once", "static_batch", "poisson_rate")


@dataclass(frozen=True)
class Client:
    """The requests of a run.

    Parameters
    ----------
    arrival
        Pattern, as in the module's table.
    requests
        Number simulated.
    concurrency
        Requests in flight of a closed loop, else 0.
    rate
        Requests per second of an open loop, else 0.
    input_tokens, output_tokens
        Lengths as a scenario spells them: ``{min, max}`` or ``{mean, cv, max}``.
    longest_tokens
        Most tokens of one request, prompt and output.
    steady_seats
        Running requests that open and close the window of the mean throughput, or 0 for the whole
        run: it opens once so many first tokens are seen, and closes when one more than so many
        requests are left.
    assumed
        What the row does not say and was taken as given, one word each.

    """

    arrival: str
    requests: int
    concurrency: int
    rate: float
    input_tokens: dict[str, Any]
    output_tokens: dict[str, Any]
    longest_tokens: int
    steady_seats: int
    assumed: tuple[str, ...]

    def workload(self) -> dict[str, Any]:
        """The scenario's ``workload`` section."""
        section: dict[str, Any] = {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "num_requests": self.requests,
        }
        if self.concurrency:
            section["concurrency"] = self.concurrency
        elif self.rate:
            section |= {"arrival": "poisson", "request_rate": self.rate}
        else:
            section["arrival"] = "all_at_once"
        return section

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether every request is like every other."""
        both = (self.input_tokens, self.output_tokens)
        return all("min" in spec and spec["min"] == spec["max"] for spec in both)

    def metrics(self, result: RunResult, workload: Workload) -> dict[str, float]:
        """What the client would have reported, named as the columns of ``runs_columns.md``.

        Latencies are means over requests, except ``e2e_ms`` of a static batch, which is the whole
        batch's. Throughputs count tokens over the run, or output tokens over the steady window.
        ``itl_median_ms`` is there if the run recorded its gaps, ``tpot_ms`` if any request had two
        output tokens.

        Parameters
        ----------
        result, workload
            The finished run and its requests.

        """
        is_batch = self.arrival == "static_batch"
        e2e_s = result.makespan_s if is_batch else statistic_s(result.values.of("e2e"), "mean")
        tokens_in, tokens_out = workload.prompt_tokens.sum(), workload.output_tokens.sum()
        out = {
            "ttft_ms": MS_PER_S * statistic_s(result.values.of("ttft"), "mean"),
            "e2e_ms": MS_PER_S * e2e_s,
            "output_tok_per_s": float(tokens_out) / result.makespan_s,
            "total_tok_per_s": float(tokens_in + tokens_out) / result.makespan_s,
        }
        tpot_s = result.values.of("tpot")
        if len(tpot_s):
            out["tpot_ms"] = MS_PER_S * statistic_s(tpot_s, "mean")
        if self.steady_seats:
            out["output_tok_per_s"] = steady_output_tok_per_s(result, workload, self.steady_seats)
        if result.gaps is not None:
            out["itl_median_ms"] = MS_PER_S * weighted_statistic_s(*result.gaps, "p50")
        return out


def steady_output_tok_per_s(result: RunResult, workload: Workload, seats: int) -> float:
    """Output tokens per second between the ``seats``-th first token and the last full batch.

    The window closes when all but ``seats + 1`` requests have finished (ML.ENERGY leaderboard v3).
    A request's tokens are spread evenly from its first to its last. Where the window is empty the
    whole run counts.
    """
    opens_s = float(np.sort(result.first_token_s)[min(seats, workload.num_requests) - 1])
    closes_s = float(np.sort(result.finish_s)[max(workload.num_requests - seats - 2, 0)])
    if closes_s <= opens_s:
        return float(workload.output_tokens.sum()) / result.makespan_s
    first_s, later = result.first_token_s, workload.output_tokens - 1
    span_s = np.maximum(result.finish_s - first_s, np.finfo(np.float64).tiny)
    inside_s = np.minimum(result.finish_s, closes_s) - np.maximum(first_s, opens_s)
    tokens = float((later * np.maximum(inside_s, 0.0) / span_s).sum())
    tokens += int(((first_s > opens_s) & (first_s <= closes_s)).sum())
    return tokens / (closes_s - opens_s)


def client_of(row: Mapping[str, str]) -> Client:
    """The client of one row.

    Parameters
    ----------
    row
        ``arrival``, ``load``, ``num_prompts``, ``isl``, ``osl``, ``input_len_*``, ``output_len_*``
        and ``metric_window``; all but the first two may be missing or empty.

    Raises
    ------
    UncoveredError
        If the pattern, the load or a length is not known.

    """
    arrival = row.get("arrival") or ""
    if arrival not in _PATTERNS:
        raise UncoveredError(f"arrival {arrival or 'unknown'}")
    assumed: list[str] = []
    load = _number(row.get("load"))
    requests = _number(row.get("num_prompts"))
    if arrival == "all_at_once":
        requests = requests or load  # "1000 requests at once"
    elif not load:
        raise UncoveredError("load unknown")
    elif arrival == "static_batch":
        requests = load
    if not requests and arrival == "all_at_once":
        raise UncoveredError("number of requests unknown")
    if not requests and load:
        requests = _ROUNDS * max(load, 1)
        assumed.append("num_prompts")
    inputs, longest_in = _lengths(row, "input_len", "isl", assumed)
    outputs, longest_out = _lengths(row, "output_len", "osl", assumed)
    if requests and requests > MAX_REQUESTS:
        assumed.append("fewer requests")
    is_steady = (row.get("metric_window") or "").startswith("steady")
    return Client(
        arrival=arrival,
        requests=int(min(requests or 0, MAX_REQUESTS)),
        concurrency=int(load or 0) if arrival == "closed_loop_burst" else 0,
        rate=float(load or 0) if arrival == "poisson_rate" else 0.0,
        input_tokens=inputs,
        output_tokens=outputs,
        longest_tokens=longest_in + longest_out,
        steady_seats=int(load or 0) if is_steady else 0,
        assumed=tuple(assumed),
    )


def _number(text: str | None) -> float:
    """The number that ``text`` begins with, or 0: ``1000 requests at once`` is 1000."""
    match = re.match(r"\s*(\d+(?:\.\d+)?)", text or "")
    return float(match[1]) if match else 0.0


def _lengths(
    row: Mapping[str, str], stem: str, published: str, assumed: list[str]
) -> tuple[dict[str, Any], int]:
    """A length's distribution as a scenario spells it, and the longest one drawn, tokens."""
    low, high, mean, median = (
        _number(row.get(f"{stem}_{part}")) for part in ("min", "max", "mean", "p50")
    )
    if low and high:
        return {"min": int(low), "max": int(high)}, int(high)
    mean = mean or _number(row.get(published))
    if not mean:
        raise UncoveredError(f"{stem} unknown")
    if 0 < median < mean:
        # Of a lognormal, mean / median = exp(s**2 / 2) and cv**2 = exp(s**2) - 1.
        cv = math.sqrt((mean / median) ** 2 - 1)
        cap = int(high or _CUT * mean)
        if cv > _LEAST_CV:
            return {"mean": mean, "cv": cv, "max": cap}, cap
    assumed.append(f"{stem} fixed at its mean")
    return {"min": round(mean), "max": round(mean)}, round(mean)
