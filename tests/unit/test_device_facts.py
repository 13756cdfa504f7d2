"""The device catalogue: every fact has its source, and mistakes in it end in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from planner.errors import InputError
from planner.io import data_file, devices
from planner.io.devices import (
    device_names,
    device_warnings,
    kernel_table_for,
    load_device,
    measured_device,
)
from simulator.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / devices.DEVICES_FILE).read_text(encoding="utf-8")
ENTRIES = {entry["name"]: entry for entry in json.loads(TEXT)["devices"]}
MEASURED = {
    "A100-SXM4-80GB",
    "B200-SXM-180GB",
    "B300-SXM",
    "GB200-NVL72",
    "GB300-NVL72",
    "H100-SXM-80GB",
    "H200-SXM-141GB",
    "L40S",
    "RTX-PRO-6000-Server",
}
NOT_CHECKED = "from memory"
BOOST = 1.25  # a board may hold more than its datasheet peak, but not by more than its clocks allow
SHARE = 0.5  # the least of its peak that a published product reaches: H100-NVL, power-limited

every_device = pytest.mark.parametrize("name", sorted(ENTRIES))


def test_names_are_the_catalogues() -> None:
    """Sorted names, measured devices among them."""
    assert device_names() == tuple(sorted(ENTRIES))
    assert {name for name in ENTRIES if measured_device(name) == name} == MEASURED


@every_device
def test_every_fact_has_a_source(name: str) -> None:
    """No value without its origin; what was not checked is marked, and nothing else is."""
    for field, fact in ENTRIES[name].items():
        if field == "name":
            continue
        assert fact["source"].strip(), field
        assert fact.get("recalled", False) == (NOT_CHECKED in fact["source"]), field
        assert not fact["source"].startswith("/"), field


@every_device
def test_facts_agree_with_each_other(name: str) -> None:
    """Peaks double from precision to precision, boards hold a sane share of them."""
    device = load_device(name)
    assert device.bf16_flops > 0
    for coarse, fine in (("bf16", "fp8"), ("fp8", "nvfp4")):
        if device.flops(fine):
            ratio = device.flops(fine) / device.flops(coarse)
            assert 1.8 < ratio < 4.1, fine
    for dtype in ("bf16", "fp8", "nvfp4"):
        peak, sustained = device.flops(dtype), device.sustained_flops(dtype)
        assert sustained == 0 if peak == 0 else SHARE < sustained / peak < BOOST, dtype
    assert 1 <= device.nvlink_domain <= device.scaleup_domain
    assert (device.link_bytes_per_s > device.pcie_bytes_per_s) == (
        device.nvlink_domain > 1 or name == "GH200-96GB"  # its NVLink reaches only its CPU
    )
    assert device.tdp_w is not None
    if device.sm_hz:  # dense bf16 operations per multiprocessor and cycle: 512 to 8192
        assert 480 < device.bf16_flops / device.sm_hz < 8200


def test_peaks_go_by_arithmetic() -> None:
    """A precision has the peak of what it is multiplied as; a missing unit gives 0."""
    b200, h100, a100 = map(load_device, ("B200-SXM-180GB", "H100-SXM-80GB", "A100-SXM4-80GB"))
    assert b200.flops("nvfp4") == 2 * b200.flops("fp8") == 4 * b200.flops("bf16")
    assert h100.flops("nvfp4") == 0
    assert h100.flops("mxfp4") == h100.flops("int4") == h100.flops("bf16")
    for dtype, precision in PRECISIONS.items():
        assert (a100.flops(dtype) > 0) == (precision.arithmetic == "bf16"), dtype


@every_device
def test_estimates_are_announced(name: str) -> None:
    """A variant's report names its relative and the error to expect; recalled facts are listed."""
    warnings = device_warnings(name)
    recalled = [f for f, fact in ENTRIES[name].items() if f != "name" and fact.get("recalled")]
    assert len(warnings) == (name not in MEASURED) + bool(recalled)
    if name not in MEASURED:
        assert f"kernel times of {name} are estimated from {measured_device(name)}" in warnings[0]
        assert f"about {ENTRIES[name]['expected_error_pct']['value']} % error" in warnings[0]
    for field in recalled:
        assert field in warnings[-1]


def test_an_unknown_device_suggests_the_nearest() -> None:
    """One line with the likely name."""
    with pytest.raises(InputError, match="did you mean 'H100-PCIe-80GB'") as caught:
        load_device("H100-PCI-80GB")
    assert "\n" not in str(caught.value)
    for ask in (measured_device, device_warnings):
        with pytest.raises(InputError, match="is not known"):
            ask("H999")


def test_a_version_without_a_table_names_what_ships() -> None:
    """For the device itself and for one estimated from it."""
    with pytest.raises(InputError, match=r"tables of A100-SXM4-80GB which are: .*vllm 0\.14\.0"):
        kernel_table_for("A100-SXM4-80GB", "vllm", "0.24.0")
    with pytest.raises(InputError, match="of A30, estimated from A100-SXM4-80GB, which are"):
        kernel_table_for("A30", "vllm", "0.24.0")


@pytest.fixture
def catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[dict[str, Any]], None]], None]]:
    """Read an edited copy of the catalogue instead of the shipped one."""

    def edit(change: Callable[[dict[str, Any]], None]) -> None:
        document = json.loads(TEXT)
        change({entry["name"]: entry for entry in document["devices"]} | {"": document})
        (tmp_path / "hardware").mkdir()
        (tmp_path / "hardware" / "devices.json").write_text(json.dumps(document), encoding="utf-8")
        monkeypatch.setattr(data_file, "files", lambda _: tmp_path)
        devices._read.cache_clear()

    yield edit
    devices._read.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["L4"]["tdp_w"].pop("source"), r"L4\.tdp_w\.source"),
        (lambda d: d["L4"]["memory_gib"].update(value=-1), r"L4\.memory_gib\.value: -1"),
        (lambda d: d["L4"].update(colour={"value": 1, "source": "x"}), "colour"),
        (lambda d: d["L4"]["estimated_from"].update(value="A30"), "must name a measured device"),
        (lambda d: d["L4"]["collectives_from"].update(value="X"), "must name a measured device"),
        (lambda d: d["L4"]["sm_count"].update(value=None), "sm_count"),
        (lambda d: d["L4"].update(name="L40S"), "another device of this name"),
        (lambda d: d[""].update(schema_version=2), "schema_version"),
        (lambda d: d[""].update(devices=None), "devices: None"),
    ],
)
def test_a_wrong_catalogue_is_one_line(
    catalogue: Callable[[Any], None], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """A fact without source, a bad value, a stray field, a relative that is none."""
    catalogue(change)
    with pytest.raises(InputError, match=message) as caught:
        device_names()
    assert str(caught.value).startswith(devices.DEVICES_FILE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "[", "[]", '{"devices": [[]], "schema_version": 1}'])
def test_a_broken_catalogue_is_one_line(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file, no JSON, or JSON of another kind."""
    (tmp_path / "hardware").mkdir()
    if text is not None:
        (tmp_path / "hardware" / "devices.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(data_file, "files", lambda _: tmp_path)
    devices._read.cache_clear()
    with pytest.raises(InputError, match=devices.DEVICES_FILE) as caught:
        device_names()
    devices._read.cache_clear()
    assert "\n" not in str(caught.value)
