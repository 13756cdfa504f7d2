"""Small scenarios that the tests of the planner share: seconds of traffic, tens of plans."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.scenario import Scenario

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"
QWEN_7B = "Qwen/Qwen2.5-7B-Instruct"

OBJECTIVES = (
    "mean_ttft",
    "p99_ttft",
    "mean_tpot",
    "p99_tpot",
    "mean_e2e",
    "p99_e2e",
    "throughput",
    "devices",
)

SMALL: Mapping[str, Any] = {
    "schema_version": 1,
    "model": {"config": LLAMA_8B, "max_model_len": 1024},
    "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 2}]},
    "engine": {"name": "vllm", "version": "0.24.0"},
    "workload": {
        "input_tokens": {"min": 20, "max": 200},
        "output_tokens": {"min": 1, "max": 30},
        "num_requests": 20,
        "arrival": "all_at_once",
    },
    "objective": {"minimize": "mean_e2e"},
    "search": {
        "space": {"tp": [1, 2], "max_num_seqs": [2, 4, 8], "max_num_batched_tokens": [64, 512]}
    },
}
"""Two devices, eighteen plans, twenty requests at once."""


def mapping(**sections: Any) -> dict[str, Any]:
    """:data:`SMALL` with whole sections replaced; ``None`` removes one."""
    data = {**copy.deepcopy(dict(SMALL)), **copy.deepcopy(sections)}
    return {name: section for name, section in data.items() if section is not None}


def scenario(base_dir: Path | None = None, **sections: Any) -> Scenario:
    """:data:`SMALL` as a scenario, with whole sections replaced."""
    return Scenario.model_validate(mapping(**sections), base_dir=base_dir)


def pool(devices: int, nodes: int = 1, device: str = "H100-SXM-80GB") -> dict[str, Any]:
    """A cluster section: one pool of ``nodes`` machines with ``devices`` devices each."""
    return {"pools": [{"device": device, "nodes": nodes, "devices_per_node": devices}]}


def pools(seed: int) -> dict[str, Any]:
    """A cluster section: two or three pools of one to four devices each, with prices."""
    rng = np.random.default_rng([seed, 1])
    kinds = ("A100-SXM4-80GB", "H100-SXM-80GB", "H200-SXM-141GB", "L40S")
    devices = rng.choice(kinds, int(rng.integers(2, 4)), replace=False)
    return {
        "pools": [
            {
                "device": str(device),
                "nodes": int(rng.integers(1, 3)),
                "devices_per_node": int(rng.integers(1, 3)),
                "price_per_hour": float(rng.choice([1.0, 1.9, 3.9])),
            }
            for device in devices
        ]
    }


def engine(**settings: Any) -> dict[str, Any]:
    """An engine section with settings of its own."""
    return {"name": "vllm", "version": "0.24.0", **settings}


def goal(name: str) -> dict[str, str]:
    """The objective section of one of :data:`OBJECTIVES`."""
    return {"maximize" if name == "throughput" else "minimize": name}


def write_trace(path: Path, rng: np.random.Generator, num_requests: int) -> None:
    """Write a small trace in Azure's format: bursts of a few requests, 50 ms apart."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for i in range(num_requests):
        prompt, output = rng.integers(1, 200), rng.integers(1, 40)
        rows.append(f"2023-11-16 18:00:{i // 80:02d}.{i // 4 % 20 * 50:03d}0000,{prompt},{output}")
    path.write_text("\n".join(rows) + "\n")


def random_sections(seed: int, folder: Path) -> dict[str, Any]:
    """Sections of a random small scenario, all but objective and SLOs.

    KV blocks are tight in half of them, token budgets of 8 bind everywhere, and some widths and
    limits of the grid break an engine rule.
    """
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(8, 36))
    workload: dict[str, Any] = {
        "input_tokens": {"min": 5, "max": int(rng.integers(20, 200))},
        "output_tokens": {"min": 1, "max": int(rng.integers(2, 40))},
        "num_requests": requests,
    }
    kind = ("poisson", "all_at_once", "closed_loop", "trace")[seed % 4]
    if kind == "closed_loop":
        workload["concurrency"] = int(rng.integers(2, 9))
    elif kind == "trace":
        write_trace(folder / "trace.csv", rng, requests)
        workload = {"trace": "trace.csv", "request_rate": float(rng.integers(20, 400))}
    else:
        workload["arrival"] = kind
        if kind == "poisson":
            workload["request_rate"] = float(rng.integers(20, 400))
    nodes = int(rng.integers(1, 3))
    blocks = {"num_gpu_blocks": int(rng.integers(16, 40))} if rng.random() < 0.5 else {}
    return {
        "model": {"config": (LLAMA_8B, QWEN_7B)[int(rng.integers(2))], "max_model_len": 256},
        "cluster": pool(int(rng.integers(1, 5)) if nodes == 1 else 2, nodes),
        "engine": engine(**blocks),
        "workload": workload,
        "search": {
            "seed": seed,
            "space": {
                "tp": _some(rng, (1, 2, 3, 4)),
                "max_num_seqs": _some(rng, (2, 4, 8, 16)),
                "max_num_batched_tokens": _some(rng, (8, 64, 128, 512)),
            },
        },
    }


def _some(rng: np.random.Generator, values: tuple[int, ...]) -> list[int]:
    """Two or three of ``values``, in any order."""
    return [int(v) for v in rng.choice(values, int(rng.integers(2, 4)), replace=False)]
