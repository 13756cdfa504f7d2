"""The device catalogue, and the kernel table of every device in it, measured or estimated."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, ValidationError

from planner.errors import InputError, nearest
from planner.io.data_file import Entry, read_json
from planner.io.profiles import available_kernel_tables, load_kernel_table
from simulator.device import Device
from simulator.units import GIB
from simulator.variant import scaled_table

if TYPE_CHECKING:
    from simulator.table import KernelTable

DEVICES_FILE: Final = "profiles/hardware/devices.json"
GIGA: Final = 1e9
MEGA: Final = 1e6
MICRO: Final = 1e-6
TERA: Final = 1e12


class _Fact(Entry):
    """Where a value comes from; ``recalled``: from memory, not checked against its source."""

    source: Annotated[str, Field(min_length=1)]
    note: str | None = None
    recalled: bool = False


class _Name(_Fact):
    value: str


class _Count(_Fact):
    value: Annotated[int, Field(gt=0)]


class _MaybeCount(_Fact):
    value: Annotated[int, Field(gt=0)] | None


class _Number(_Fact):
    value: Annotated[float, Field(gt=0)]


class _MaybeNumber(_Fact):
    value: Annotated[float, Field(gt=0)] | None


class _Device(Entry):
    name: str
    estimated_from: _Name | None = None
    collectives_from: _Name | None = None
    expected_error_pct: _Number | None = None
    memory_gib: _Number
    memory_bandwidth_gb_per_s: _Number
    bf16_tflops: _Number
    fp8_tflops: _MaybeNumber
    fp4_tflops: _MaybeNumber
    sustained_bf16_tflops: _MaybeNumber
    sustained_fp8_tflops: _MaybeNumber
    sustained_fp4_tflops: _MaybeNumber
    sm_count: _MaybeCount
    sm_clock_mhz: _MaybeNumber
    link_gb_per_s: _Number
    scaleup_domain: _Count
    nvlink_domain: _Count
    pcie_gb_per_s: _Number
    tdp_w: _MaybeNumber
    elementwise_launch_us: _Number
    elementwise_gb_per_s: _Number
    price_per_hour: _MaybeNumber


class _Catalogue(Entry):
    schema_version: Annotated[int, Field(ge=1, le=1)]
    devices: tuple[_Device, ...]


def device_names() -> tuple[str, ...]:
    """Every catalogued device, in alphabetical order."""
    return tuple(sorted(_read()))


@lru_cache(maxsize=64)
def load_device(name: str) -> Device:
    """Facts of one catalogued device.

    A precision without tensor cores has a peak of 0. Where a sustained rate is not known, it has
    the share of its peak that the next coarser precision has, at most all of it.

    Raises
    ------
    InputError
        If the catalogue has no such name.

    """
    entry = _entry(name)
    peaks = [(fact.value or 0) * TERA for fact in (entry.bf16_tflops, entry.fp8_tflops)]
    peaks.append((entry.fp4_tflops.value or 0) * TERA)
    sustained = _sustained(entry, peaks)
    return Device(
        name=name,
        memory_bytes=int(entry.memory_gib.value * GIB),
        memory_bandwidth_bytes_per_s=entry.memory_bandwidth_gb_per_s.value * GIGA,
        bf16_flops=peaks[0],
        fp8_flops=peaks[1],
        fp4_flops=peaks[2],
        link_bytes_per_s=entry.link_gb_per_s.value * GIGA,
        scaleup_domain=entry.scaleup_domain.value,
        elementwise_launch_s=entry.elementwise_launch_us.value * MICRO,
        elementwise_bytes_per_s=entry.elementwise_gb_per_s.value * GIGA,
        price_per_hour=entry.price_per_hour.value,
        nvlink_domain=entry.nvlink_domain.value,
        pcie_bytes_per_s=entry.pcie_gb_per_s.value * GIGA,
        tdp_w=entry.tdp_w.value,
        sustained_bf16_flops=sustained[0],
        sustained_fp8_flops=sustained[1],
        sustained_fp4_flops=sustained[2],
        sm_hz=(entry.sm_count.value or 0) * (entry.sm_clock_mhz.value or 0) * MEGA,
    )


def _sustained(entry: _Device, peaks: list[float]) -> list[float]:
    rates: list[float] = []
    share = 1.0
    facts = (entry.sustained_bf16_tflops, entry.sustained_fp8_tflops, entry.sustained_fp4_tflops)
    for fact, peak in zip(facts, peaks, strict=True):
        rates.append(fact.value * TERA if fact.value else peak * share)
        if peak:
            share = min(1.0, rates[-1] / peak)
    return rates


def measured_device(name: str) -> str:
    """The device whose measured kernels stand for ``name``: itself unless it is an estimate.

    Raises
    ------
    InputError
        If the catalogue has no such name.

    """
    estimated_from = _entry(name).estimated_from
    return name if estimated_from is None else estimated_from.value


def device_warnings(name: str) -> tuple[str, ...]:
    """What a report must say of a device: estimated kernel times, and facts never checked.

    Raises
    ------
    InputError
        If the catalogue has no such name.

    """
    entry = _entry(name)
    warnings: list[str] = []
    if entry.estimated_from is not None:
        error = entry.expected_error_pct
        expected = f" (expect about {error.value:.0f} % error)" if error else ""
        warnings.append(
            f"kernel times of {name} are estimated from {entry.estimated_from.value} by roofline "
            f"ratios{expected}"
        )
    recalled = [field for field, fact in entry if isinstance(fact, _Fact) and fact.recalled]
    if recalled:
        warnings.append(f"facts of {name} not checked against their source: {', '.join(recalled)}")
    return tuple(warnings)


@lru_cache(maxsize=16)
def kernel_table_for(name: str, engine: str, version: str) -> KernelTable:
    """The kernel table of a device: as shipped, or scaled from its measured relative's.

    Collectives over PCIe come from the box that the catalogue names, at this version of the
    engine or else at the newest one shipped for that box.

    Parameters
    ----------
    name
        A catalogued device.
    engine, version
        Engine version of the relative's table (`measured_device`).

    Raises
    ------
    InputError
        If the catalogue has no such name, or no table of this engine and version ships for the
        measured device.

    """
    entry = _entry(name)
    source = measured_device(name)
    _check_shipped(name, source, engine, version)
    table = load_kernel_table(source, engine, version)
    if entry.estimated_from is None:
        return table
    pcie = None
    if entry.collectives_from is not None:
        box = entry.collectives_from.value
        box_version = _at_or_newest(box, engine, version)
        if box_version is not None:
            pcie = (load_kernel_table(box, engine, box_version), load_device(box))
    return scaled_table(table, load_device(source), load_device(name), pcie)


def _check_shipped(name: str, source: str, engine: str, version: str) -> None:
    shipped = [key for key in available_kernel_tables() if key[0] == source]
    if (source, engine, version) in shipped:
        return
    of = name if name == source else f"{name}, estimated from {source},"
    have = ", ".join(f"{one} {number}" for _, one, number in shipped) or "none"
    raise InputError(
        source="profiles/kernels",
        field=f"{source}/{engine}",
        value=version,
        rule=f"is not among the kernel tables of {of} which are: {have}",
    )


def _at_or_newest(device: str, engine: str, version: str) -> str | None:
    """The version asked for where it ships for the device, else the newest, else ``None``."""
    versions = [
        number
        for one, its_engine, number in available_kernel_tables()
        if (one, its_engine) == (device, engine)
    ]
    return version if version in versions else max(versions, key=_release, default=None)


def _release(version: str) -> tuple[tuple[int, str], ...]:
    """A version's parts, numbers in numeric order: 0.9.0 before 0.14.0 before 1.0.0rc3."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in version.split("."))


