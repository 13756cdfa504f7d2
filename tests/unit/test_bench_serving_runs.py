"""Judging measured servers: constants never see the side that they are tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from bench.measured_server import Requests, Server, ServingRun
from bench.serving_fit import Prior
from bench.serving_predict import Folders, Prepared, prepare
from bench.serving_runs import errors_pct, evaluate, figures, judge, split
from bench.uncovered import UncoveredError
from simulator.engine_rules import HostConstants
from simulator.rules import VLLM_V0
from tests.unit.test_bench_serving_files import RUN, SERVER, write

if TYPE_CHECKING:
    from pathlib import Path

REQUESTS = Requests(np.array([0.0, 0.5]), np.array([30, 600]), np.array([20, 40]))


def measured_run(name: str, rate: str, trace: str, server: Server, tpot_s: float) -> ServingRun:
    """A run of one server, of which only TPOT was measured."""
    return ServingRun(
        name=name,
        engine="vLLM",
        engine_version="0.6.0",
        model="meta-llama/Llama-3.1-70B-Instruct",
        weights="bf16",
        kv_cache="bf16",
        device="H100-SXM-80GB",
        trace=trace,
        rate=rate,
        servers=(server,),
        measured_s={"tpot": tpot_s},
        pooled_tpot=True,
    )


@dataclass
class Linear:
    """Stands for a prepared run: TPOT is kernel time plus host time."""

    run: ServingRun
    kernel_s: float
    cluster: str = "one"
    has_tables: bool = False
    policy: int = VLLM_V0
    cuda_graphs: bool = True
    host: HostConstants = HostConstants()  # noqa: RUF009 - frozen
    notes: tuple[str, ...] = ()
    kind: str = "tp8"

    def predict_s(self, host: HostConstants) -> dict[str, float]:
        """TPOT of a server that never queues."""
        return {"tpot": self.kernel_s + host.iteration_s}


def cluster(rates: dict[str, float], **settings: Any) -> list[Prepared]:
    """A run at each rate, whose host time per iteration is given."""
    server = Server(tp=8, requests=REQUESTS)
    runs = [
        Linear(measured_run(rate, rate, "chat", server, 0.01 + host_s), 0.01, **settings)
        for rate, host_s in rates.items()
    ]
    return cast("list[Prepared]", runs)


def test_a_side_is_tested_by_constants_of_the_other() -> None:
    """Each rate's own host time shows in the constants that are tested on the other rate."""
    out = split(cluster({"025": 5.4e-3, "05": 4.0e-3}), "rate")
    (low, low_report), (high, high_report) = out["025"], out["05"]
    assert low.iteration_s == pytest.approx(4.0e-3, rel=0.03)
    assert high.iteration_s == pytest.approx(5.4e-3, rel=0.03)
    assert (low_report["fitted_on"], low_report["tested_on"]) == (["05"], "025")
    assert low_report["fit"]["tpot"]["mean_abs_pct"] < 0.6
    assert high_report["test"]["tpot"]["mean_abs_pct"] == pytest.approx(10, abs=1)


def test_a_prediction_does_not_change_with_its_own_measurement() -> None:
    """The line of a run uses constants that saw the other rate only."""
    before = judge(cluster({"025": 5.0e-3, "05": 4.0e-3}))["runs"][0]
    after = judge(cluster({"025": 9.0e-3, "05": 4.0e-3}))["runs"][0]
    assert before["predicted_s"] == after["predicted_s"]
    assert before["error_pct"] != after["error_pct"]
    assert before["constants"] == "not this rate"


def test_cards_share_one_set_of_constants() -> None:
    """Runs with layer tables are judged by one fit, and by the fit of the others beside."""
    out = judge(cluster({"a": 0.2e-3, "b": 0.4e-3}, has_tables=True))
    assert {line["constants"] for line in out["runs"]} == {"all runs of the cluster"}
    assert [(s["by"], s["tested_on"]) for s in out["splits"]] == [("name", "a"), ("name", "b")]


def test_a_cluster_of_one_rate_and_trace_says_that_it_saw_its_runs() -> None:
    """Nothing is held out where there is nothing to hold out."""
    out = judge(cluster({"05": 4.0e-3}))
    assert out["splits"] == []
    assert out["runs"][0]["constants"] == "all runs of the cluster"


def test_figures_are_of_sizes() -> None:
    """Errors of either sign count by size; a metric that no run has is left out."""
    out = figures([{"tpot": -3.0, "e2e": 1.0}, {"tpot": 1.0}])
    assert out["tpot"] == {"n": 2, "mean_abs_pct": 2.0, "max_abs_pct": 3.0}
    assert out["e2e"]["n"] == 1
    assert "ttft" not in out


