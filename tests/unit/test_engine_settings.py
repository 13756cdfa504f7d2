"""The engine section: each engine's settings under its own names, and what they resolve to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from planner.engine_settings import OWN_NAMES, EngineSettings, counterpart, owners
from planner.errors import InputError
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.scenario_sections import EngineSpec
from simulator.plan import BatchingLimits, Plan, Shape
from simulator.rules import SGLANG, TRTLLM, VLLM_V0
from tests.problems import mapping

if TYPE_CHECKING:
    from planner.problem import Problem

OWN = {
    "vllm": {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "gpu_memory_utilization": 0.8,
        "block_size": 32,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    },
    "sglang": {
        "max_running_requests": 64,
        "chunked_prefill_size": 4096,
        "mem_fraction_static": 0.8,
        "page_size": 32,
        "max_prefill_tokens": 9000,
        "enable_mixed_chunk": True,
        "schedule_conservativeness": 0.5,
        "disable_radix_cache": True,
    },
    "trtllm": {
        "max_batch_size": 64,
        "max_num_tokens": 4096,
        "kv_cache_free_gpu_memory_fraction": 0.8,
        "tokens_per_block": 32,
        "enable_chunked_context": True,
        "enable_block_reuse": False,
        "capacity_scheduler_policy": "max_utilization",
        "attention_dp_config": {"enable_balance": True, "timeout_iters": 60},
    },
}
VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.9", "trtllm": "1.2.0rc6.post2"}


def section(engine: str, **settings: Any) -> dict[str, Any]:
    """An engine section."""
    return {"name": engine, "version": VERSIONS[engine], **settings}


def checked(engine: dict[str, Any]) -> EngineSpec:
    """The section of a scenario."""
    return Scenario.model_validate(mapping(engine=engine, search=None)).engine


def problem(engine: dict[str, Any], **sections: Any) -> Problem:
    """A small scenario, resolved."""
    return resolve(Scenario.model_validate(mapping(engine=engine, **sections)))


def test_every_setting_has_a_field() -> None:
    """Each own name is a field of the section, and stands for a field of the settings."""
    for names in OWN_NAMES.values():
        assert set(names.values()) <= set(EngineSpec.model_fields)
        assert set(names) <= set(EngineSettings.__dataclass_fields__)
    assert {e: set(names) for e, names in OWN.items()} == {
        e: set(names.values()) for e, names in OWN_NAMES.items()
    }


@pytest.mark.parametrize(
    ("engine", "rest"),
    [
        ("vllm", {"chunked": False}),
        (
            "sglang",
            {"chunked": True, "mixed": True, "prefill_tokens": 9000, "conservativeness": 0.5},
        ),
        (
            "trtllm",
            {"chunked": True, "capacity_policy": "max_utilization", "balance": (60, 10)},
        ),
    ],
)
def test_settings_under_one_set_of_names(engine: str, rest: dict[str, Any]) -> None:
    """All engines' limits, fraction, block and prefix caching mean the same field."""
    common = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "memory_fraction": 0.8,
        "block_tokens": 32,
        "prefix_caching": False,
    }
    assert checked(section(engine, **OWN[engine])).settings == EngineSettings(**common, **rest)
    assert checked(section(engine)).settings == EngineSettings()
    late = checked(section(engine, async_scheduling=False)).settings
    assert late == EngineSettings(async_scheduling=False)


@pytest.mark.parametrize("engine", OWN)
def test_settings_of_another_engine_are_refused(engine: str) -> None:
    """One line that names the owner and, where there is one, the own name."""
    for other, names in OWN.items():
        for name, value in names.items():
            if other == engine:
                continue
            own = counterpart(name, engine)
            hint = f"; {engine} calls it {own}" if own else ""
            with pytest.raises(InputError) as error:
                checked(section(engine, **{name: value}))
            assert str(error.value) == (
                f"<scenario>: engine.{name}: is a setting of {other}, not of {engine}{hint}"
            )