def _entry(name: str) -> _Device:
    entries = _read()
    if name in entries:
        return entries[name]
    near = nearest(name, entries)
    hint = f"; did you mean {near!r}?" if near else ""
    raise InputError(
        source=DEVICES_FILE,
        field="device",
        value=name,
        rule=f"is not known{hint} (known: {', '.join(sorted(entries))})",
    )


@lru_cache(maxsize=1)
def _read() -> dict[str, _Device]:
    document = read_json("hardware", "devices.json")
    try:
        catalogue = _Catalogue.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            source=DEVICES_FILE,
            field=".".join(_path(document, first["loc"])),
            value=first["input"],
            rule=f"is wrong: {first['msg']}",
            more=error.error_count() - 1,
        ) from None
    entries = {entry.name: entry for entry in catalogue.devices}
    _check(catalogue.devices, entries)
    return entries


def _path(document: Any, location: tuple[int | str, ...]) -> list[str]:
    """Where an error is, with a device's name in place of its number in the list."""
    path = [str(part) for part in location]
    if location[:1] == ("devices",) and len(location) > 1:
        entry = document["devices"][location[1]]
        if isinstance(entry, dict) and "name" in entry:
            path[:2] = [str(entry["name"])]
    return path


def _check(listed: tuple[_Device, ...], entries: dict[str, _Device]) -> None:
    """What one entry alone cannot tell: unique names, and relatives that were measured."""
    for entry in listed:
        if entries[entry.name] is not entry:
            raise _wrong(entry.name, "name", entry.name, "is another device of this name")
        for field in ("estimated_from", "collectives_from"):
            relative = getattr(entry, field)
            measured = entries.get(relative.value) if relative is not None else None
            if relative is not None and (measured is None or measured.estimated_from is not None):
                rule = "must name a measured device of this file"
                raise _wrong(entry.name, field, relative.value, rule)
        if entry.estimated_from is not None and not (
            entry.sm_count.value and entry.sm_clock_mhz.value and entry.expected_error_pct
        ):
            rule = "must be known, with sm_clock_mhz and expected_error_pct, to estimate from"
            raise _wrong(entry.name, "sm_count", entry.sm_count.value, rule)


def _wrong(device: str, field: str, value: object, rule: str) -> InputError:
    return InputError(source=DEVICES_FILE, field=f"{device}.{field}", value=value, rule=rule)
