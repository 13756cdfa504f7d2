"""Manifests: valid by their schemas, the plan found in them again, refusals where none exists."""

from __future__ import annotations

import copy
import shlex
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from planner.errors import PlannerError, RefusalError
from planner.export import FORMATS, export_plan
from planner.export.manifests import FORMS, as_yaml, manifest
from planner.export.read import read_launch
from planner.export.schemas import problems_of, require_valid
from planner.resolve import resolve
from planner.scenario import Scenario
from simulator.plan import BatchingLimits, Plan, Shape
from tests.problems import LLAMA_8B, mapping, pool, scenario

if TYPE_CHECKING:
    from planner.problem import Problem

QWEN_MOE = "Qwen/Qwen3-30B-A3B"
VERSIONS = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.0.0rc3"}
LIMITS = BatchingLimits(64, 2048)
OTHER = BatchingLimits(7, 7)
IMAGE = "example/image:1"
SMALL_SHAPES = (Shape(1), Shape(2), Shape(4, ep=4), Shape(2, pp=2), Shape(1, dp=4, ep=4))
WIDE_SHAPES = (Shape(16, ep=16), Shape(8, pp=2), Shape(1, dp=16, ep=16))


@cache
def problem(engine: str) -> Problem:
    """Four nodes of eight devices that serve a mixture of experts."""
    cluster = pool(8, nodes=4)
    cluster["pools"][0]["interconnect"] = "ib_400g"
    data = mapping(
        engine={"name": engine, "version": VERSIONS[engine]},
        model={"config": QWEN_MOE, "max_model_len": 4096},
        cluster=cluster,
        search=None,
    )
    return resolve(Scenario.model_validate(data))


def written(engine: str, plan: Plan, form: str) -> dict[str, Any]:
    """The document as a reader of its YAML gets it."""
    document: dict[str, Any] = yaml.safe_load(as_yaml(manifest(problem(engine), plan, form, IMAGE)))
    assert problems_of(form, document) == []
    return document


def started(document: dict[str, Any], form: str) -> list[str]:
    """The command of every replica in a document."""
    if form == "docker-compose":
        return [_line(service["command"]) for service in document["services"].values()]
    spec = document["spec"]
    if form == "lws":
        group = spec["leaderWorkerTemplate"]
        pod = group.get("leaderTemplate", group["workerTemplate"])["spec"]
        line = _line(pod["containers"][0]["command"]).rsplit(" --nnodes", 1)[0]
    elif form == "kserve":
        (container,) = spec["template"]["containers"]
        variables = {v["name"]: v["value"] for v in container["env"]}
        line = f"vllm serve {spec['model']['name']} {variables['VLLM_ADDITIONAL_ARGS']}"
    else:
        spec = spec["components"][1]
        (container,) = spec["podTemplate"]["spec"]["containers"]
        program = {"dynamo.vllm": "vllm serve", "dynamo.sglang": "python -m sglang.launch_server"}
        arguments = [word for word in container["args"] if word != "--model"]
        line = f"{program[container['command'][2]]} {shlex.join(arguments)}"
    return [line] * spec["replicas"]


def _line(command: list[str]) -> str:
    """A command as one line of a shell, without what starts Ray before it."""
    if command[:2] != ["sh", "-c"]:
        return shlex.join(command)
    line = command[2]
    return line.partition(" && ")[2] if line.startswith("bash") else line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", VERSIONS)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=lambda s: s.text)
def test_single_node(engine: str, shape: Shape, form: str) -> None:
    """Valid, and the plan comes back from it; or refused in words."""
    plan = Plan(2, shape, LIMITS)
    supported = {"kserve": ("vllm",), "dynamo": ("vllm", "sglang")}.get(form, tuple(VERSIONS))
    if engine not in supported:
        with pytest.raises(RefusalError, match="use lws"):
            written(engine, plan, form)
        return
    assert read_launch(started(written(engine, plan, form), form), OTHER).plan == plan


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=lambda s: s.text)
def test_leader_worker_set_over_nodes(engine: str, shape: Shape) -> None:
    """A pod a node, each with its devices; the leader's command holds the plan."""
    plan = Plan(2, shape, LIMITS)
    document = written(engine, plan, "lws")
    group = document["spec"]["leaderWorkerTemplate"]
    assert (document["spec"]["replicas"], group["size"]) == (2, 2)
    for template in ("leaderTemplate", "workerTemplate"):
        (container,) = group[template]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    lines = started(document, "lws")
    assert read_launch(lines, OTHER).plan == plan
    if engine == "vllm":
        worker = group["workerTemplate"]["spec"]["containers"][0]["command"][2]
        assert worker.endswith("worker --ray_address=$(LWS_LEADER_ADDRESS)")


