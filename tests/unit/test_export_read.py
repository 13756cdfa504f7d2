"""Commands back to plans: twenty of each engine, shapes of every kind."""

from __future__ import annotations

import dataclasses
import re
import shlex
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError, RefusalError
from planner.export.flags import launch_commands
from planner.export.read import read_launch
from planner.resolve import resolve
from planner.scenario import Scenario
from simulator.plan import BatchingLimits, Plan, Shape
from tests.problems import LLAMA_8B, mapping, pool

if TYPE_CHECKING:
    from planner.problem import Problem

QWEN_MOE = "Qwen/Qwen3-30B-A3B"
VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.0.0rc3"}
DEFAULTS = BatchingLimits(77, 777)
"""Stand-ins for what a command leaves out, so that a flag that is missing shows."""

SHAPES = {
    "vllm": [
        Shape(1),
        Shape(2),
        Shape(8),
        Shape(2, pp=2),
        Shape(1, dp=4),
        Shape(1, dp=8, ep=8),
        Shape(4, dp=2, ep=8),
        Shape(8, ep=8),
        Shape(4, pp=2, ep=4),
        Shape(4, pp=2, layers=(26, 22)),
    ],
    "sglang": [
        Shape(1),
        Shape(4),
        Shape(2, pp=4),
        Shape(1, dp=4),
        Shape(2, dp=4, ep=8),
        Shape(8, ep=2),
        Shape(4, dp=2, ep=4),
        Shape(16),
        Shape(8, pp=2, ep=4),
        Shape(4, pp=2, layers=(26, 22)),
    ],
    "trtllm": [
        Shape(1),
        Shape(2),
        Shape(8),
        Shape(2, pp=2),
        Shape(1, dp=4),
        Shape(1, dp=8, ep=8),
        Shape(1, dp=8, ep=2),
        Shape(8, ep=4),
        Shape(4, pp=2, ep=4),
        Shape(4, pp=2, layers=(26, 22)),
    ],
}
PLANS = [
    (engine, Plan(replicas, shape, BatchingLimits(16 * (i + 1), 512 * (i + 1))))
    for engine, shapes in SHAPES.items()
    for replicas in (1, 3)
    for i, shape in enumerate(shapes)
]


@cache
def problem(engine: str, model: str = QWEN_MOE) -> Problem:
    """Four nodes of eight devices that serve a mixture of experts."""
    cluster = pool(8, nodes=4)
    cluster["pools"][0]["interconnect"] = "ib_400g"
    data = mapping(
        engine={"name": engine, "version": VERSIONS[engine]},
        model={"config": model, "max_model_len": 4096},
        cluster=cluster,
        search=None,
    )
    return resolve(Scenario.model_validate(data))


@pytest.mark.parametrize(("engine", "plan"), PLANS, ids=lambda x: x if isinstance(x, str) else "")
def test_round_trip(engine: str, plan: Plan) -> None:
    """Engine, model, replicas, shape and limits all come back."""
    launch = read_launch(launch_commands(problem(engine), plan), DEFAULTS)
    assert (launch.engine, launch.model, launch.plan) == (engine, QWEN_MOE, plan)


def test_twenty_plans_an_engine() -> None:
    """No two of them alike."""
    for engine in VERSIONS:
        assert len({plan for name, plan in PLANS if name == engine}) == 20


