"""Shapes of the documents that an export writes, checked before one leaves the planner.

They hold the fields that an export sets and refuse every other, so a misspelt one is found. Fields,
types and allowed values are those of the published sources:

- Compose: compose-spec/compose-spec, ``schema/compose-spec.json``
- LeaderWorkerSet: kubernetes-sigs/lws, ``config/crd/bases`` (v1)
- LLMInferenceService: kserve/kserve, ``pkg/apis/serving/v1alpha2`` and ``docs/samples/llmisvc``
- DynamoGraphDeployment: ai-dynamo/dynamo, ``deploy/operator/api/v1beta1``
- pods: Kubernetes core/v1 PodSpec
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planner.errors import PlannerError

_Label = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A DNS label (RFC 1123)."""
_Count = Annotated[int, Field(ge=1)]
_Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
_Words = Annotated[list[str], Field(min_length=1)]
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Part):
    name: _Label | None = None
    labels: dict[str, str] = {}


# -- pods


class _Limits(_Part):
    limits: dict[Literal["nvidia.com/gpu"], _Quantity]


class _Variable(_Part):
    name: str
    value: str


class _Port(_Part):
    containerPort: Annotated[int, Field(ge=1, le=65535)]  # noqa: N815


class _Mount(_Part):
    name: _Label
    mountPath: Annotated[str, Field(pattern="^/")]  # noqa: N815


class _EmptyDir(_Part):
    medium: Literal["", "Memory"]


class _Volume(_Part):
    name: _Label
    emptyDir: _EmptyDir  # noqa: N815


class _Container(_Part):
    name: _Label
    image: Annotated[str, Field(min_length=1)]
    command: _Words
    args: list[str] = []
    env: list[_Variable] = []
    resources: _Limits | None = None
    ports: list[_Port] = []
    volumeMounts: list[_Mount] = []  # noqa: N815


class _PresetContainer(_Part):
    """A container whose image, unless given, and command come from KServe's preset."""

    name: Literal["main"]
    image: str | None = None
    env: Annotated[list[_Variable], Field(min_length=1)]
    resources: _Limits


class _PresetPod(_Part):
    containers: Annotated[list[_PresetContainer], Field(min_length=1, max_length=1)]


class _Pod(_Part):
    containers: Annotated[list[_Container], Field(min_length=1)]
    volumes: list[_Volume] = []

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> _Pod:
        names = {volume.name for volume in self.volumes}
        for container in self.containers:
            for mount in container.volumeMounts:
                if mount.name not in names:
                    raise ValueError(f"mount {mount.name} is no volume of the pod")
        return self


class _PodTemplate(_Part):
    metadata: _Metadata | None = None
    spec: _Pod


# -- Compose


class _Device(_Part):
    driver: Literal["nvidia"]
    device_ids: _Words
    capabilities: Annotated[list[Literal["gpu"]], Field(min_length=1)]


class _Reservations(_Part):
    devices: list[_Device]


class _ComposeResources(_Part):
    reservations: _Reservations


class _Deploy(_Part):
    resources: _ComposeResources


class _Service(_Part):
    image: str
    entrypoint: list[str]
    command: _Words
    environment: dict[str, str] = {}
    ports: list[Annotated[str, Field(pattern=r"^\d+:\d+$")]]
    ipc: Literal["host"]
    deploy: _Deploy


class _Compose(_Part):
    name: _Label
    services: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]+$")], _Service], Field(min_length=1)
    ]


# -- Kubernetes


class _LeaderWorkerTemplate(_Part):
    size: _Count
    restartPolicy: Literal["RecreateGroupOnPodRestart", "None"]  # noqa: N815
    leaderTemplate: _PodTemplate | None = None  # noqa: N815
    workerTemplate: _PodTemplate  # noqa: N815


class _LwsSpec(_Part):
    replicas: _Count
    leaderWorkerTemplate: _LeaderWorkerTemplate  # noqa: N815


class _Lws(_Part):
    apiVersion: Literal["leaderworkerset.x-k8s.io/v1"]  # noqa: N815
    kind: Literal["LeaderWorkerSet"]
    metadata: _Metadata
    spec: _LwsSpec


class _Model(_Part):
    uri: Annotated[str, Field(pattern=r"^(hf|pvc|s3|oci)://")]
    name: str


class _Parallelism(_Part):
    tensor: _Count
    pipeline: _Count | None = None
    data: _Count | None = None
    dataLocal: _Count | None = None  # noqa: N815
    expert: bool = False

    @model_validator(mode="after")
    def _data_and_pipeline(self) -> _Parallelism:
        # Its controller counts pods from data over dataLocal and then ignores pipeline.
        if (self.data is None) != (self.dataLocal is None):
            raise ValueError("data and dataLocal go together")
        if self.data is not None and self.pipeline is not None:
            raise ValueError("data and pipeline exclude each other")
        return self


class _Router(_Part):
    scheduler: _Nothing
    route: _Nothing
    gateway: _Nothing


class _KserveSpec(_Part):
    model: _Model
    replicas: _Count
    parallelism: _Parallelism
    router: _Router
    template: _PresetPod
    worker: _PresetPod | None = None


class _Kserve(_Part):
    apiVersion: Literal["serving.kserve.io/v1alpha2"]  # noqa: N815
    kind: Literal["LLMInferenceService"]
    metadata: _Metadata
    spec: _KserveSpec


class _Multinode(_Part):
    nodeCount: Annotated[int, Field(ge=2)]  # noqa: N815


class _Component(_Part):
    name: _Label
    type: Literal["frontend", "worker"]
    replicas: _Count
    podTemplate: _PodTemplate  # noqa: N815
    multinode: _Multinode | None = None


class _DynamoSpec(_Part):
    backendFramework: Literal["vllm", "sglang", "trtllm"]  # noqa: N815
    components: Annotated[list[_Component], Field(min_length=1)]


class _Dynamo(_Part):
    apiVersion: Literal["nvidia.com/v1beta1"]  # noqa: N815
    kind: Literal["DynamoGraphDeployment"]
    metadata: _Metadata
    spec: _DynamoSpec


_SCHEMAS: Final[dict[str, type[_Part]]] = {
    "docker-compose": _Compose,
    "lws": _Lws,
    "kserve": _Kserve,
    "dynamo": _Dynamo,
}


def problems_of(form: str, document: object) -> list[str]:
    """What is wrong with ``document`` as a file of format ``form``, one line each."""
    try:
        _SCHEMAS[form].model_validate(document)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []


def require_valid(form: str, document: object) -> None:
    """Raise where an export wrote what its format does not know: a bug of ours."""
    wrong = problems_of(form, document)
    if wrong:
        raise PlannerError(f"the {form} file is wrong: {'; '.join(wrong)}")
