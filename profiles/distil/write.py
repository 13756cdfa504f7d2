"""Write the shipped files: arrays and, beside them, where they come from."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.io.kernel_format import FAMILIES, LOG_STEP, SCHEMA_VERSION, SKEW_UNIT
from profiles.distil.encode import npz_bytes
from profiles.distil.families import READERS
from profiles.distil.records import concatenate, grids, prefer
from profiles.distil.systems import (
    DISTRIBUTION,
    LEFT_OUT_FOLDERS,
    LICENCE,
    PACKAGE,
    open_table,
    source_version,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from profiles.distil.records import Grid, Records
    from profiles.distil.systems import SourceTable, Target

Sources = dict[str, list["SourceTable"]]
"""Opened tables by kind, in order of preference."""


def distil(
    target: Target, sources: Mapping[str, Sequence[SourceTable]]
) -> tuple[dict[str, list[Grid]], list[str]]:
    """The grids of every family, and what the opened tables hold beside them."""
    left_out: list[str] = []
    parts: dict[str, list[Records]] = {}
    for kind, tables in sources.items():
        reader = READERS[kind]
        read = [reader.read(table.columns, target, left_out) for table in tables]
        parts.setdefault(reader.family, []).append(prefer(read, FAMILIES[reader.family]))
    found = {
        name: grids(concatenate(parts[name]), name, left_out) for name in FAMILIES if name in parts
    }
    return found, sorted(set(left_out))


def layout(found: Mapping[str, Sequence[Grid]]) -> tuple[dict[str, Any], NDArray[np.int32]]:
    """What a file says of its grids, and the numbers of their series and axes."""
    described: dict[str, Any] = {}
    numbers: list[NDArray[Any]] = []
    for name, members in found.items():
        described[name] = [
            {
                "labels": list(grid.labels),
                "series": len(grid.series),
                "axes": [len(axis) for axis in grid.axes],
            }
            for grid in members
        ]
        unit = [SKEW_UNIT if column == "skew" else 1 for column in FAMILIES[name].series]
        for grid in members:
            numbers += [*np.rint(grid.series / unit).T, *grid.axes]
    return described, np.concatenate(numbers).astype(np.int32)


def metadata(
    target: Target, sources: Mapping[str, Sequence[SourceTable]], left_out: list[str], version: str
) -> dict[str, Any]:
    """What the JSON beside the arrays says: origin, licence, encoding; not yet the checksum."""
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "device": target.device,
        "engine": target.engine,
        "engine_version": target.version,
        "source": {"package": DISTRIBUTION, "version": version, "licence": LICENCE},
        "versions": {kind: list(target.tables[kind]) for kind in sources},
        "tables": [
            {"path": f"{PACKAGE}/systems/{table.name}", "rows": table.rows, "sha256": table.sha256}
            for tables in sources.values()
            for table in tables
        ],
        "left_out": [*left_out, *LEFT_OUT_FOLDERS],
        "quantisation": f"log latency in steps of {LOG_STEP}: within 0.05 % of the value measured",
    }
    return data | ({"notes": list(target.notes)} if target.notes else {})


def write(systems: Path, out: Path, target: Target) -> Path:
    """Distil one target's tables under ``systems`` into ``out``; same input, same bytes.

    Returns
    -------
    Path
        The ``.npz`` written; the ``.json`` lies beside it.

    """
    sources: Sources = {
        kind: [open_table(systems, target.path(kind, version)) for version in versions]
        for kind, versions in target.tables.items()
    }
    found, left_out = distil(target, sources)
    times_s = [grid.time_s for members in found.values() for grid in members]
    npz = npz_bytes(*layout(found), times_s)
    described = metadata(target, sources, left_out, source_version(systems))
    described["npz_sha256"] = hashlib.sha256(npz).hexdigest()
    folder = out / target.device
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{target.engine}-{target.version}.npz"
    file.write_bytes(npz)
    file.with_suffix(".json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return file
