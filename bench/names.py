"""Resolver: public model, device, precision and engine names to what the planner knows.

``resolve_names(row)`` reads a row of ``runs_columns.md`` (or of a points or plan-choice file, which
have fewer columns). Every name that nobody knows raises `UncoveredError` with the name in it. An
engine version without a profile of its own is stood in for by the nearest known one, which the
result says.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.model_names import Checkpoint, checkpoint_of
from bench.uncovered import UncoveredError
from planner.io.devices import device_names
from planner.io.engines import engine_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Checkpoint",
    "Names",
    "Release",
    "UncoveredError",
    "checkpoint_of",
    "device_of",
    "release_of",
    "resolve_names",
]

_RELEASES: Final = Path(__file__).with_name("engine_releases.csv")

_ENGINES: Final = {
    "vllm": "vllm",
    "vllmv1": "vllm",
    "vllmv0": "vllm",
    "sglang": "sglang",
    "sgl": "sglang",
    "trtllm": "trtllm",
    "tensorrtllm": "trtllm",
    "tensorrt": "trtllm",
    "trt": "trtllm",
}
"""Names of engines without case, spaces and signs."""

_DEVICE_NOISE: Final = frozenset(
    [
        "nvidia",
        "geforce",
        "tesla",
        "gpu",
        "tensor",
        "core",
        "blackwell",
        "hopper",
        "ampere",
        "ada",
        "lovelace",
        "edition",
        "hgx",
        "dgx",
        "hbm2e",
        "hbm3",
        "hbm3e",
        "gddr6",
        "gddr7",
    ]
)
"""Words of a device's name that the catalogue leaves out."""

_NOMINAL: Final = 0.1
"""Names of one board differ by this in memory (B200: 180, 183, 186 and 192 GB)."""


@dataclass(frozen=True)
class Release:
    """An engine version, and the profile that stands for it.

    Parameters
    ----------
    engine
        The planner's name of the engine.
    asked
        Version as the row states it; empty where it states none.
    number
        The same as a number: of a nightly build, the newest version in use by its day.
    version
        Version of the profile used.
    note
        Empty where the profile is that version's own, else why another one stands in.

    """

    engine: str
    asked: str
    number: str
    version: str
    note: str


@dataclass(frozen=True)
class Names:
    """What the names of one row stand for."""

    checkpoint: Checkpoint
    device: str
    release: Release


def resolve_names(row: Mapping[str, str]) -> Names:
    """Model, device and engine of a row.

    Parameters
    ----------
    row
        ``model``, ``hardware`` and ``engine`` are needed; ``quantization``, ``weight_dtype``,
        ``kv_cache_dtype``, ``checkpoint``, ``engine_version``, ``engine_version_filled`` and
        ``date`` are used where present.

    Raises
    ------
    UncoveredError
        If a name is not known.

    """

    def get(column: str) -> str:
        return row.get(column) or ""

    return Names(
        checkpoint_of(
            get("model"),
            get("quantization"),
            weight_dtype=get("weight_dtype"),
            kv_cache_dtype=get("kv_cache_dtype"),
            checkpoint=get("checkpoint"),
        ),
        device_of(get("hardware")),
        release_of(
            get("engine"),
            get("engine_version") or get("engine_version_filled"),
            date=get("date"),
        ),
    )


@lru_cache(maxsize=64)
def device_of(name: str) -> str:
    """Device of the catalogue that a name stands for.

    It is the exact name, or a device that has every word asked for, memory within 10 %. Of
    several, SXM boards come first, then those with more memory: ``H100`` is H100-SXM-80GB.

    Raises
    ------
    UncoveredError
        If the catalogue has no such device.

    """
    bare = re.sub(r"\(.*?\)", "", name).strip()
    if bare in device_names():
        return bare
    asked, asked_gb = _device_words(bare)
    found = []
    for known in device_names():
        words, gb = _device_words(known)
        apart = abs(asked_gb - gb) if asked_gb and gb else 0
        if asked and asked <= words and apart <= _NOMINAL * gb:
            found.append(("sxm" not in words, apart, -gb, known))
    if not found:
        raise UncoveredError(f"device {name or '(none)'} is not in the catalogue")
    return min(found)[-1]


def release_of(engine: str, version: str = "", *, date: str = "") -> Release:
    """Engine profile that stands for a version as a table spells it.

    A version without a profile is stood in for by the newest known one at or below it, or by the
    oldest where all are newer. A nightly build counts by its date (in its name, or the row's):
    the newest version in use by then. No version at all counts as a build of the row's date.

    Parameters
    ----------
    engine
        Name of the engine, in any case and spelling.
    version
        ``0.10.2``, ``v0.9.0``, ``1.1.0rc2.post2``, ``nightly-dev-20260216-d3bae71e`` or nothing.
    date
        When it was run, ``YYYY-MM-DD``; used for nightly builds and missing versions.

    Raises
    ------
    UncoveredError
        If no profile of the engine ships.

    """
    ours = _ENGINES.get(re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", engine).lower()))
    known = sorted((v for name, v in engine_versions() if name == ours), key=version_key)
    if ours is None or not known:
        raise UncoveredError(f"engine {engine or '(none)'} has no profile")
    number = version.strip().removeprefix("v")
    if number in known:
        return Release(ours, version, number, number, "")
    if not re.match(r"\d", number):
        built = re.search(r"20\d{6}", number)
        day = f"{built[0][:4]}-{built[0][4:6]}-{built[0][6:]}" if built else date
        number = _newest_by(ours, day)
    below = [v for v in known if version_key(v) <= version_key(number)] if number else known
    stand_in = below[-1] if below else known[0]
    note = f"{ours} {stand_in} for {version or 'no version'}"
    return Release(ours, version, number or stand_in, stand_in, note)


def version_key(version: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Order of versions: ``1.0.0rc3`` before ``1.0.0`` before ``1.0.0.post1``."""
    match = re.match(r"(\d+(?:\.\d+)*)(.*)", version)
    if match is None:
        return (), 0, ()
    release = tuple(map(int, match[1].split(".")))
    while release and release[-1] == 0:
        release = release[:-1]
    suffix = match[2]
    stage = -1 if re.match(r"\.?(dev|a|b|rc)", suffix) else 0
    return release, stage, tuple(map(int, re.findall(r"\d+", suffix)))


def _device_words(name: str) -> tuple[frozenset[str], int]:
    """Words of a device's name, and its gigabytes or 0."""
    text = re.sub(r"sxm\d", "sxm", name.lower())
    text = re.sub(r"(?<=rtx)(?=\d)", " ", text)
    words = set(re.findall(r"[a-z0-9]+", text)) - _DEVICE_NOISE
    sizes = [word for word in words if re.fullmatch(r"\d+gi?b?", word)]
    return frozenset(words.difference(sizes)), max((int(s.rstrip("gib")) for s in sizes), default=0)


def _newest_by(engine: str, day: str) -> str:
    """Newest version in use by ``day``, or the first listed; nothing where the day is unknown."""
    listed = sorted((d, version_key(v), v) for name, v, d in _published() if name == engine)
    if not day or not listed:
        return ""
    return max((entry for entry in listed if entry[0] <= day), default=listed[0])[2]


@lru_cache(maxsize=1)
def _published() -> tuple[tuple[str, str, str], ...]:
    """Engine, version and first day in use of the releases in ``bench/engine_releases.csv``."""
    with _RELEASES.open(newline="", encoding="utf-8") as file:
        return tuple((r["engine"], r["version"], r["date"]) for r in csv.DictReader(file))