def test_a_prior_gives_its_constants() -> None:
    """The prior speaks in milliseconds, the simulator in seconds."""
    host = Prior((1.0, 2.0, 3.0, 0.0, 4.0, 1.5), (0.0,) * 6, "test").host()
    wanted = HostConstants(1e-3, 2e-3, 4e-3, 3e-3, prefill_multiplier=1.5)
    assert host == wanted


def test_names_are_resolved_and_costs_shared() -> None:
    """Base and instruct checkpoints are one cluster; contexts above 32,768 tokens are chunked."""
    server = Server(tp=2, requests=REQUESTS, max_model_len=24272, custom_all_reduce=False)
    one = measured_run("a", "05", "chat", server, 0.03)
    instruct = prepare(one, Folders())
    base = prepare(replace(one, model="meta-llama/Meta-Llama-3.1-70B"), Folders())
    assert instruct.cluster == base.cluster
    assert not instruct.has_tables
    (simulated,) = instruct.servers
    assert simulated.limits.num_blocks >= 24272 // 16
    assert not simulated.rules.chunked
    wide = replace(one, servers=(replace(server, tp=4, max_model_len=None),))
    (chunked,) = prepare(wide, Folders()).servers
    assert chunked.rules.chunked
    assert chunked.limits.max_num_batched_tokens == 512
    assert chunked.limits.num_blocks > 10_000


def test_spread_experts_are_another_server() -> None:
    """A server with whole experts on each device is priced as such and is a kind of its own."""
    run = replace(
        measured_run("a", "05", "chat", Server(tp=8, requests=REQUESTS), 0.02),
        engine="SGLang",
        engine_version="0.4.5",
        model="mistralai/Mixtral-8x22B-Instruct-v0.1",
    )
    spread = replace(run, servers=(Server(tp=8, ep=8, requests=REQUESTS),))
    cut, whole = prepare(run, Folders()), prepare(spread, Folders())
    assert [cut.kind.split()[-1], whole.kind.split()[-1]] == ["tp8", "tp8ep8"]
    assert cut.cluster == whole.cluster
    tpot = [one.predict_s(HostConstants())["tpot"] for one in (cut, whole)]
    assert tpot[0] != tpot[1]


def test_host_time_reaches_every_metric() -> None:
    """A millisecond more per iteration is a millisecond more per token."""
    run = measured_run("a", "05", "chat", Server(tp=8, requests=REQUESTS), 0.014)
    prepared = prepare(replace(run, measured_s={"ttft": 0.1, "tpot": 0.014, "e2e": 1.0}), Folders())
    fast, slow = (prepared.predict_s(HostConstants(iteration_s=s)) for s in (0.004, 0.005))
    assert slow["tpot"] - fast["tpot"] == pytest.approx(1e-3, rel=0.02)
    assert slow["e2e"] - fast["e2e"] > 0.03
    assert set(errors_pct(prepared, HostConstants())) == {"ttft", "tpot", "e2e"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"engine": "newengine"}, "newengine"),
        ({"model": "org/Unheard-9B"}, "Unheard"),
        ({"device": "Z9000"}, "Z9000"),
    ],
)
def test_what_cannot_be_simulated_says_why(change: dict[str, Any], reason: str) -> None:
    """Each reason names what is not covered."""
    run = measured_run("a", "05", "chat", Server(tp=8, requests=REQUESTS), 0.014)
    with pytest.raises(UncoveredError, match=reason):
        prepare(replace(run, **change), Folders())


def test_every_run_is_listed(tmp_path: Path) -> None:
    """Runs that cannot be simulated stand beside the others, with the reason."""
    names = {"hf": "meta-llama/Llama-3.1-70B", "plan": "8TP"}
    server = {**SERVER, "model_hf": names["hf"], "plan": "8TP", "tp": "8"}
    unknown = {"hf": "org/Unheard-9B", "plan": "8TP"}
    write(tmp_path / "serving_runs_h100_exam.csv", [{**RUN, **names}, {**RUN, **unknown}])
    details = [server, {**server, "model_hf": unknown["hf"]}]
    write(tmp_path / "serving_runs_h100_exam_detail.csv", details)
    served = [{"arrival_ns": 10**9, "input_tokens": 5, "output_tokens": 7}]
    write(tmp_path / "requests_h100/a.csv", served)
    out = evaluate(tmp_path, Folders())
    by_name = {line["name"]: line for line in out["runs"]}
    assert len(by_name) == 2
    assert "Unheard" in by_name["vLLM Unheard-9B chat 05 8TP"]["skipped"]
    assert set(by_name["vLLM Llama-3.1-70B chat 05 8TP"]["error_pct"]) == {"ttft", "tpot", "e2e"}
    assert out["ttft"]["n"] == 1
