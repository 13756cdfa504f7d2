"""A damaged kernel file is refused in one line, whether or not its checksum was fixed up."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.errors import InputError
from planner.io import profiles
from planner.io.kernel_format import LAYOUT, NUMBERS
from planner.io.kernel_table import build_table
from tests.unit.test_profiles import KERNELS, SMALL, timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from simulator.table import KernelTable

OTHER = ("A100-SXM4-80GB", "trtllm", "1.0.0")
FLIPS = 200


def contents(table: KernelTable) -> str:
    """Digest of everything in a table: two tables are the same if theirs are."""
    digest = hashlib.sha256()
    for family, grid in timed(table):
        digest.update(family.encode())
        for name in type(grid).__dataclass_fields__:
            value = getattr(grid, name)
            digest.update(
                value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            )
    for mapping in (table.gemm, table.all_reduce, table.nccl, table.moe, table.latent_bmm):
        digest.update(repr(list(mapping)).encode())
    return digest.hexdigest()


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped A100 tables that the loader reads instead."""
    folder = tmp_path / "kernels" / SMALL[0]
    shutil.copytree(KERNELS / SMALL[0], folder)
    monkeypatch.setattr(profiles, "files", lambda _: tmp_path)
    return folder


def load(key: tuple[str, str, str] = SMALL) -> KernelTable:
    """A table, past the cache."""
    return profiles.load_kernel_table.__wrapped__(*key)


