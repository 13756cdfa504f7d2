"""``search.space: theoretical``: how it is written, what it holds, who is told of it."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest

from planner.api import simulate, solve
from planner.errors import InputError, RefusalError
from planner.explain import explain
from planner.export import FORMATS, export_plan
from planner.layouts import ATTENTION_GROUPS, EXPERT_GROUPS, is_theoretical
from planner.render import console, render_simulation, render_solve
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import broken_rule, enumerate_space
from simulator.plan import Shape, parse_plan
from tests.problems import mapping, pool, scenario

if TYPE_CHECKING:
    from planner.problem import Problem

GRID = {"pp": [1], "max_num_seqs": [8], "max_num_batched_tokens": [1024]}
VLLM = {"name": "vllm", "version": "0.24.0"}
SGLANG = {"name": "sglang", "version": "0.5.10"}
TRTLLM = {"name": "trtllm", "version": "1.0.0rc3"}
OLD_VLLM = {"name": "vllm", "version": "0.6.0"}


def mixture(space: Any, engine: dict[str, str] = VLLM, devices: int = 4) -> Scenario:
    """A mixture of 128 experts on one machine."""
    return scenario(
        model={"config": "Qwen/Qwen3-30B-A3B", "max_model_len": 1024},
        cluster=pool(devices),
        engine=engine,
        search={"space": space},
    )


def theoretical_shapes(problem: Problem) -> set[str]:
    """Shapes that can run in the space and that the engine cannot launch."""
    shapes = {plan.shape for plan in enumerate_space(problem).plans}
    return {shape.text for shape in shapes if is_theoretical(problem, shape)}


def test_one_word_is_the_mapping_with_the_switch() -> None:
    """``search.space: theoretical`` and ``{theoretical: true}`` are one scenario."""
    word, full = mixture("theoretical"), mixture({"theoretical": True})
    assert word == full
    assert word.model_dump(mode="json") == full.model_dump(mode="json")
    assert word.model_dump(mode="json")["search"]["space"]["theoretical"] is True
    again = Scenario.model_validate(word.model_dump(mode="json"))
    assert again.search.space.theoretical
    schema = Scenario.model_json_schema()["$defs"]["SpaceSpec"]
    assert {"const": "theoretical"} in schema["anyOf"]


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ("theoretic", "search.space: 'theoretic' must be 'theoretical' or a mapping"),
        ({"theoretical": 1}, "search.space.theoretical: 1 must be true or false"),
        ({"theory": True}, "search.space.theory"),
    ],
)
def test_other_words_are_refused(space: Any, line: str) -> None:
    """One line says what may stand there."""
    with pytest.raises(InputError) as caught:
        mixture(space)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_switch_nothing_changes() -> None:
    """The scenario's own text, its space and its report know no such key."""
    plain = mixture(GRID)
    assert "theoretical" not in str(plain.model_dump(mode="json"))
    assert plain == mixture({**GRID, "theoretical": False})
    assert resolve(plain).space.shapes == tuple(
        Shape(tp, ep=ep) for tp in (1, 2, 3, 4) for ep in sorted({1, tp})
    )
    assert "theoretical" not in solve(plain).to_json()
    assert theoretical_shapes(resolve(plain)) == set()
    # The layouts of the default space are all in the larger one, under the same names.
    larger = set(enumerate_space(resolve(mixture({**GRID, "theoretical": True}))).plans)
    assert set(enumerate_space(resolve(plain)).plans) < larger


@pytest.mark.parametrize(
    ("engine", "shapes"),
    [
        (VLLM, {"tp4ep2", "tp2dp2ep2", "tp1dp4ep2"}),
        (SGLANG, {"tp1dp3ep3"}),  # any divisor, but 128 experts do not divide by three
        (TRTLLM, {"tp2dp2", "tp2dp2ep2", "tp2dp2ep4", "tp1dp3ep3"}),  # one group, or all devices
        (OLD_VLLM, {"tp2ep2", "tp4ep2", "tp4ep4"}),  # no word on how attention groups would run
    ],
    ids=["vllm", "sglang", "trtllm", "vllm-0.6"],
)
def test_what_each_engine_lacks(engine: dict[str, str], shapes: set[str]) -> None:
    """By default every product that divides is tried; what the engine refuses is marked."""
    assert theoretical_shapes(resolve(mixture({**GRID, "theoretical": True}, engine))) == shapes


