"""Each kind of infeasible scenario names what conflicts, and changes that are then solved."""

from __future__ import annotations

from typing import Any

import pytest

from planner.api import solve
from planner.relaxations import changed
from planner.scenario import Scenario
from tests.problems import LLAMA_8B, LLAMA_70B, engine, mapping, pool

SPACE = {"tp": [1, 2], "pp": [1], "max_num_seqs": [2, 8], "max_num_batched_tokens": [512]}
ONE = {"pp": [1], "max_num_seqs": [8], "max_num_batched_tokens": [512]}
POISSON = {
    "input_tokens": {"min": 20, "max": 200},
    "output_tokens": {"min": 1, "max": 30},
    "num_requests": 60,
    "arrival": "poisson",
    "request_rate": 2000.0,
}
CLIENTS = {
    "input_tokens": 100,
    "output_tokens": 30,
    "num_requests": 60,
    "concurrency": 60,
}
L40S = {"device": "L40S", "nodes": 1, "devices_per_node": 2}
H100 = {"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 1}

KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "TTFT": ({"slo": {"ttft_ms": {"p99": 1}}}, ("slo.ttft_ms.p99",), "slo.ttft_ms.p99"),
    "TPOT": ({"slo": {"tpot_ms": {"mean": 1}}}, ("slo.tpot_ms.mean",), "slo.tpot_ms.mean"),
    "ITL": ({"slo": {"itl_ms": {"p99": 1}}}, ("slo.itl_ms.p99",), "slo.itl_ms.p99"),
    "E2E beside one that is met": (
        {"slo": {"e2e_ms": {"mean": 5}, "tpot_ms": {"mean": 1000}}},
        ("slo.e2e_ms.mean",),
        "slo.e2e_ms.mean",
    ),
    "two SLOs, each of which alone is met": (
        {"slo": {"ttft_ms": {"p99": 100}, "tpot_ms": {"mean": 6}}},
        ("slo.ttft_ms.p99", "slo.tpot_ms.mean"),
        "slo.",
    ),
    "too many requests": (
        {"workload": POISSON, "slo": {"ttft_ms": {"p99": 60}}},
        ("slo.ttft_ms.p99",),
        "workload.request_rate",
    ),
    "too many clients": (
        {"workload": CLIENTS, "slo": {"ttft_ms": {"p99": 50}}},
        ("slo.ttft_ms.p99",),
        "workload.concurrency",
    ),
    "a width that is too narrow for the SLO": (
        {"search": {"space": {**ONE, "tp": [1]}}, "slo": {"tpot_ms": {"mean": 5.5}}},
        ("slo.tpot_ms.mean",),
        "search.space.tp",
    ),
    "weights": (
        {
            "model": {"config": LLAMA_70B, "max_model_len": 1024},
            "cluster": pool(1),
            "search": {"space": ONE},
        },
        ("cluster.pools", "model.config"),
        "cluster.pools.0.devices_per_node",
    ),
    "weights at a pinned width": (
        {
            "model": {"config": LLAMA_70B, "max_model_len": 1024},
            "search": {"space": {**ONE, "tp": [1]}},
        },
        ("cluster.pools", "model.config", "search.space.tp", "search.space.pp"),
        "search.space.tp",
    ),
    "weights in every pool": (
        {
            "model": {"config": LLAMA_70B, "max_model_len": 1024},
            "cluster": {"pools": [H100, L40S]},
            "search": {"space": ONE},
        },
        ("cluster.pools", "model.config"),
        "cluster.pools.1.devices_per_node",
    ),
    "context": (
        {
            "model": {"config": LLAMA_8B, "max_model_len": 131_072},
            "cluster": pool(1),
            "engine": engine(gpu_memory_utilization=0.3),
            "search": {"space": ONE},
        },
        ("cluster.pools", "model.max_model_len"),
        "model.max_model_len",
    ),
    "measured blocks": (
        {"engine": engine(num_gpu_blocks=20), "search": {"space": ONE}},
        ("engine.num_gpu_blocks", "model.max_model_len"),
        "engine.num_gpu_blocks",
    ),
    "heads": ({"search": {"space": {**ONE, "tp": [3]}}}, ("search.space.tp",), "search.space.tp"),
    "node": ({"search": {"space": {**ONE, "tp": [4]}}}, ("search.space.tp",), "search.space.tp"),
    "replicas": (
        {"search": {"space": {**ONE, "replicas": [3]}}},
        ("search.space.replicas",),
        "search.space.replicas",
    ),
    "replicas of a width": (
        {"search": {"space": {**ONE, "tp": [2], "replicas": [2]}}},
        ("search.space.tp", "search.space.replicas"),
        "search.space.tp",
    ),
    "token budget": (
        {"search": {"space": {**ONE, "max_num_seqs": [600]}}},
        ("search.space.max_num_seqs", "search.space.max_num_batched_tokens"),
        "search.space.max_num_seqs",
    ),
    "patterns": (
        {"search": {"space": {**ONE, "forbid": ["tp*", "2x*"]}}},
        ("search.space.forbid",),
        "search.space.forbid",
    ),
    "stages": (
        {"search": {"space": {**ONE, "pp": [4]}}},
        ("search.space.pp",),
        "search.space.pp",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_conflict_and_changes(kind: str) -> None:
    """The conflict is named in the scenario's words, and every change that is named works."""
    sections, conflict, field = KINDS[kind]
    scenario = Scenario.model_validate(mapping(**{"search": {"space": SPACE}, **sections}))
    report = solve(scenario)
    assert report.status == "infeasible"
    assert report.infeasible is not None
    assert tuple(report.infeasible["conflict"]) == conflict
    changes = report.infeasible["changes"]
    assert any(path.startswith(field) for change in changes for path in change)
    for change in changes:
        assert solve(changed(scenario, change)).status == "optimal", change
        for path in change:
            assert path in report.infeasible["relaxation"]


@pytest.mark.parametrize("kind", ["TTFT", "TPOT", "ITL", "E2E beside one that is met"])
def test_a_tenth_less_is_not_enough(kind: str) -> None:
    """The change of one limit is the smallest: nine tenths of the way nothing is feasible yet."""
    sections, (name, *_), _ = KINDS[kind]
    scenario = Scenario.model_validate(mapping(**{"search": {"space": SPACE}, **sections}))
    report = solve(scenario)
    assert report.infeasible is not None
    _, metric, statistic = name.split(".")
    was, now = sections["slo"][metric][statistic], report.infeasible["changes"][0][name]
    less = changed(scenario, {name: was + 0.9 * (now - was)})
    assert solve(less).status == "infeasible"


def test_a_conflict_of_two_limits_is_one() -> None:
    """Without either of the two there is a plan."""
    sections, names, _ = KINDS["two SLOs, each of which alone is met"]
    scenario = Scenario.model_validate(mapping(**{"search": {"space": SPACE}, **sections}))
    for name in names:
        metric, _, _ = name.rpartition(".")  # which has this one limit
        assert solve(changed(scenario, {metric: None})).status == "optimal"
