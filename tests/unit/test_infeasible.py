"""Infeasible scenarios: the reason has the figures, and the suggested change works."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from planner.api import solve
from planner.resolve import resolve
from simulator.plan import BatchingLimits, Shape
from tests.problems import LLAMA_8B, LLAMA_70B, QWEN_7B, engine, pool, scenario

if TYPE_CHECKING:
    from planner.report import PlanReport

SPACE = {"pp": [1], "max_num_seqs": [8], "max_num_batched_tokens": [512]}
SUGGESTED_LIMIT = re.compile(r"slo\.(\w+)\.(\w+): ([\d.e+]+)")
COMPARED = re.compile(r"slo\.(\w+)\.(\w+) ([\d.]+) ms against ([\d.]+) ms")


def infeasible(**sections: Any) -> tuple[str, str]:
    """Reason and relaxation of a scenario that must be infeasible."""
    report = solve(scenario(**sections))
    assert report.status == "infeasible"
    assert (report.plan, report.objective, report.bound, report.gap) == (None, None, None, None)
    assert report.infeasible is not None
    return report.infeasible["reason"], report.infeasible["relaxation"]


def relax(slo: dict[str, dict[str, float]], relaxation: str) -> dict[str, dict[str, float]]:
    """``slo`` with the limits that ``relaxation`` suggests."""
    relaxed = {metric: dict(limits) for metric, limits in slo.items()}
    for metric, statistic, limit_ms in SUGGESTED_LIMIT.findall(relaxation):
        assert statistic in relaxed[metric]
        assert float(limit_ms) > relaxed[metric][statistic]
        relaxed[metric][statistic] = float(limit_ms)
    return relaxed


@pytest.mark.parametrize(
    ("slo", "binding"),
    [
        ({"ttft_ms": {"p99": 1}}, {"ttft_ms"}),
        ({"e2e_ms": {"mean": 20, "p90": 30}}, {"e2e_ms"}),
        ({"ttft_ms": {"mean": 1}, "tpot_ms": {"p99": 1}}, {"ttft_ms", "tpot_ms"}),
        ({"ttft_ms": {"p50": 100_000}, "tpot_ms": {"mean": 2}}, {"tpot_ms"}),
        ({"ttft_ms": {"p99": 1e-6}}, {"ttft_ms"}),
    ],
)
def test_slo_reason_and_relaxation(slo: dict[str, dict[str, float]], binding: set[str]) -> None:
    """The reason names the broken limits with figures; with the suggested ones a plan exists."""
    reason, relaxation = infeasible(slo=slo)
    compared = COMPARED.findall(reason.replace("1e-06", "0.000001"))
    assert {metric for metric, _, _, _ in compared} == binding
    for metric, statistic, found_ms, limit_ms in compared:
        assert float(limit_ms) == slo[metric][statistic]
        assert float(found_ms) > slo[metric][statistic]
    relaxed = solve(scenario(slo=relax(slo, relaxation)))
    assert relaxed.status == "optimal"


def test_slo_relaxation_is_the_smallest() -> None:
    """A fifth of a millisecond less than the suggested limit is still infeasible."""
    slo = {"ttft_ms": {"p99": 1.0}}
    least = relax(slo, infeasible(slo=slo)[1])
    less = {"ttft_ms": {"p99": least["ttft_ms"]["p99"] - 0.2}}
    infeasible(slo=less)


@pytest.mark.parametrize("num_requests", range(400, 406))
def test_slo_relaxation_of_long_times(num_requests: int) -> None:
    """Above 100 s six digits are too few for a tenth of a millisecond: the limit must not round."""
    sections = {
        "workload": {
            "input_tokens": 20,
            "output_tokens": 800,
            "num_requests": num_requests,
            "arrival": "all_at_once",
        },
        "cluster": pool(1),
        "search": {"space": {"max_num_seqs": [8], "max_num_batched_tokens": [512]}},
    }
    slo = {"e2e_ms": {"mean": 1000.0}}
    relaxed = relax(slo, infeasible(slo=slo, **sections)[1])
    assert relaxed["e2e_ms"]["mean"] > 100_000
    assert solve(scenario(slo=relaxed, **sections)).status == "optimal"


def test_slo_infeasibility_survives_a_work_limit() -> None:
    """Bounds alone prove that 1 ms cannot be met; looking for a relaxation may not undo that."""
    infeasible(slo={"ttft_ms": {"p99": 1}}, search={"work_limit": 1, "space": SPACE})


def memory_case(name: str) -> dict[str, Any]:
    """Scenarios that lack memory."""
    return {
        # bf16: 2 bytes x 70.6 billion weights = 131.4 GiB, on 80 GB
        "weights": {
            "model": {"config": LLAMA_70B, "max_model_len": 1024},
            "cluster": pool(1),
            "search": {"space": SPACE},
        },
        # 131,072 tokens x 128 KiB (2 x 32 layers x 8 heads x 128 x 2 bytes) = 16 GiB of KV
        "context": {
            "model": {"config": LLAMA_8B, "max_model_len": 131_072},
            "cluster": pool(1),
            "engine": engine(gpu_memory_utilization=0.3),
            "search": {"space": SPACE},
        },
    }[name]


def test_weights_that_fit_nowhere() -> None:
    """70B in bf16 on one device: GiB needed against GiB there, and two devices indeed fit it."""
    sections = memory_case("weights")
    reason, relaxation = infeasible(**sections)
    problem = resolve(scenario(**sections))
    budget = problem.memory(Shape(1), BatchingLimits(8, 512))
    assert "weights 131.4" in reason
    assert f"needs {budget.fixed_bytes / 2**30:.1f} GiB per device" in reason
    assert f"{budget.usable_bytes / 2**30:.1f} GiB are usable" in reason
    changes = "cluster.pools.0.devices_per_node: 2; or model.weight_dtype: fp8"
    assert relaxation == f"smallest change that fits: {changes}"
    report = solve(scenario(**{**sections, "cluster": pool(2)}))
    assert report.plan is not None
    assert report.plan.tp == 2


def suggested(relaxation: str, field: str) -> float:
    """The value that ``relaxation`` suggests for ``field``."""
    found = re.search(rf"{re.escape(field)}: ([\d.]+)", relaxation)
    assert found is not None, relaxation
    return float(found.group(1))


def test_context_that_does_not_fit() -> None:
    """Each of the changes suggested for a context that is too long works by itself."""
    sections = memory_case("context")
    reason, relaxation = infeasible(**sections)
    held = int(suggested(relaxation, "model.max_model_len"))
    assert f"KV cache holds {held} tokens; max_model_len is 131072" in reason

    def solved(**changes: Any) -> PlanReport:
        return solve(scenario(**{**sections, **changes}))

    assert solved(model={"config": LLAMA_8B, "max_model_len": held}).status == "optimal"
    one_more = {"config": LLAMA_8B, "max_model_len": held + 1}
    assert solved(model=one_more).status == "infeasible"

    share = suggested(relaxation, "engine.gpu_memory_utilization")
    assert solved(engine=engine(gpu_memory_utilization=share)).status == "optimal"
    less = engine(gpu_memory_utilization=round(share - 0.001, 3))
    assert solved(engine=less).status == "infeasible"

    assert "cluster.pools.0.devices_per_node: 2" in relaxation
    assert solved(cluster=pool(2)).status == "optimal"


def test_pinned_blocks_that_are_too_few() -> None:
    """20 measured blocks of 16 tokens hold 320: a request of 1024 does not fit, one of 320 does."""
    pinned = {"engine": engine(num_gpu_blocks=20), "search": {"space": SPACE}}
    reason, relaxation = infeasible(**pinned)
    assert "KV cache holds 320 tokens; max_model_len is 1024" in reason
    assert suggested(relaxation, "model.max_model_len") == 320
    model = {"config": LLAMA_8B, "max_model_len": 320}
    assert solve(scenario(model=model, **pinned)).status == "optimal"


def test_pinned_blocks_are_not_helped_by_memory() -> None:
    """A measured block count does not grow with memory or devices, so neither is suggested."""
    _, relaxation = infeasible(engine=engine(num_gpu_blocks=20), search={"space": SPACE})
    assert "gpu_memory_utilization" not in relaxation
    assert "devices_per_node" not in relaxation


def test_suggested_width_can_be_launched() -> None:
    """28 heads do not divide by 8: tp8 is no way out however little memory there is."""
    _, relaxation = infeasible(
        model={"config": QWEN_7B, "max_model_len": 1024},
        engine=engine(gpu_memory_utilization=0.06),
        search={"space": SPACE},
    )
    assert "tp8" not in relaxation


@pytest.mark.parametrize(
    ("space", "devices", "rules"),
    [
        ({"tp": [3]}, 4, {"attention heads do not divide by tp": 4}),
        ({"tp": [4]}, 2, {"tp is wider than a node": 2}),
        ({"tp": [1], "replicas": [3]}, 2, {"more devices than the pool has": 1}),
        (
            {"tp": [1, 3], "max_num_seqs": [600]},
            1,
            {
                "attention heads do not divide by tp": 1,
                "max_num_batched_tokens is below max_num_seqs": 1,
            },
        ),
    ],
)
def test_narrow_grids(space: dict[str, Any], devices: int, rules: dict[str, int]) -> None:
    """Where rules exclude the whole grid the reason lists them with their counts."""
    report = solve(scenario(cluster=pool(devices), search={"space": {**SPACE, **space}}))
    assert report.status == "infeasible"
    assert report.infeasible is not None
    assert report.search.excluded_by_rule == rules
    listed = ", ".join(f"{n} by: {rule}" for rule, n in rules.items())
    assert report.infeasible["reason"] == f"no plan of the grid can run ({listed})"
