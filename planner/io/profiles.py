"""Read the facts that ship in the `profiles` package: devices and kernel tables."""

from __future__ import annotations

import hashlib
import io
import json
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.errors import NO_VALUE, InputError
from simulator.device import Device
from simulator.table import AttentionSeries, GemmGrid, KernelTable, MessageSeries
from simulator.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable

    from numpy.typing import NDArray

PACKAGE: Final = "profiles"
DEVICES_FILE: Final = "profiles/hardware/devices.json"
KERNELS_FOLDER: Final = "profiles/kernels"
GIGA: Final = 1e9
MICRO: Final = 1e-6
TERA: Final = 1e12
SCHEMA_VERSION: Final = 1
"""Format of a kernel table that this version reads."""

Arrays = dict[str, "NDArray[Any]"]


@lru_cache(maxsize=64)
def load_device(name: str) -> Device:
    """Facts of one catalogued device.

    A device without fp8 tensor cores has an fp8 peak of 0; one without a known price has ``None``.

    Raises
    ------
    InputError
        If the catalogue has no such name.

    """
    text = (files(PACKAGE) / "hardware" / "devices.json").read_text(encoding="utf-8")
    entries = {entry["name"]: entry for entry in json.loads(text)["devices"]}
    if name not in entries:
        raise InputError(source=DEVICES_FILE, field="device", value=name, rule=_one_of(entries))
    fact = {key: item["value"] for key, item in entries[name].items() if key != "name"}
    return Device(
        name=name,
        memory_bytes=int(fact["memory_gib"] * GIB),
        memory_bandwidth_bytes_per_s=fact["memory_bandwidth_gb_per_s"] * GIGA,
        bf16_flops=fact["bf16_tflops"] * TERA,
        fp8_flops=(fact["fp8_tflops"] or 0.0) * TERA,
        link_bytes_per_s=fact["link_gb_per_s"] * GIGA,
        scaleup_domain=fact["scaleup_domain"],
        elementwise_launch_s=fact["elementwise_launch_us"] * MICRO,
        elementwise_bytes_per_s=fact["elementwise_gb_per_s"] * GIGA,
        price_per_hour=fact["price_per_hour"],
    )


def available_kernel_tables() -> list[tuple[str, str, str]]:
    """Shipped kernel tables as sorted (device, engine, engine version)."""
    return sorted(_metadata_files())


def kernel_table_digest(device: str, engine: str, version: str) -> str:
    """SHA-256 of a shipped kernel table's arrays, as recorded beside it."""
    return str(_read_metadata(device, engine, version)["npz_sha256"])


@lru_cache(maxsize=16)
def load_kernel_table(device: str, engine: str, version: str) -> KernelTable:
    """Read one shipped kernel table, once per process.

    Raises
    ------
    InputError
        If no such table ships, it has another format, or its arrays do not match the checksum
        beside them.

    """
    known = available_kernel_tables()
    for position, (field, value) in enumerate(
        (("device", device), ("engine", engine), ("version", version))
    ):
        choices = {key[position] for key in known}
        if value not in choices:
            raise InputError(source=KERNELS_FOLDER, field=field, value=value, rule=_one_of(choices))
        known = [key for key in known if key[position] == value]
    metadata = _read_metadata(device, engine, version)
    name = f"{engine}-{version}.npz"
    file = files(PACKAGE) / "kernels" / device / name
    blob = file.read_bytes() if file.is_file() else b""
    digest = hashlib.sha256(blob).hexdigest()
    if digest != metadata["npz_sha256"]:
        raise InputError(
            source=f"{KERNELS_FOLDER}/{device}/{name}",
            field="sha256",
            value=digest,
            rule=f"must be {metadata['npz_sha256']}, as the JSON beside it says",
        )
    with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
        arrays: Arrays = {key: stored[key] for key in stored.files}
    return _table(metadata, arrays)


def _one_of(names: Iterable[str]) -> str:
    return "must be one of: " + ", ".join(sorted(names))


