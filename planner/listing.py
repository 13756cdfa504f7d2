"""What a scenario may name: devices, models, engines, networks; and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from planner.io.data_file import read_json
from planner.io.devices import device_names, device_warnings, load_device, measured_device
from planner.io.engines import engine_versions, load_engine
from planner.io.hf_config import read_model
from planner.io.interconnects import interconnect_names, load_interconnect
from planner.io.models import catalogue
from planner.io.profiles import available_kernel_tables, kernel_table_digest
from simulator.rules import POLICIES
from simulator.units import GIB
from simulator.weights import active_parameter_count, parameter_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Row = dict[str, object]

_BILLION: Final = 1e9
_GIGA: Final = 1e9
_TERA: Final = 1e12
_GBIT_PER_BYTE_PER_S: Final = 8e-9
_US_PER_S: Final = 1e6
_DIGEST_CHARS: Final = 12


def devices() -> list[Row]:
    """Every device: its facts and where its kernel times come from."""
    rows: list[Row] = []
    for name in device_names():
        device, measured = load_device(name), measured_device(name)
        tables = [f"{e} {v}" for d, e, v in available_kernel_tables() if d == measured]
        rows.append(
            {
                "device": name,
                "memory_gib": round(device.memory_bytes / GIB, 1),
                "gb_per_s": device.memory_bandwidth_bytes_per_s / _GIGA,
                "bf16_tflops": device.bf16_flops / _TERA,
                "fp8_tflops": device.fp8_flops / _TERA or None,
                "usd_per_h": device.price_per_hour,
                "kernel_times": "measured" if measured == name else f"from {measured}",
                "kernel_tables": tables,
                "notes": list(device_warnings(name)),
            }
        )
    return rows


def models() -> list[Row]:
    """Every catalogued model with its parameters in billions; aliases follow its name."""
    rows: list[Row] = []
    for entry in catalogue.entries():
        shape = read_model(
            entry["name"],
            base_dir=Path(),
            weight_dtype=None,
            kv_cache_dtype="bf16",
            max_model_len=None,
            source="catalogue",
        )
        rows.append(
            {
                "model": entry["name"],
                "parameters_billion": round(parameter_count(shape) / _BILLION, 2),
                "active_billion": round(active_parameter_count(shape) / _BILLION, 2),
                "weights": shape.weight_dtype,
                "max_model_len": shape.max_position_embeddings,
                "aliases": list(entry["aliases"]),
            }
        )
    return sorted(rows, key=lambda row: str(row["model"]).lower())


def engines() -> list[Row]:
    """Every engine version whose rules ship, its policy and where its constants come from."""
    rows: list[Row] = []
    for name, version in engine_versions():
        profile = load_engine(name, version)
        rows.append(
            {
                "engine": name,
                "version": version,
                "policy": POLICIES[profile.rules(0).policy],
                "kernel_times": profile.kernel_table_version,
                "host_constants": "own" if not profile.host_warnings else "transferred",
            }
        )
    return rows


def kernels() -> list[Row]:
    """Every table of measured kernel times: operators, measurements, where they come from."""
    rows: list[Row] = []
    for device, engine, version in available_kernel_tables():
        about = read_json(f"kernels/{device}", f"{engine}-{version}.json")
        source = about["source"]
        rows.append(
            {
                "device": device,
                "engine": engine,
                "version": version,
                "families": len(about["versions"]),
                "measurements": sum(table["rows"] for table in about["tables"]),
                "source": [source["package"], source["version"], source["licence"]],
                "sha256": kernel_table_digest(device, engine, version)[:_DIGEST_CHARS],
            }
        )
    return rows


def interconnects() -> list[Row]:
    """Every network between machines."""
    rows: list[Row] = []
    for name in interconnect_names():
        network = load_interconnect(name)
        if network is not None:
            rows.append(
                {
                    "interconnect": name,
                    "nics": "per device" if network.nics_per_device else network.nics_per_node,
                    "gbit_per_s_reached": round(network.nic_bytes_per_s * _GBIT_PER_BYTE_PER_S, 1),
                    "latency_us": round(network.latency_s * _US_PER_S, 1),
                }
            )
    return rows


KINDS: Final[Mapping[str, Callable[[], list[Row]]]] = {
    "devices": devices,
    "models": models,
    "engines": engines,
    "kernels": kernels,
    "interconnects": interconnects,
}
"""What can be listed."""
