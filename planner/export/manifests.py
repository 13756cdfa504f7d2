"""A plan as a file that a cluster or Docker starts: Compose, LeaderWorkerSet, KServe, Dynamo."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, Final

import yaml

from planner.errors import RefusalError
from planner.export.flags import devices_of, server_of
from planner.export.schemas import require_valid
from planner.export.server import FIRST_PORT, RENDEZVOUS_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from planner.export.server import Server
    from planner.problem import Problem
    from simulator.plan import Plan

    Document = dict[str, Any]

_IMAGES: Final = {"vllm": "vllm/vllm-openai:v{version}", "sglang": "lmsysorg/sglang:v{version}"}
"""The engines' own images on Docker Hub; TensorRT-LLM's and Dynamo's are published elsewhere."""

_RAY_SCRIPT: Final = "/vllm-workspace/examples/online_serving/multi-node-serving.sh"
"""Starts Ray in vLLM's image (docs/deployment/frameworks/lws.md)."""

_KSERVE_FLAGS: Final = "VLLM_ADDITIONAL_ARGS"
"""Variable whose flags KServe's presets add (docs/samples/llmisvc, config/llmisvcconfig)."""

_NAME_CHARS: Final = 40
"""Of the 63 of a DNS label, so that pods' suffixes fit (RFC 1123)."""

_LINE_CHARS: Final = 100
_GPU: Final = "nvidia.com/gpu"


def manifest(problem: Problem, plan: Plan, form: str, image: str | None = None) -> Document:
    """The document that starts ``plan``.

    Parameters
    ----------
    problem, plan
        What to start.
    form
        One of :data:`FORMS`.
    image
        Container image in place of the engine's own.

    Raises
    ------
    RefusalError
        When the engine cannot be told the plan, or ``form`` cannot describe it.

    """
    server = server_of(problem, plan)
    document = FORMS[form](problem, plan, server, image)
    require_valid(form, document)
    return document


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, over which people stumble."""

    def ignore_aliases(self, data: object) -> bool:
        """Write what is used twice twice."""
        return True


def as_yaml(document: Document) -> str:
    """The document's text, keys in the order in which they were put there."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=_LINE_CHARS)


def _compose(problem: Problem, plan: Plan, server: Server, image: str | None) -> Document:
    """Docker Compose on one machine: a service a replica, each with its devices."""
    width = plan.shape.devices
    if plan.devices > problem.pool_of(plan.shape).devices_per_node:
        raise RefusalError(
            f"plan {problem.plan_text(plan)}: takes {plan.devices} devices; Compose starts one "
            f"machine, which has {problem.pool_of(plan.shape).devices_per_node}: use lws"
        )
    services = {}
    for replica in range(plan.replicas):
        port = FIRST_PORT[server.engine] + replica
        services[f"replica-{replica}"] = {
            "image": _image(server, image),
            "entrypoint": [],
            "command": _command(server, "--port", str(port), *_listen(server)),
            **({"environment": dict(server.environment)} if server.environment else {}),
            "ports": [f"{port}:{port}"],
            "ipc": "host",  # NCCL's ranks share memory
            "deploy": {
                "resources": {
                    "reservations": {
                        "devices": [
                            {
                                "driver": "nvidia",
                                "device_ids": devices_of(problem, plan, replica)[:width],
                                "capabilities": ["gpu"],
                            }
                        ]
                    }
                }
            },
        }
    return {"name": _name(server), "services": services}


def _lws(problem: Problem, plan: Plan, server: Server, image: str | None) -> Document:
    """A LeaderWorkerSet: a group a replica, a pod a node."""
    leader, worker = _pods(problem, plan, server, _image(server, image))
    template: Document = {
        "size": server.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "workerTemplate": {"spec": worker},
    }
    if server.nodes > 1:
        template["leaderTemplate"] = {"metadata": {"labels": {"role": "leader"}}, "spec": leader}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": _name(server)},
        "spec": {"replicas": plan.replicas, "leaderWorkerTemplate": template},
    }