def test_kserve_over_nodes() -> None:
    """Pods by data parallel or stages, as its controller counts them; Ray's flag is not there."""
    spread = written("vllm", Plan(1, Shape(1, dp=16, ep=16), LIMITS), "kserve")["spec"]
    assert spread["parallelism"] == {"tensor": 1, "data": 16, "dataLocal": 8, "expert": True}
    assert "ray" not in str(spread)
    staged = written("vllm", Plan(1, Shape(8, pp=2), LIMITS), "kserve")["spec"]
    assert staged["parallelism"] == {"tensor": 8, "pipeline": 2}
    assert staged["worker"] == staged["template"]
    within = written("vllm", Plan(1, Shape(2, pp=2), LIMITS), "kserve")["spec"]
    assert within["parallelism"] == {"tensor": 2}
    with pytest.raises(RefusalError, match="fills 2 nodes, of which KServe would start 1"):
        written("vllm", Plan(1, Shape(16), LIMITS), "kserve")


def test_dynamo_over_nodes() -> None:
    """The worker says how many nodes it takes."""
    document = written("vllm", Plan(1, Shape(16, ep=16), LIMITS), "dynamo")
    assert document["spec"]["components"][1]["multinode"] == {"nodeCount": 2}


def test_compose_gives_each_replica_its_devices_and_port() -> None:
    """Nothing is given twice."""
    services = written("sglang", Plan(3, Shape(2), LIMITS), "docker-compose")["services"]
    devices = [
        service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for service in services.values()
    ]
    assert devices == [["0", "1"], ["2", "3"], ["4", "5"]]
    ports = [service["ports"] for service in services.values()]
    assert ports == [["30000:30000"], ["30001:30001"], ["30002:30002"]]


@pytest.mark.parametrize(
    ("engine", "plan", "form", "image", "message"),
    [
        ("vllm", Plan(2, Shape(8), LIMITS), "docker-compose", None, "Compose starts one machine"),
        ("trtllm", Plan(1, Shape(2), LIMITS), "lws", None, "give --image"),
        ("vllm", Plan(1, Shape(2), LIMITS), "dynamo", None, "give --image"),
        ("trtllm", Plan(1, Shape(16), LIMITS), "lws", IMAGE, "TensorRT-LLM starts by MPI"),
        ("vllm", Plan(1, Shape(8, ep=2), LIMITS), "lws", None, "cannot spread experts over part"),
    ],
)
def test_refusals(engine: str, plan: Plan, form: str, image: str | None, message: str) -> None:
    """What a format cannot describe is refused with what to do."""
    with pytest.raises(RefusalError, match=message):
        manifest(problem(engine), plan, form, image)


@pytest.mark.parametrize("form", FORMS)
def test_schemas_refuse_what_is_wrong(form: str) -> None:
    """A field that is unknown, missing or of another type shows; the planner never writes it."""
    good = written("vllm", Plan(1, Shape(2), LIMITS), form)
    misspelt = {**good, "replcas": 1}
    assert problems_of(form, misspelt) == ["replcas: Extra inputs are not permitted"]
    with pytest.raises(PlannerError, match=f"the {form} file is wrong: replcas"):
        require_valid(form, misspelt)
    for key in good:
        lacking = {k: v for k, v in good.items() if k != key}
        assert problems_of(form, lacking) == [f"{key}: Field required"]
    if "spec" in good and "replicas" in good["spec"]:
        texts = copy.deepcopy(good)
        texts["spec"]["replicas"] = "2"
        assert "valid integer" in problems_of(form, texts)[0]


def test_mounts_must_be_volumes() -> None:
    """A pod that mounts what it does not have would never start."""
    document = written("vllm", Plan(1, Shape(2), LIMITS), "lws")
    document["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["volumes"] = []
    assert "mount shm is no volume of the pod" in problems_of("lws", document)[0]


def test_names_are_labels() -> None:
    """Whatever the model is called."""
    document = written("vllm", Plan(1, Shape(2), LIMITS), "lws")
    assert document["metadata"]["name"] == "qwen3-30b-a3b"


def test_export_plan() -> None:
    """The engine's own format is its commands; another engine's is refused."""
    text = export_plan(scenario(), "2xtp1", "vllm")
    launch = read_launch(text.splitlines(), OTHER)
    assert (launch.model, launch.plan.replicas) == (LLAMA_8B, 2)
    with pytest.raises(RefusalError, match="the scenario's engine is vllm"):
        export_plan(scenario(), "tp1", "sglang")
    with pytest.raises(RefusalError, match="tp is wider than a node"):
        export_plan(scenario(), "tp4", "lws")
    assert set(FORMS) < set(FORMATS)