@pytest.mark.parametrize(
    ("command", "shape"),
    [
        ("vllm serve m -tp 4 -pp=2", Shape(4, pp=2)),
        ("vllm serve m --tensor_parallel_size 4 -dp 2 -ep", Shape(4, dp=2, ep=8)),
        ("python3 -m sglang.launch_server --model-path=m --tp 8 --ep 4", Shape(8, ep=4)),
        ("trtllm-serve m --moe_expert_parallel_size 2 --tp_size 4", Shape(4, ep=2)),
    ],
)
def test_other_spellings(command: str, shape: Shape) -> None:
    """Short names, underscores and ``=``; limits that are left out are the engine's own."""
    launch = read_launch([command], DEFAULTS)
    assert launch.plan == Plan(1, shape, DEFAULTS)
    assert launch.model == "m"


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ([], "command: is empty"),
        (["ls -l"], "starts none of vllm serve, sglang.launch_server, trtllm-serve"),
        (["vllm serve"], "names no model"),
        (["vllm serve 'm"], "is no shell command (No closing quotation)"),
        (["vllm serve m -tp two"], "'tensor-parallel-size two' must be a whole number"),
        (["trtllm-serve m --tp_size 4 --ep_size 3"], "has sizes that make no plan: ep is 3"),
        (["vllm serve m -tp 1", "vllm serve m -tp 2"], "starts another replica than the first"),
    ],
)
def test_bad_commands(commands: list[str], message: str) -> None:
    """One line that says what is wrong."""
    with pytest.raises(InputError, match=re.escape(message)):
        read_launch(commands, DEFAULTS)


@pytest.mark.parametrize(
    ("engine", "model", "shape", "message"),
    [
        ("vllm", QWEN_MOE, Shape(8, ep=4), "cannot spread experts over part of a stage"),
        ("vllm", LLAMA_8B, Shape(2, dp=2), "attention data parallel needs a mixture of experts"),
        ("sglang", LLAMA_8B, Shape(2, ep=2), "the model has no experts to spread"),
        ("trtllm", QWEN_MOE, Shape(2, dp=2), "cannot run so many attention groups in a stage"),
    ],
)
def test_shapes_without_flags(engine: str, model: str, shape: Shape, message: str) -> None:
    """A shape that the engine cannot be told is refused: exit code 2."""
    with pytest.raises(RefusalError, match=message) as caught:
        launch_commands(problem(engine, model), Plan(1, shape, DEFAULTS))
    assert caught.value.exit_code == 2


def words(engine: str, shape: Shape, **changed: Any) -> list[str]:
    """The words of the command of one replica."""
    target = dataclasses.replace(problem(engine), **changed)
    return shlex.split(launch_commands(target, Plan(1, shape, DEFAULTS))[0])


def test_own_flags() -> None:
    """Each engine's spelling of the same spread."""
    vllm = " ".join(words("vllm", Shape(2, pp=2, dp=2, ep=4)))
    assert (
        "--tensor-parallel-size 2 --pipeline-parallel-size 2 --data-parallel-size 2"
        " --enable-expert-parallel"
    ) in vllm
    sglang = " ".join(words("sglang", Shape(2, pp=2, dp=2, ep=4)))
    assert "--tp-size 4 --pp-size 2 --dp-size 2 --enable-dp-attention --ep-size 4" in sglang
    trtllm = " ".join(words("trtllm", Shape(1, pp=2, dp=4, ep=4)))
    assert "enable_attention_dp" in trtllm
    assert "--tp_size 4 --pp_size 2 --ep_size 4" in trtllm


def test_experts_of_an_old_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.4.5 has a switch where later versions have a number."""
    monkeypatch.setitem(VERSIONS, "sglang", "0.4.5")
    plan = Plan(1, Shape(4, ep=4), DEFAULTS)
    commands = launch_commands(problem.__wrapped__("sglang"), plan)
    assert "--enable-ep-moe" in commands[0]
    assert read_launch(commands, DEFAULTS).plan == plan


def test_over_nodes() -> None:
    """What runs on several nodes: Ray for vLLM, one command a node for SGLang."""
    assert "--data-parallel-backend ray" in " ".join(words("vllm", Shape(1, dp=16, ep=16)))
    assert "--distributed-executor-backend ray" in " ".join(words("vllm", Shape(8, pp=2)))
    plan = Plan(2, Shape(8, pp=2), DEFAULTS)
    assert len(launch_commands(problem("sglang"), plan)) == 4