def change_metadata(change: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Damage: entries replaced."""
    return lambda blob: json.dumps(json.loads(blob) | change).encode()


def without(field: str) -> Callable[[bytes], bytes]:
    """Damage: one entry removed."""

    def damage(blob: bytes) -> bytes:
        return json.dumps({k: v for k, v in json.loads(blob).items() if k != field}).encode()

    return damage


@pytest.mark.parametrize(
    ("suffix", "damage", "rule"),
    [
        ("npz", lambda blob: blob[: len(blob) // 2], "sha256: .* must be"),
        ("npz", lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "sha256: .* must be"),
        ("npz", lambda _: b"", "sha256: .* must be"),
        ("npz", lambda _: None, "must lie beside its JSON file"),
        ("json", lambda blob: blob[:100], "is not JSON"),
        ("json", lambda _: b"", "is not JSON"),
        ("json", lambda _: b"\xff", "is not JSON"),
        ("json", lambda _: b"[" * 100_000, "is not JSON"),
        ("json", lambda _: b"[]", "must be a mapping"),
        ("json", change_metadata({"schema_version": 1}), "schema_version: 1 must be 2"),
        ("json", change_metadata({"schema_version": "2"}), "schema_version: '2' must be 2"),
        ("json", change_metadata({"device": "L40S"}), "device: 'L40S' must be 'A100-SXM4-80GB'"),
        ("json", change_metadata({"engine": ["vllm"]}), "engine: .* must be 'vllm'"),
        (
            "json",
            change_metadata({"engine_version": 0.14}),
            "engine_version: 0.14 must be '0.14.0'",
        ),
        ("json", change_metadata({"npz_sha256": 7}), "npz_sha256: 7 must be 64 hexadecimal digits"),
        ("json", without("npz_sha256"), "npz_sha256: None must be 64 hexadecimal digits"),
        ("json", without("schema_version"), "schema_version: None must be 2"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    suffix: str, damage: Callable[[bytes], bytes | None], rule: str, copied: Path
) -> None:
    """The message names the file, the field and the rule; the other tables still load."""
    name = f"vllm-0.14.0.{suffix}"
    left = damage((copied / name).read_bytes())
    (copied / name).unlink()
    if left is not None:
        (copied / name).write_bytes(left)
    with pytest.raises(InputError, match=rule) as caught:
        load()
    assert f"profiles/kernels/A100-SXM4-80GB/{name}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert load(OTHER).gemm


Arrays = dict[str, "NDArray[Any]"]


def stored(folder: Path) -> Arrays:
    """The arrays of the copied file, writable."""
    with np.load(folder / "vllm-0.14.0.npz") as npz:
        return {name: npz[name].copy() for name in npz.files}


def forge(folder: Path, blob: bytes) -> None:
    """Replace the copied arrays and fix up the checksum beside them."""
    (folder / "vllm-0.14.0.npz").write_bytes(blob)
    beside = folder / "vllm-0.14.0.json"
    data = json.loads(beside.read_text("utf-8"))
    data["npz_sha256"] = hashlib.sha256(blob).hexdigest()
    beside.write_text(json.dumps(data), encoding="utf-8")


def archive(arrays: Arrays) -> bytes:
    """An ``.npz`` of arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def relaid(change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    """Damage: the layout changed."""

    def damage(arrays: Arrays) -> Arrays:
        layout = change(json.loads(arrays[LAYOUT].tobytes()))
        return arrays | {LAYOUT: np.frombuffer(json.dumps(layout).encode(), np.uint8)}

    return damage


def numbered(index: int, value: int) -> Callable[[Arrays], Arrays]:
    """Damage: one of the numbers changed; the first are GEMM's m axis."""

    def damage(arrays: Arrays) -> Arrays:
        arrays[NUMBERS][index] = value
        return arrays

    return damage


def first_gemm(**change: Any) -> Callable[[Arrays], Arrays]:
    """Damage: entries of the first grid replaced."""

    def damage(layout: Any) -> Any:
        layout["gemm"][0] |= change
        return layout

    return relaid(damage)


def unmeasured(arrays: Arrays) -> Arrays:
    """Damage: all cells marked missing."""
    empty = np.zeros(0, np.uint8)
    full = np.full_like(arrays["missing"], 255)
    return arrays | {"missing": full, "low": empty, "high": empty}


def absurd(arrays: Arrays) -> Arrays:
    """Damage: the first latency below a nanosecond, which stands for zero or less."""
    arrays["high"][0], arrays["low"][0] = 255, 255
    return arrays


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "low"}, "low: must be in the file"),
        (lambda a: a | {"low": a["low"].astype(float)}, "low: 'float64 in 1 dim.*must be uint8"),
        (lambda a: a | {"high": a["high"][None]}, "high: 'uint8 in 2 dim.* must be uint8 in 1"),
        (lambda a: a | {"low": a["low"][:-1]}, "'low' has .* bytes, must have"),
        (lambda a: a | {"missing": a["missing"][:-1]}, "'missing' has .* bytes, must have"),
        (lambda a: a | {NUMBERS: a[NUMBERS][:-1]}, "needs more numbers"),
        (lambda a: a | {NUMBERS: np.append(a[NUMBERS], a[NUMBERS][-1:])}, "numbers: .* must hold"),
        (unmeasured, "grid 0 has no measured cell"),
        (absurd, "grid 0 has .* latencies that are not above 0 s and below 72 s"),
        (numbered(0, 0), r"layout.gemm\[0\].axes.m: 0 must hold numbers from 1"),
        (numbered(0, -(2**31)), r"layout.gemm\[0\].axes.m: .* must hold numbers from 1"),
        (numbered(1, 1), r"layout.gemm\[0\].axes.m: must ascend"),
        (lambda a: a | {LAYOUT: a[LAYOUT][:-1]}, "layout: is not JSON"),
        (relaid(lambda _: []), "layout: must be a mapping"),
        (relaid(lambda d: d | {"sparse": []}), "layout: must hold known families in this order"),
        (relaid(lambda d: dict(reversed(d.items()))), "layout: must hold known families"),
        (relaid(lambda d: d | {"gemm": []}), "layout.gemm: must hold at least one grid"),
        (relaid(lambda d: d | {"gemm": 5}), "layout.gemm: must be a list of grids"),
        (relaid(lambda d: d | {"gemm": d["gemm"] * 2}), "needs more numbers|must ascend|labels"),
        (relaid(lambda d: d | {"gemm": [[]]}), r"layout.gemm\[0\]: must be a mapping of axes"),
        (first_gemm(labels=["bf17"]), r"gemm\[0\].labels.precision: 'bf17' must be one of: bf16"),
        (first_gemm(labels=[["bf16"]]), r"gemm\[0\].labels.precision: .* must be one of: bf16"),
        (first_gemm(labels=[]), r"gemm\[0\].labels: must be a list of 1"),
        (first_gemm(series=1), r"gemm\[0\].series: 1 must be 0"),
        (first_gemm(axes=[1, 2]), r"gemm\[0\].axes: must be a list of 3"),
        (first_gemm(axes=[0, 2, 3]), r"gemm\[0\].axes.m: 0 must be a whole number from 1"),
        (first_gemm(axes=[True, 2, 3]), r"gemm\[0\].axes.m: True must be a whole number"),
        (first_gemm(axes=[10**30, 2, 3]), r"gemm\[0\].axes.m: needs more numbers"),
    ],
)
def test_a_forged_file_with_a_fitting_checksum_is_refused(
    damage: Callable[[Arrays], Arrays], rule: str, copied: Path
) -> None:
    """Whoever edits the arrays and the checksum is told what is wrong with the arrays."""
    forge(copied, archive(damage(stored(copied))))
    with pytest.raises(InputError, match=rule) as caught:
        load()
    assert "profiles/kernels/A100-SXM4-80GB/vllm-0.14.0.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_archive_is_refused_although_its_checksum_fits(copied: Path) -> None:
    """Text, a lone array and a pickle in place of the archive give one line each."""
    lone, pickled = io.BytesIO(), io.BytesIO()
    np.save(lone, np.zeros(3))
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for blob in (b"kernels", b"", lone.getvalue(), pickled.getvalue(), b"PK\x03\x04"):
        forge(copied, blob)
        with pytest.raises(InputError, match="must be an archive of arrays"):
            load()