def test_names_of_settings() -> None:
    """Owners and counterparts, also of names that nobody has."""
    assert owners("page_size") == ("sglang",)
    assert owners("version") == ()
    assert counterpart("page_size", "trtllm") == "tokens_per_block"
    assert counterpart("enable_mixed_chunk", "vllm") is None
    assert counterpart("version", "vllm") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunked_prefill_size": 0}, "0 must be greater than 0, or -1 to switch chunking off"),
        ({"chunked_prefill_size": -2}, "-2 must be at least -1"),
        ({"chunked_prefill_size": 1.5}, "1.5 must be a whole number"),
        ({"disable_radix_cache": "no"}, "'no' must be true or false"),
        ({"enable_mixed_chunk": 1}, "1 must be true or false"),
        ({"mem_fraction_static": 90}, "90 must be at most 1"),
        ({"async_scheduling": "yes"}, "'yes' must be true or false"),
    ],
)
def test_bad_values(settings: dict[str, Any], message: str) -> None:
    """One line with the field, the value and what is right."""
    (name,) = settings
    with pytest.raises(InputError) as error:
        checked(section("sglang", **settings))
    assert str(error.value).startswith(f"<scenario>: engine.{name}: {message}")


def test_bad_policy() -> None:
    """The policies of TensorRT-LLM are listed."""
    with pytest.raises(InputError, match="must be one of guaranteed_no_evict, max_utilization"):
        checked(section("trtllm", capacity_scheduler_policy="fcfs"))


def test_unknown_engines_and_versions_are_refused() -> None:
    """Whatever settings they come with, by the profiles that ship."""
    with pytest.raises(InputError, match=r"engine\.name: 'tgi' is not known"):
        problem({"name": "tgi", "version": "1", "max_num_seqs": 8}, search=None)
    with pytest.raises(InputError, match=r"engine\.version: '0\.5\.7' is not known"):
        problem({"name": "sglang", "version": "0.5.7"})


@pytest.mark.parametrize(
    ("engine", "policy", "limits"),
    [("sglang", SGLANG, (2048, 8192)), ("trtllm", TRTLLM, (2048, 8192))],
)
def test_defaults_of_a_scenario(engine: str, policy: int, limits: tuple[int, int]) -> None:
    """Rules, limits, warnings and memory of the version reach the problem."""
    got = problem(section(engine))
    assert got.rules.policy == policy
    assert got.pool.default_limits == BatchingLimits(*limits)
    assert got.space.max_num_batched_tokens == (64, 512)
    assert any("transferred from vllm 0.10.2" in warning for warning in got.warnings)
    assert got.provenance["kernel_table"]["engine"] == engine
    assert (
        got.pool.memory_rules.accounting
        == {"sglang": "static_share", "trtllm": "share_of_free"}[engine]
    )
    # Llama-3.1-8B in bf16 leaves an H100 room for 350,000 to 450,000 tokens.
    tokens = got.blocks(Shape(1), got.pool.default_limits) * got.pool.memory_rules.block_tokens
    assert 350_000 < tokens < 450_000


@pytest.mark.parametrize("engine", OWN)
def test_pinned_limits_are_the_space(engine: str) -> None:
    """A setting that fixes a limit leaves the search one value of it."""
    names = OWN_NAMES[engine]
    pinned = {names["max_num_seqs"]: 32, names["max_num_batched_tokens"]: 2048}
    got = problem(section(engine, num_gpu_blocks=77, **pinned), search=None)
    assert (got.space.max_num_seqs, got.space.max_num_batched_tokens) == ((32,), (2048,))
    assert got.pool.default_limits == BatchingLimits(32, 2048)
    assert got.plan_text(Plan(1, Shape(1), BatchingLimits(32, 2048))) == "tp1"
    assert got.blocks(Shape(1), got.pool.default_limits) == 77


def test_whole_prompts_need_a_budget_for_the_context() -> None:
    """Engines that grow their budget search no smaller one, and refuse to be given one."""
    model = {"config": "meta-llama/Llama-3.1-8B-Instruct", "max_model_len": 4096}
    space = {"space": {"tp": [1], "max_num_batched_tokens": [512, 4096, 8192, 32_768]}}
    off = section("vllm", enable_chunked_prefill=False)
    assert problem(off, model=model, search=space).space.max_num_batched_tokens == (8192, 32_768)
    off = section("sglang", chunked_prefill_size=-1)
    got = problem(off, model=model, search=space)
    assert got.space.max_num_batched_tokens == (32_768,)
    assert (got.rules.chunked, got.rules.prefill_tokens) == (False, 16_384)
    off = section("vllm", enable_chunked_prefill=False, max_num_batched_tokens=2048)
    with pytest.raises(InputError, match=r"2048 must be at least max_model_len \(4096\) where"):
        problem(off, model=model, search=None)
    v0 = {"name": "vllm", "version": "0.6.0"}
    got = problem(v0, model=model, search=space)
    assert got.space.max_num_batched_tokens == (4096, 8192, 32_768)
    assert (got.rules.policy, got.pool.default_limits) == (VLLM_V0, BatchingLimits(256, 4096))