def _metadata_files() -> dict[tuple[str, str, str], Traversable]:
    """Shipped ``<device>/<engine>-<version>.json`` by device, engine and version."""
    found: dict[tuple[str, str, str], Traversable] = {}
    for folder in (files(PACKAGE) / "kernels").iterdir():
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name.endswith(".json"):
                engine, _, version = file.name.removesuffix(".json").partition("-")
                found[folder.name, engine, version] = file
    return found


def _read_metadata(device: str, engine: str, version: str) -> dict[str, Any]:
    """The JSON beside one table's arrays, checked to be that table's and of our format."""
    source = f"{KERNELS_FOLDER}/{device}/{engine}-{version}.json"
    try:
        metadata = json.loads(_metadata_files()[device, engine, version].read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            source=source, field="", value=NO_VALUE, rule=f"is not JSON: {error}"
        ) from None
    if not isinstance(metadata, dict):
        raise InputError(source=source, field="", value=metadata, rule="must be a mapping")
    expected = {
        "schema_version": SCHEMA_VERSION,
        "device": device,
        "engine": engine,
        "engine_version": version,
    }
    for field, wanted in expected.items():
        if metadata.get(field) != wanted:
            raise InputError(
                source=source, field=field, value=metadata.get(field), rule=f"must be {wanted!r}"
            )
    return metadata


def _table(metadata: dict[str, Any], arrays: Arrays) -> KernelTable:
    code_max = metadata["code_max"]
    m, n, k = (_frozen(arrays[f"gemm_{axis}"]) for axis in ("m", "n", "k"))
    return KernelTable(
        device=metadata["device"],
        engine=metadata["engine"],
        engine_version=metadata["engine_version"],
        gemm={
            dtype: GemmGrid(m, n, k, _seconds(arrays, f"gemm_{dtype}", code_max))
            for dtype in metadata["gemm_dtypes"]
        },
        context=_attention(arrays, "context", metadata["kv_dtypes"], code_max),
        generation=_attention(arrays, "generation", metadata["kv_dtypes"], code_max),
        all_reduce=_messages(arrays, "all_reduce", metadata["backends"], code_max),
        nccl=_messages(arrays, "nccl", metadata["nccl_ops"], code_max),
    )


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """The array made read-only: the table is shared by everything in the process."""
    array.setflags(write=False)
    return array


def _seconds(arrays: Arrays, name: str, code_max: int) -> NDArray[np.float64]:
    """Decode one array of log-latency codes (code 0 = missing = NaN)."""
    codes, (low, high) = arrays[f"{name}_codes"], arrays[f"{name}_log_range"]
    time_s = np.exp(low + (codes.astype(np.float64) - 1) / (code_max - 1) * (high - low))
    return _frozen(np.where(codes == 0, np.nan, time_s))


def _attention(
    arrays: Arrays, family: str, kv_dtypes: list[str], code_max: int
) -> tuple[AttentionSeries, ...]:
    batch, length = _frozen(arrays[f"{family}_batch"]), _frozen(arrays[f"{family}_length"])
    times = _seconds(arrays, family, code_max)
    keys = arrays[f"{family}_key"].tolist()
    return tuple(
        AttentionSeries(
            head_dim=head_dim,
            window_tokens=window,
            kv_dtype=kv_dtypes[kv_code],
            heads=heads,
            kv_heads=kv_heads,
            batch=batch,
            length=length,
            time_s=time_s,
        )
        for (head_dim, window, kv_code, heads, kv_heads), time_s in zip(keys, times, strict=True)
    )


def _messages(
    arrays: Arrays, family: str, names: list[str], code_max: int
) -> dict[tuple[str, int], MessageSeries]:
    elements = _frozen(arrays[f"{family}_elements"])
    times = _seconds(arrays, family, code_max)
    keys = arrays[f"{family}_key"].tolist()
    return {
        (names[code], gpus): MessageSeries(elements, time_s)
        for (code, gpus), time_s in zip(keys, times, strict=True)
    }