@pytest.mark.parametrize("fixed_up", [False, True], ids=["checksum stands", "checksum fixed up"])
def test_random_damage_gives_an_error_or_the_same_table(fixed_up: bool, copied: Path) -> None:
    """Flipped bytes and cut files never raise anything else, and never change the table.

    With the checksum fixed up the table may differ, but it is a whole one.
    """
    random = np.random.default_rng(0)
    whole = contents(load())
    files = [copied / "vllm-0.14.0.npz", copied / "vllm-0.14.0.json"]
    originals = [file.read_bytes() for file in files]
    messages: list[str] = []
    for _ in range(FLIPS):
        which = 0 if fixed_up else int(random.integers(2))
        blob = bytearray(originals[which])
        if random.random() < 0.2:
            del blob[int(random.integers(len(blob))) :]
        else:
            blob[int(random.integers(len(blob)))] ^= int(random.integers(1, 256))
        files[which].write_bytes(blob)
        if fixed_up:
            forge(copied, bytes(blob))
        try:
            table = load()
        except InputError as error:
            messages.append(str(error))
        else:
            assert fixed_up or contents(table) == whole
            assert all((g.time_s[~np.isnan(g.time_s)] > 0).all() for _, g in timed(table))
        for file, original in zip(files, originals, strict=True):
            file.write_bytes(original)
    assert len(messages) > FLIPS / 4
    assert not any("\n" in message for message in messages)
    assert all(m.startswith("profiles/kernels/A100-SXM4-80GB/vllm-0.14.0.") for m in messages)
    assert contents(load()) == whole


def test_a_table_needs_its_members() -> None:
    """Arrays of another kind of file are refused by the first member that is missing."""
    with pytest.raises(InputError, match=r"x\.npz: layout: must be in the file"):
        build_table("x.npz", *SMALL, {})
