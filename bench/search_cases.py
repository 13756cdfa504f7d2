"""The cases of ``bench.search``: what is served, which requests at which loads, which plans.

Traces are public ones and are not copied here but for the first: ``--traces DIR`` says where the
others lie. Each case has a committed list of its plans (``bench/search_plans``), so that effort is
counted over the same plans whatever becomes of the spaces' defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import scenarios
from planner import Scenario

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHIPPED: Final = Path(scenarios.__file__).parent / "traces"
"""Folder of the traces that come with the package."""

PLANS: Final = Path(__file__).parent / "search_plans"
"""Folder of the plan lists, one file for each workload, one plan to a line, in tie order."""

OBJECTIVES: Final = (
    "mean_ttft",
    "p99_ttft",
    "mean_tpot",
    "p99_tpot",
    "mean_e2e",
    "p99_e2e",
    "throughput",
    "goodput",
)

LIGHT, KNEE, SATURATED = "light", "knee", "saturated"
LOADS: Final = {LIGHT: 0.3, KNEE: 0.7, SATURATED: 1.2}
"""Shares of a workload's capacity at which it is asked."""

_TIME_LIMIT_S: Final = 600.0
_MODELS: Final = Path(__file__).parent / "search_models"


@dataclass(frozen=True)
class Served:
    """One model on eight devices under one trace.

    Parameters
    ----------
    name
        Name of the workload and of its plan list.
    model
        The scenario's model section.
    trace
        File in the folder of traces.
    num_requests
        Requests from its start.
    capacity
        Requests per second that the best plan for throughput reaches when all are sent at once, to
        two digits (``python -m bench.search --capacity``).
    max_num_seqs, max_num_batched_tokens
        Values of the plan space, chosen so that about 1,200 plans can run.
    goodput
        Limits on each request, milliseconds.
    bundled
        File among the shipped traces that begins alike, for where the whole one is missing.
    device
        The devices.
    dp
        Attention groups of the plan space; more than one for mixtures of experts alone.
    """

    name: str
    model: dict[str, Any]
    trace: str
    num_requests: int
    capacity: float
    max_num_seqs: tuple[int, ...]
    max_num_batched_tokens: tuple[int, ...]
    goodput: dict[str, float]
    bundled: str | None = None
    device: str = "H100-SXM-80GB"
    dp: tuple[int, ...] | None = None

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts, whose shares are summed up apart."""
        return self.dp is not None

    def find(self, traces: Path) -> Path | None:
        """The trace, or what is shipped of it, or ``None``."""
        if (traces / self.trace).exists():
            return traces / self.trace
        return None if self.bundled is None else SHIPPED / self.bundled

    def scenario(
        self,
        traces: Path,
        objective: str = "mean_e2e",
        *,
        rate: float | None = None,
        num_requests: int | None = None,
        devices: int = 8,
        cluster: Sequence[dict[str, Any]] = (),
        replicas: Sequence[int] = (),
    ) -> Scenario:
        """The scenario; without a rate all requests are sent at once.

        ``cluster``, if given, has the pools in place of one node of so many devices, and
        ``replicas`` the numbers of replicas in place of all that fit.
        """
        found = self.find(traces)
        if found is None:
            raise FileNotFoundError(f"{self.trace} is not in {traces}")
        sense = "maximize" if objective in ("throughput", "goodput") else "minimize"
        arrivals: dict[str, Any] = (
            {"arrival": "all_at_once"} if rate is None else {"request_rate": rate}
        )
        node = {"device": self.device, "nodes": 1, "devices_per_node": devices}
        pools = list(cluster) or [{**node, "price_per_hour": 3.9}]
        space = {
            **({"dp": self.dp} if self.dp else {}),
            **({"replicas": list(replicas)} if replicas else {}),
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        data = {
            "schema_version": 1,
            "model": self.model,
            "cluster": {"pools": pools},
            "engine": {"name": "vllm", "version": "0.24.0"},
            "workload": {
                "trace": str(found),
                "num_requests": min(num_requests or self.num_requests, self.num_requests),
                **arrivals,
            },
            "goodput": self.goodput,
            "objective": {sense: objective},
            "search": {"time_limit_s": _TIME_LIMIT_S, "space": space},
        }
        return Scenario.model_validate(data, base_dir=traces, source=f"bench:{self.name}")

    def rate(self, load: str) -> float:
        """Requests per second at one of :data:`LOADS`."""
        return float(f"{LOADS[load] * self.capacity:.2g}")

    def plans(self) -> list[str]:
        """The committed plan list."""
        return (PLANS / f"{self.name}.txt").read_text(encoding="utf-8").split()

    def write_plans(self, plans: Iterable[str]) -> None:
        """Replace the committed plan list."""
        PLANS.mkdir(exist_ok=True)
        (PLANS / f"{self.name}.txt").write_text("".join(f"{p}\n" for p in plans), encoding="utf-8")


_LLAMA: Final = {"config": "meta-llama/Llama-3.1-70B-Instruct", "max_model_len": 16384}
_QWEN: Final = {"config": "Qwen/Qwen3-32B", "max_model_len": 16384}
_QWEN_LONG: Final = {"config": str(_MODELS / "qwen3-32b-yarn.json"), "max_model_len": 131072}
"""Qwen3-32B with the YaRN factor of 4 that its model card gives for contexts of 131,072 tokens."""

_SEQS: Final = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
_FEWER_SEQS: Final = (16, 32, 64, 128, 256, 512, 1024)
_TOKENS: Final = (512, 1024, 2048, 3072, 4096, 8192, 16384)

WORKLOADS: Final = (
    Served(
        "llama-70b-azure-conv",
        _LLAMA,
        "AzureLLMInferenceTrace_conv.csv",
        4000,
        19.0,
        _SEQS,
        _TOKENS,
        {"ttft_ms": 2000, "tpot_ms": 50},
        "azure_conv_2023_2000.csv",
    ),
    Served(
        "llama-70b-azure-code",
        _LLAMA,
        "AzureLLMInferenceTrace_code.csv",
        4000,
        15.0,
        _SEQS,
        _TOKENS,
        {"ttft_ms": 2000, "tpot_ms": 50},
    ),
    Served(
        "llama-70b-lmsys",
        _LLAMA,
        "apexplus_llama_lmsys_025.jsonl",
        1024,
        60.0,
        _SEQS,
        _TOKENS,
        {"ttft_ms": 500, "tpot_ms": 30},
    ),
    Served(
        "qwen3-32b-azure-conv",
        _QWEN,
        "AzureLLMInferenceTrace_conv.csv",
        4000,
        37.0,
        _FEWER_SEQS,
        _TOKENS,
        {"ttft_ms": 1000, "tpot_ms": 30},
        "azure_conv_2023_2000.csv",
    ),
    Served(
        "qwen3-32b-mooncake-conv",
        _QWEN_LONG,
        "mooncake_conversation_trace.jsonl",
        3000,
        2.8,
        _SEQS,
        _TOKENS,
        {"ttft_ms": 5000, "tpot_ms": 50},
    ),
    Served(
        "mixtral-8x22b-azure-conv",
        {"config": "mistralai/Mixtral-8x22B-v0.1", "max_model_len": 16384},
        "AzureLLMInferenceTrace_conv.csv",
        1000,
        21.0,
        _FEWER_SEQS,
        _TOKENS,
        {"ttft_ms": 2000, "tpot_ms": 50},
        "azure_conv_2023_2000.csv",
        dp=(1, 2, 4, 8),
    ),
    Served(
        "qwen3-235b-azure-conv",
        {"config": "Qwen/Qwen3-235B-A22B", "max_model_len": 16384},
        "AzureLLMInferenceTrace_conv.csv",
        1000,
        21.0,
        _FEWER_SEQS,
        _TOKENS,
        {"ttft_ms": 2000, "tpot_ms": 50},
        "azure_conv_2023_2000.csv",
        device="H200-SXM-141GB",
        dp=(1, 2, 4, 8),
    ),
)
"""Seven workloads, each at three loads: fifteen cases of dense models, six of experts."""
