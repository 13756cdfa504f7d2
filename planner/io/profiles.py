"""Read the kernel tables that ship in the `profiles` package."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np

from planner.errors import NO_VALUE, InputError
from planner.io.kernel_format import SCHEMA_VERSION
from planner.io.kernel_table import build_table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable

    from numpy.typing import NDArray

    from simulator.table import KernelTable

PACKAGE: Final = "profiles"
KERNELS_FOLDER: Final = "profiles/kernels"
DIGEST_CHARS: Final = 64
"""Length of a SHA-256 in hexadecimal."""
UNREADABLE: Final = (
    BadZipFile,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zlib.error,
)
"""What reading a damaged archive of arrays can raise."""


def available_kernel_tables() -> list[tuple[str, str, str]]:
    """Shipped kernel tables as sorted (device, engine, engine version)."""
    return sorted(_metadata_files())


def kernel_table_digest(device: str, engine: str, version: str) -> str:
    """SHA-256 of a shipped kernel table's arrays, as recorded beside it."""
    return str(_read_metadata(device, engine, version)["npz_sha256"])


@lru_cache(maxsize=16)
def load_kernel_table(device: str, engine: str, version: str) -> KernelTable:
    """Read one shipped kernel table, once per process; nothing is read before the call.

    Raises
    ------
    InputError
        If no such table ships, it has another format, its arrays do not match the checksum beside
        them, or they do not describe a table.

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
    source = f"{KERNELS_FOLDER}/{device}/{name}"
    file = files(PACKAGE) / "kernels" / device / name
    if not file.is_file():
        raise InputError(
            source=source, field="", value=NO_VALUE, rule="must lie beside its JSON file"
        )
    blob = file.read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if digest != metadata["npz_sha256"]:
        raise InputError(
            source=source,
            field="sha256",
            value=digest,
            rule=f"must be {metadata['npz_sha256']}, as the JSON beside it says",
        )
    return build_table(source, device, engine, version, _read_arrays(source, blob))


def _read_arrays(source: str, blob: bytes) -> dict[str, NDArray[Any]]:
    """The members of an ``.npz``."""
    try:
        stored = np.load(io.BytesIO(blob), allow_pickle=False)
        if isinstance(stored, np.lib.npyio.NpzFile):
            with stored:
                return {key: stored[key] for key in stored.files}
    except UNREADABLE as error:
        raise InputError(
            source=source, field="", value=NO_VALUE, rule=f"must be an archive of arrays: {error}"
        ) from None
    raise InputError(
        source=source, field="", value=NO_VALUE, rule="must be an archive of arrays, is one array"
    )


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
    except (ValueError, RecursionError) as error:
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
        value = metadata.get(field)
        # `True == 1`, so the type counts too.
        if type(value) is not type(wanted) or value != wanted:
            raise InputError(source=source, field=field, value=value, rule=f"must be {wanted!r}")
    digest = metadata.get("npz_sha256")
    if not isinstance(digest, str) or len(digest) != DIGEST_CHARS:
        raise InputError(
            source=source,
            field="npz_sha256",
            value=digest,
            rule=f"must be {DIGEST_CHARS} hexadecimal digits",
        )
    return metadata
