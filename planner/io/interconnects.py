"""Networks between machines, by name, from ``profiles/hardware/interconnects.json``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from planner.errors import InputError, nearest
from planner.io import data_file

if TYPE_CHECKING:
    from collections.abc import Mapping

INTERCONNECTS_FILE: Final = "profiles/hardware/interconnects.json"
NONE: Final = "none"
"""Name of no network at all: machines that cannot work on one replica together."""
BYTES_PER_S_PER_GBIT: Final = 1e9 / 8
S_PER_US: Final = 1e-6

_COUNTED = re.compile(r"([1-9]\d{0,3})x(.+)")


@dataclass(frozen=True)
class Interconnect:
    """One kind of network between machines.

    Parameters
    ----------
    name
        As the scenario says it.
    nics_per_device, nics_per_node
        NICs that each device has to itself, or that a machine's devices share; the other is 0.
    nic_bytes_per_s
        What collectives reach on one NIC in one direction: line rate times efficiency.
    latency_s
        From a device to one on another machine, as NCCL's small messages see it.

    """

    name: str
    nics_per_device: int
    nics_per_node: int
    nic_bytes_per_s: float
    latency_s: float

    def nics(self, devices_per_node: int) -> int:
        """NICs of a machine."""
        return self.nics_per_node or self.nics_per_device * devices_per_node


def load_interconnect(
    name: str | None, *, source: str = INTERCONNECTS_FILE, field: str = "interconnect"
) -> Interconnect | None:
    """Facts of a network by name, or ``None`` where there is none.

    Parameters
    ----------
    name
        A name of the data file; ``4xib_200g`` for that kind with 4 NICs a machine; ``none`` or
        ``None`` for no network.
    source, field
        Where the name was written, for the error message.

    Raises
    ------
    InputError
        If no such network is known.

    """
    if name is None or name == NONE:
        return None
    known = _known()
    counted = _COUNTED.fullmatch(name)
    kind = counted[2] if counted else name
    if kind not in known:
        hint = nearest(kind, known)
        best = f", did you mean {hint}?" if hint else ""
        names = ", ".join([*sorted(known), NONE])
        raise InputError(
            source=source,
            field=field,
            value=name,
            rule=f"must be one of: {names}; or a count of NICs and one, like 4xib_200g{best}",
        )
    if counted:
        return replace(known[kind], name=name, nics_per_device=0, nics_per_node=int(counted[1]))
    return known[kind]


def interconnect_names() -> tuple[str, ...]:
    """Every known network, sorted."""
    return tuple(sorted(_known()))


class _Nics(data_file.Entry):
    per: Literal["device", "node"]
    count: Annotated[int, Field(gt=0)]
    source: str


class _Fact(data_file.Entry):
    value: Annotated[float, Field(gt=0)]
    source: str


class _Network(data_file.Entry):
    name: str
    nics: _Nics
    gbit_per_s: _Fact
    latency_us: _Fact
    efficiency: _Fact


class _Networks(data_file.Entry):
    schema_version: Annotated[int, Field(ge=1, le=1)]
    interconnects: tuple[_Network, ...]


@lru_cache(maxsize=1)
def _known() -> Mapping[str, Interconnect]:
    found = data_file.read_checked("hardware", "interconnects.json", _Networks)
    return {entry.name: _interconnect(entry) for entry in found.interconnects}


def _interconnect(entry: _Network) -> Interconnect:
    per_device = entry.nics.per == "device"
    line_rate = entry.gbit_per_s.value * BYTES_PER_S_PER_GBIT
    return Interconnect(
        name=entry.name,
        nics_per_device=entry.nics.count if per_device else 0,
        nics_per_node=0 if per_device else entry.nics.count,
        nic_bytes_per_s=line_rate * entry.efficiency.value,
        latency_s=entry.latency_us.value * S_PER_US,
    )