def test_lists_still_narrow_the_space() -> None:
    """``dp`` and ``ep`` are every number only where the scenario lists none."""
    listed = {**GRID, "theoretical": True, "tp": [2], "dp": [1, 2], "ep": [2]}
    shapes = resolve(mixture(listed)).space.shapes
    assert [shape.text for shape in shapes] == ["tp2ep2", "tp2dp2ep2"]


def test_dense_models_gain_nothing() -> None:
    """Attention groups of a dense model would be replicas; it has no experts to spread."""
    fields = mapping()
    plain = resolve(Scenario.model_validate(fields))
    fields["search"]["space"]["theoretical"] = True
    larger = resolve(Scenario.model_validate(fields))
    assert enumerate_space(larger) == enumerate_space(plain)


def test_the_engine_launches_none_of_it() -> None:
    """A theoretical plan is simulated and marked; every export refuses it in one line."""
    asked = mixture({**GRID, "theoretical": True})
    report = simulate(asked, "tp4ep2")
    assert report.plan.theoretical
    assert report.plan.launch == ()
    assert report.to_dict()["plan"]["theoretical"] is True
    for form in FORMATS:
        if form in ("sglang", "trtllm"):
            continue  # other engines' commands are refused for that
        with pytest.raises(RefusalError) as caught:
            export_plan(asked, "tp4ep2", form)
        assert caught.value.exit_code == 2
        assert str(caught.value).startswith("plan tp4ep2 is theoretical: ")
    assert "theoretical" not in simulate(asked, "tp4ep4").to_dict()["plan"]
    with pytest.raises(RefusalError, match="cannot spread experts over part"):
        simulate(mixture(GRID), "tp4ep2")


def test_rules_of_the_engine_return_without_the_switch() -> None:
    """The same plan text breaks the engine's rule in one space and none in the other."""
    for engine, text, rule in (
        (VLLM, "tp4ep2", EXPERT_GROUPS),
        (TRTLLM, "tp2dp2", ATTENTION_GROUPS),
    ):
        for theoretical, expected in ((False, rule), (True, None)):
            problem = resolve(mixture({**GRID, "theoretical": theoretical}, engine))
            plan = parse_plan(f"{text}:seqs=8,tokens=1024", problem.default_limits)
            assert broken_rule(problem, plan) == expected


def test_tables_mark_theoretical_plans() -> None:
    """A person sees it at the plan and at each runner-up, and no command to launch."""
    asked = mixture({**GRID, "theoretical": True, "forbid": ["*ep4*", "*dp*", "*tp1:*"]})
    stream = StringIO()
    render_simulation(simulate(asked, "tp4ep2"), console(stream))
    assert "theoretical: this engine version cannot launch it" in stream.getvalue()
    stream = StringIO()
    render_solve(solve(asked), console(stream))
    row = next(line for line in stream.getvalue().splitlines() if line.startswith("tp4ep2:"))
    assert row.rstrip().endswith("theoretical")
    only = mixture({**GRID, "theoretical": True, "tp": [4], "dp": [1], "ep": [2]})
    stream = StringIO()
    render_solve(solve(only), console(stream))
    assert "optimal  theoretical tp4ep2" in stream.getvalue()
    assert "vllm serve" not in stream.getvalue()


def test_explain_marks_theoretical_plans() -> None:
    """The verdict names each plan that the engine cannot launch, once."""
    asked = mixture({**GRID, "theoretical": True, "tp": [4], "dp": [1], "ep": [2, 4]})
    only = "tp4ep2:seqs=8,tokens=1024"
    assert explain(asked, only).verdict.endswith(f" (theoretical: {only})")
    alone = mixture({**GRID, "theoretical": True, "tp": [4], "dp": [1], "ep": [2]})
    assert explain(alone, "tp4ep4").verdict.endswith(f" (theoretical: {only})")
    assert explain(alone, only).verdict.endswith(f" (theoretical: {only})")
    launchable = mixture({**GRID, "theoretical": True, "tp": [4], "dp": [1], "ep": [4]})
    assert "theoretical" not in explain(launchable, "tp4ep4").verdict
