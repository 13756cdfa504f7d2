"""Collective tables: all-reduce, NCCL, and the all-to-all of expert parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from profiles.distil.records import concatenate, names, seconds, select

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from profiles.distil.records import Records
    from profiles.distil.systems import Columns, Target

NCCL_DTYPE: Final = "half"
S_PER_US: Final = 1e-6
DEEPEP_SMS: Final = 20
"""Multiprocessors that DeepEP's high-throughput kernels use: its default, ``Buffer.num_sms``."""
TRAY_DEVICES: Final = 4
NODE_DEVICES: Final = 8
TRAY_FOLDERS: Final = ("gb200", "gb300")
"""Systems whose nodes are trays of `TRAY_DEVICES`; the others' are of `NODE_DEVICES`."""
DEFAULT_DTYPE: Final = "default"
"""What is sent where the source does not say: what the engine sends by default."""
DTYPE_NAMES: Final = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "fp4": "fp4",
    DEFAULT_DTYPE: DEFAULT_DTYPE,
}
NVLINK_BACKENDS: Final = {
    "NVLinkOneSided": "nvlink_one_sided",
    "NVLinkTwoSided": "nvlink_two_sided",
}


def node_devices(target: Target) -> int:
    """Devices of one node of the measured system."""
    return TRAY_DEVICES if target.folder in TRAY_FOLDERS else NODE_DEVICES


def all_reduce(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """The engine's own all-reduce; ``message_size`` counts elements, not bytes.

    TensorRT-LLM's was timed inside a CUDA graph only (aiconfigurator repository,
    ``collector/collect_all_reduce.py``).
    """
    del target, left_out
    count = len(columns["latency"])
    mode = np.array(
        [name.rpartition("_")[2] for name in columns["backend"]]
        if "backend" in columns
        else ["graph"] * count,
        object,
    )
    return {
        "mode": mode,
        "devices": columns["num_gpus"],
        "elements": columns["message_size"],
        "time_s": seconds(columns["latency"]),
    }


def nccl(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """NCCL of 2-byte elements; ``message_size`` counts elements, not bytes."""
    del target
    kept = columns["nccl_dtype"] == NCCL_DTYPE
    left_out += [f"nccl_dtype {name}" for name in sorted(set(columns["nccl_dtype"][~kept]))]
    records = {
        "operation": columns["op_name"],
        "devices": columns["num_gpus"],
        "elements": columns["message_size"],
        "time_s": seconds(columns["latency"]),
    }
    return select(records, kept)


def expert_all_to_all(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """DeepEP as vLLM and TensorRT-LLM call it; microseconds in the source."""
    del target, left_out
    return {
        "backend": columns["comm_backend"],
        "phase": columns["phase"],
        "dtype": names(columns["comm_dtype"], DTYPE_NAMES),
        "ranks": columns["ep_size"],
        "nodes": columns["node_num"],
        "hidden_size": columns["hidden_size"],
        "top_k": columns["topk"],
        "num_experts": columns["num_experts"],
        "tokens": columns["num_tokens"],
        "time_s": np.asarray(columns["latency"], np.float64) * S_PER_US,
    }


def _deepep(
    columns: Columns,
    target: Target,
    backend: str,
    dispatch_us: NDArray[Any],
    combine_us: NDArray[Any],
) -> Records:
    count = len(columns["num_token"])
    shared: Records = {
        "backend": np.full(count, backend, object),
        "dtype": np.full(count, DEFAULT_DTYPE, object),
        "ranks": columns["node_num"] * node_devices(target),
        "nodes": columns["node_num"],
        "hidden_size": columns["hidden_size"],
        "top_k": columns["num_topk"],
        "num_experts": columns["num_experts"],
        "tokens": columns["num_token"],
    }
    return concatenate(
        [
            shared
            | {
                "phase": np.full(count, phase, object),
                "time_s": np.asarray(time_us, np.float64) * S_PER_US,
            }
            for phase, time_us in (("dispatch", dispatch_us), ("combine", combine_us))
        ]
    )


def deepep_low_latency(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """DeepEP's low-latency kernels as SGLang calls them; all devices of each node."""
    del left_out
    return _deepep(
        columns, target, "deepep_ll", columns["dispatch_avg_t_us"], columns["combine_avg_t_us"]
    )


def deepep_high_throughput(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """DeepEP's high-throughput kernels as SGLang calls them; all devices of each node."""
    kept = (columns["dispatch_sms"] == DEEPEP_SMS) & (columns["combine_sms"] == DEEPEP_SMS)
    left_out.append(f"high-throughput DeepEP on other than {DEEPEP_SMS} multiprocessors")
    rows = select(columns, kept)
    return _deepep(
        rows,
        target,
        "deepep_ht",
        rows["dispatch_transmit_us"] + rows["dispatch_notify_us"],
        rows["combine_transmit_us"] + rows["combine_notify_us"],
    )


def nvlink_all_to_all(columns: Columns, target: Target, left_out: list[str]) -> Records:
    """TensorRT-LLM's all-to-all over NVLink; milliseconds in the source.

    The two-sided kernels exchange counts before they send (``alltoall_prepare``): that is part of
    the dispatch.
    """
    key = [
        columns[c]
        for c in ("kernel_source", "moe_dtype", "moe_ep_size", "hidden_size", "topk", "num_experts")
    ]
    rows = list(zip(*(c.tolist() for c in (*key, columns["num_tokens"])), strict=True))
    operation = [name.removeprefix("alltoall_") for name in columns["op_name"]]
    prepare_ms = {
        row: latency
        for row, name, latency in zip(rows, operation, columns["latency"], strict=True)
        if name == "prepare"
    }
    latency_ms = [
        latency + (prepare_ms.get(row, 0.0) if name == "dispatch" else 0.0)
        for row, name, latency in zip(rows, operation, columns["latency"], strict=True)
    ]
    left_out.append("all-to-all over NVLink: combining in low precision")
    ranks = columns["moe_ep_size"]
    records: Records = {
        "backend": names(columns["kernel_source"], NVLINK_BACKENDS),
        "phase": np.array(operation, object),
        "dtype": names(columns["moe_dtype"], DTYPE_NAMES),
        "ranks": ranks,
        "nodes": -(-ranks // node_devices(target)),
        "hidden_size": columns["hidden_size"],
        "top_k": columns["topk"],
        "num_experts": columns["num_experts"],
        "tokens": columns["num_tokens"],
        "time_s": seconds(np.array(latency_ms)),
    }
    return select(records, np.isin(np.array(operation), ["dispatch", "combine"]))