def _kserve(problem: Problem, plan: Plan, server: Server, image: str | None) -> Document:
    """A KServe LLMInferenceService.

    KServe's presets start vLLM themselves, reachable as its router expects, and add the flags of a
    variable; over several nodes they also start the other nodes, so Ray's flag is left out.
    """
    if server.engine != "vllm":
        raise RefusalError(f"KServe's presets start vLLM, not {server.engine}: use lws")
    shape = plan.shape
    # Its controller starts data / dataLocal pods a replica, or else as many as pipeline says
    # (ParallelismSpec.GetSize, pkg/apis/serving/v1alpha2/llm_inference_service_types_func.go), so
    # stages within a node are told to the engine alone.
    parallelism: Document = {"tensor": shape.tp}
    pods = 1
    if shape.dp > 1:
        local = min(shape.dp, max(1, server.devices_per_node // (shape.tp * shape.pp)))
        parallelism |= {"data": shape.dp, "dataLocal": local}
        pods = shape.dp // local
    elif server.nodes > 1:
        parallelism["pipeline"] = pods = shape.pp
    if shape.ep > 1:
        parallelism["expert"] = True
    if pods != server.nodes:
        raise RefusalError(
            f"plan {problem.plan_text(plan)}: a replica fills {server.nodes} nodes, of which "
            f"KServe would start {pods}: use lws"
        )
    flags = [word for flag in server.flags if flag[1:] != ("ray",) for word in flag]
    variables = {_KSERVE_FLAGS: shlex.join(flags), **server.environment}
    container: Document = {
        "name": "main",
        **({"image": image} if image else {}),
        "env": _env(variables),
        "resources": _resources(server),
    }
    spec: Document = {
        "model": {"uri": f"hf://{server.model}", "name": server.model},
        "replicas": plan.replicas,
        "parallelism": parallelism,
        "router": {"scheduler": {}, "route": {}, "gateway": {}},
        "template": {"containers": [container]},
    }
    if server.nodes > 1:
        spec["worker"] = {"containers": [container]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": _name(server)},
        "spec": spec,
    }


def _dynamo(problem: Problem, plan: Plan, server: Server, image: str | None) -> Document:
    """A DynamoGraphDeployment: Dynamo's frontend and workers that take the engine's own flags."""
    if server.engine == "trtllm":
        raise RefusalError(
            "Dynamo's worker for TensorRT-LLM takes no flags of trtllm-serve: use lws or kserve"
        )
    if image is None:
        raise RefusalError("Dynamo's images have no name on Docker Hub: give --image")
    named = server.engine == "sglang"  # its flags name the model already
    arguments = [] if named else ["--model", server.model]
    arguments += [word for flag in server.flags for word in flag]
    main: Document = {
        "name": "main",
        "image": image,
        "command": ["python3", "-m", f"dynamo.{server.engine}"],
        "args": arguments,
        "resources": _resources(server),
        **_variables(server),
    }
    frontend = {"name": "main", "image": image, "command": ["python3", "-m", "dynamo.frontend"]}
    worker: Document = {
        "name": "worker",
        "type": "worker",
        "replicas": plan.replicas,
        "podTemplate": {"spec": {"containers": [main]}},
    }
    if server.nodes > 1:
        worker["multinode"] = {"nodeCount": server.nodes}
    return {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": _name(server)},
        "spec": {
            "backendFramework": server.engine,
            "components": [
                {
                    "name": "frontend",
                    "type": "frontend",
                    "replicas": 1,
                    "podTemplate": {"spec": {"containers": [frontend]}},
                },
                worker,
            ],
        },
    }


FORMS: Final[Mapping[str, Callable[[Problem, Plan, Server, str | None], Document]]] = {
    "docker-compose": _compose,
    "lws": _lws,
    "kserve": _kserve,
    "dynamo": _dynamo,
}
"""Formats that are documents; the others are the engines' own commands."""


def _pods(problem: Problem, plan: Plan, server: Server, image: str) -> tuple[Document, Document]:
    """Pods of the first node of a replica and of each further one; the same for a single node."""
    if server.nodes == 1:
        pod = _pod(server, image, _command(server, *_listen(server)), serves=True)
        return pod, pod
    if server.engine == "sglang":
        rendezvous = f"$(LWS_LEADER_ADDRESS):{RENDEZVOUS_PORT}"
        joined = [
            *("--nnodes", str(server.nodes)),
            *("--node-rank", "$(LWS_WORKER_INDEX)"),
            *("--dist-init-addr", rendezvous),
        ]
        command = server.words(*joined, *_listen(server))
        return _pod(server, image, command, serves=True), _pod(server, image, command)
    if server.engine == "vllm":
        start = f"bash {_RAY_SCRIPT}"
        leads = f"{start} leader --ray_cluster_size=$(LWS_GROUP_SIZE) && {server.shell()}"
        follows = f"{start} worker --ray_address=$(LWS_LEADER_ADDRESS)"
        return (
            _pod(server, image, ["sh", "-c", leads], serves=True),
            _pod(server, image, ["sh", "-c", follows]),
        )
    raise RefusalError(
        f"plan {problem.plan_text(plan)}: a replica fills {server.nodes} nodes, which "
        "TensorRT-LLM starts by MPI: no manifest does that"
    )


def _pod(server: Server, image: str, command: list[str], *, serves: bool = False) -> Document:
    """A pod with one container that takes the replica's devices of a node."""
    container: Document = {
        "name": "main",
        "image": image,
        "command": command,
        "resources": _resources(server),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        **_variables(server),
    }
    if serves:
        container["ports"] = [{"containerPort": FIRST_PORT[server.engine]}]
    # NCCL's ranks share memory, of which a pod has 64 MiB otherwise.
    return {
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


def _resources(server: Server) -> Document:
    return {"limits": {_GPU: str(server.devices_per_node)}}


def _variables(server: Server) -> Document:
    return {"env": _env(server.environment)} if server.environment else {}


def _env(variables: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _command(server: Server, *more: str) -> list[str]:
    """The server's command, through a shell where it also writes a file."""
    if not server.options:
        return server.words(*more)
    return ["sh", "-c", server.shell(*more)]


def _listen(server: Server) -> tuple[str, ...]:
    """Flags by which the server is reached from outside its container; vLLM's is by default."""
    return () if server.engine == "vllm" else ("--host", "0.0.0.0")


def _image(server: Server, image: str | None) -> str:
    if image is not None:
        return image
    if server.engine not in _IMAGES:
        raise RefusalError(f"{server.engine}'s images have no name on Docker Hub: give --image")
    return _IMAGES[server.engine].format(version=server.version)


def _name(server: Server) -> str:
    """A DNS label from the model's name."""
    last = server.model.rstrip("/").rsplit("/", 1)[-1].lower()
    label = re.sub(r"[^a-z0-9]+", "-", last)[:_NAME_CHARS].strip("-")
    return label if label[:1].isalpha() else f"model-{label}".rstrip("-")
