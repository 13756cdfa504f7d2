"""Clients of measured runs: what they send, and what they would have reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from bench.clients import MAX_REQUESTS, client_of, steady_output_tok_per_s
from bench.uncovered import UncoveredError
from planner.scenario import WorkloadSpec
from simulator.metrics import Latencies

if TYPE_CHECKING:
    from simulator.run import RunResult
    from simulator.workload import Workload

FIXED = {
    "input_len_min": "64",
    "input_len_max": "64",
    "output_len_min": "8",
    "output_len_max": "8",
}


def test_a_burst_keeps_its_load_in_flight() -> None:
    """Ten requests per concurrent one where the row does not say, and that is flagged."""
    client = client_of({"arrival": "closed_loop_burst", "load": "16", **FIXED})
    assert (client.concurrency, client.requests, client.assumed) == (16, 160, ("num_prompts",))
    assert client.has_fixed_lengths
    section = client.workload()
    assert section["concurrency"] == 16
    assert "arrival" not in section
    WorkloadSpec.model_validate(section)


def test_all_at_once_takes_its_number_from_either_column() -> None:
    """``1000 requests at once`` says how many where ``num_prompts`` does not."""
    row = {"arrival": "all_at_once", "load": "1000 requests at once", **FIXED}
    assert client_of(row).requests == 1000
    assert client_of({**row, "load": "inf", "num_prompts": "3000"}).requests == 3000
    assert client_of(row).workload()["arrival"] == "all_at_once"
    many = client_of({**row, "num_prompts": "1000000"})
    assert many.requests == MAX_REQUESTS
    assert many.assumed == ("fewer requests",)
    with pytest.raises(UncoveredError, match="number of requests unknown"):
        client_of({**row, "load": "inf"})


def test_a_static_batch_is_its_load() -> None:
    """The number of prompts is the batch, whatever the row says of them."""
    client = client_of({"arrival": "static_batch", "load": "32", "num_prompts": "320", **FIXED})
    assert (client.requests, client.concurrency) == (32, 0)


def test_an_open_loop_has_a_rate() -> None:
    """Requests per second."""
    client = client_of({"arrival": "poisson_rate", "load": "2.5", "num_prompts": "50", **FIXED})
    assert client.workload()["request_rate"] == 2.5
    WorkloadSpec.model_validate(client.workload())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"arrival": "session_rate", "load": "1", **FIXED}, "arrival session_rate"),
        ({"arrival": "", "load": "1", **FIXED}, "arrival unknown"),
        ({"arrival": "closed_loop_burst", "load": "", **FIXED}, "load unknown"),
        ({"arrival": "closed_loop_burst", "load": "4"}, "input_len unknown"),
    ],
)
def test_what_cannot_be_sent_is_uncovered(row: dict[str, str], reason: str) -> None:
    """The reason says what is missing."""
    with pytest.raises(UncoveredError, match=reason):
        client_of(row)


def test_answers_that_end_by_themselves_are_lognormal() -> None:
    """Mean and median give the spread; the cap is the longest length."""
    row = {"arrival": "all_at_once", "num_prompts": "10", "input_len_mean": "200", "osl": "x"}
    row |= {"output_len_mean": "2000", "output_len_p50": "1600", "output_len_max": "4096"}
    client = client_of(row)
    assert client.output_tokens == {"mean": 2000, "cv": pytest.approx(0.75), "max": 4096}
    assert client.input_tokens == {"min": 200, "max": 200}
    assert client.longest_tokens == 4296
    assert client.assumed == ("input_len fixed at its mean",)
    assert not client.has_fixed_lengths


def _run(first_s: list[float], finish_s: list[float], tokens: int) -> tuple[Any, Any]:
    """A finished run of requests that arrive at 0."""
    first, finish = np.array(first_s), np.array(finish_s)
    output = np.full(len(first), tokens)
    values = Latencies(first, (finish - first) / (tokens - 1), finish)
    result = SimpleNamespace(
        first_token_s=first,
        finish_s=finish,
        values=values,
        makespan_s=float(finish.max()),
        gaps=None,
    )
    workload = SimpleNamespace(
        prompt_tokens=np.full(len(first), 100), output_tokens=output, num_requests=len(first)
    )
    return cast("RunResult", result), cast("Workload", workload)


def test_means_and_throughputs_of_a_run() -> None:
    """Two requests of 11 tokens: TTFT 1 and 2 s, TPOT 0.1 s, over 3 s."""
    client = client_of({"arrival": "closed_loop_burst", "load": "2", **FIXED})
    found = client.metrics(*_run([1.0, 2.0], [2.0, 3.0], 11))
    assert found["ttft_ms"] == pytest.approx(1500)
    assert found["tpot_ms"] == pytest.approx(100)
    assert found["e2e_ms"] == pytest.approx(2500)
    assert found["output_tok_per_s"] == pytest.approx(22 / 3)
    assert found["total_tok_per_s"] == pytest.approx(222 / 3)
    assert "itl_median_ms" not in found


def test_a_static_batch_reports_the_latency_of_the_batch() -> None:
    """Its end-to-end latency is the last request's."""
    client = client_of({"arrival": "static_batch", "load": "2", **FIXED})
    assert client.metrics(*_run([1.0, 1.0], [2.0, 3.0], 11))["e2e_ms"] == pytest.approx(3000)


def test_the_steady_window_leaves_ramp_and_drain_out() -> None:
    """Four requests on two seats: the window is from 1 s (second first token) to 11 s.

    It closes when all but three have finished. In it one request emits all but its first token,
    half of another's run lies inside.
    """
    result, workload = _run([1.0, 1.0, 11.0, 21.0], [11.0, 21.0, 31.0, 31.0], 101)
    # 100 tokens of the first, 50 of the second, and the third's first token at the very end.
    assert steady_output_tok_per_s(result, workload, 2) == pytest.approx(151 / 10)
    # No window where seats are as many as requests: the whole run counts.
    assert steady_output_tok_per_s(result, workload, 4) == pytest.approx(404 / 31)
