"""Time of collectives: measured widths from the table, others by algorithm.

Three ways to a time, by where the group of devices lies:

- **A measured width** (2, 4 and 8; on rack-wide NVLink 2 and 4): the table, interpolated in size.
- **Another width inside one machine or NVLink domain**: alpha-beta (Thakur, Rabenseifner and
  Gropp, 2005) anchored on the table, so that model and table meet where both exist.
- **Several machines**: the machine's own stage and the network's stage, pipelined against each
  other (hierarchical all-reduce: reduce-scatter inside, all-reduce of the shards between,
  all-gather inside; NCCL's NVLSTree and Horovod's ``HOROVOD_HIERARCHICAL_ALLREDUCE``).

Checked against public runs on 2 to 4 machines and on a full NVL72 rack: of 46 figures that were
not fitted 40 are within 25 %, the median is off by 8 % (tests/unit/test_collectives.py has them).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simulator.interpolate import Provenance, bracket, isotonic, labels, point_labels, positive
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from simulator.device import Device
    from simulator.fabric import Fabric
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import KernelTable, MessageSeries

    Widths = Mapping[int, MessageSeries]

ALL_REDUCE = "all_reduce"


def all_reduce_s(
    table: KernelTable,
    device: Device,
    backend: str,
    gpus: int,
    elements: ArrayLike,
    fabric: Fabric | None = None,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of the engine's own all-reduce of 2-byte elements.

    Latency is flat for small messages and proportional for large ones over seven decades, so log
    time is made non-decreasing and joined linearly in log size (leaving out one size: 4.7 % mean
    error, NCCL 6.1 %). Below the table the smallest message's time is held (latency), beyond it
    the largest one's bandwidth.

    Engines have a kernel of their own for a few widths inside one machine only (vLLM:
    2, 4, 6 and 8, ``distributed/device_communicators/custom_all_reduce.py``) and hand wider groups
    to NCCL. So does this function, at no less than the widest measured time.

    Parameters
    ----------
    table, device
        Measured kernels and their device; without a fabric its scale-up domain bounds ``gpus``.
    backend
        ``graph`` inside a CUDA graph, ``eager`` outside one.
    gpus
        Participants; 1 costs nothing.
    elements
        Message sizes, elements (not bytes), shape (T,), each at least 1.
    fabric
        What joins the pool's devices; ``None`` for one scale-up domain.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``elements``. Widths that were not measured are labelled
        extrapolated.

    Raises
    ------
    ValueError
        If ``backend`` was not measured, or ``gpus`` leaves the scale-up domain or the fabric.

    """
    size, local = _checked(device, gpus, elements, fabric)
    own = _widths(table.all_reduce, backend, local)
    if gpus <= min(max(own), local):
        return _local_s(own, ALL_REDUCE, gpus, size, local)
    nccl, label = nccl_s(table, device, ALL_REDUCE, gpus, size, fabric)
    return np.maximum(nccl, _measured_s(own[max(own)], size)), label


def nccl_s(
    table: KernelTable,
    device: Device,
    op: str,
    gpus: int,
    elements: ArrayLike,
    fabric: Fabric | None = None,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one NCCL operation; everything else as for `all_reduce_s`.

    Parameters
    ----------
    table, device, gpus, fabric
        As for `all_reduce_s`.
    op
        ``all_gather``, ``all_reduce``, ``alltoall`` or ``reduce_scatter``.
    elements
        As for `all_reduce_s`: 2-byte elements of the whole message as nccl-tests counts it, which
        is what a rank holds after a gather or before a scatter or exchange.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``elements``.

    Raises
    ------
    ValueError
        If ``op`` was not measured, or ``gpus`` leaves the scale-up domain or the fabric.

    """
    size, local = _checked(device, gpus, elements, fabric)
    widths = _widths(table.nccl, op, local)
    if fabric is None or gpus <= local:
        node = max(widths) if fabric is None else fabric.node
        return _local_s(widths, op, gpus, size, node)
    return _across_s(widths, op, gpus, size, fabric), labels(size.shape, Provenance.EXTRAPOLATED)


def send_s(
    table: KernelTable, elements: ArrayLike, fabric: Fabric | None = None, *, network: bool = False
) -> tuple[FloatArray, LabelArray]:
    """Seconds to send 2-byte elements from one device to another, as between pipeline stages.

    No send was measured. Inside a machine it is taken as NCCL's all-gather on 2 devices of twice
    the message, where each device sends the message to the other: at 256 MiB on A100 1.79 ms, and
    a public sendrecv_perf run on 8 A100 has 1.42 ms (li-plus/playground, cuda/nccl.md), so large
    sends are up to 26 % too slow. Across machines the launch is followed by the network's latency
    and the message at the device's share of the network: all ranks of a stage send at once.

    Parameters
    ----------
    table
        Measured kernels.
    elements
        Message sizes, elements (not bytes), shape (T,), each at least 1.
    fabric
        What joins the pool's devices; needed for ``network``.
    network
        Whether the stages lie on machines that only the network joins.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``elements``; always extrapolated.

    Raises
    ------
    ValueError
        If no all-gather on 2 devices was measured, or ``network`` is asked of a fabric without.

    """
    size = positive("elements", elements)
    pair = table.nccl.get(("all_gather", 2))
    if pair is None:
        raise ValueError("no times of an all_gather on 2 devices to derive sends from")
    time_s = _measured_s(pair, 2 * size)
    if network:
        if fabric is None or fabric.devices == fabric.local:
            raise ValueError("a send across machines needs a fabric with a network")
        bytes_per_s, latency_s = fabric.network(fabric.devices)
        wire_s = latency_s + size * DTYPE_BYTES["bf16"] / bytes_per_s
        time_s = np.maximum(time_s, _latency_s(pair) + wire_s)
    return time_s, labels(size.shape, Provenance.EXTRAPOLATED)


def _checked(
    device: Device, gpus: int, elements: ArrayLike, fabric: Fabric | None
) -> tuple[FloatArray, int]:
    """Sizes as an array, and the devices that one machine or domain holds."""
    size = positive("elements", elements)
    reach = device.scaleup_domain if fabric is None else fabric.devices
    if gpus > reach:
        what = "scale-up domain" if fabric is None else "fabric"
        raise ValueError(f"a collective on {gpus} GPUs leaves the {what} of {reach}")
    return size, reach if fabric is None else fabric.local


def _widths(family: Mapping[tuple[str, int], MessageSeries], kind: str, local: int) -> Widths:
    """Measured widths of one kind that fit into ``local`` devices; at least the narrowest."""
    found = {gpus: series for (name, gpus), series in family.items() if name == kind}
    if not found:
        kinds = sorted({name for name, _ in family})
        raise ValueError(f"no times of collective {kind!r}: the table has {kinds}")
    return {gpus: found[gpus] for gpus in sorted(found) if gpus <= max(local, min(found))}


def _local_s(
    widths: Widths, op: str, gpus: int, size: FloatArray, node: int
) -> tuple[FloatArray, LabelArray]:
    """Time inside one machine or NVLink domain, shape (T,), and its labels."""
    if gpus == 1:
        return np.zeros(size.shape), labels(size.shape, Provenance.MEASURED)
    if gpus in widths:
        return _measured_s(widths[gpus], size), point_labels(_fit(widths[gpus])[0], size)
    extrapolated = labels(size.shape, Provenance.EXTRAPOLATED)
    if gpus > max(widths):
        return _wider_s(widths, op, gpus, size, node), extrapolated
    low = max(width for width in widths if width < gpus)
    high = min(width for width in widths if width > gpus)
    # Linear in log-log, with a weight that does not depend on the size, so that the result stays
    # between its neighbours and rises with the size. Leaving out width 4: 3 to 8 % median error on
    # NVLink. A weight from the alpha-beta model gains 1 point there and loses 30 on L40S, where
    # the second socket's cost depends on the host.
    weight = math.log(gpus / low) / math.log(high / low)
    joined = _measured_s(widths[low], size) ** (1 - weight)
    return joined * _measured_s(widths[high], size) ** weight, extrapolated


def _wider_s(widths: Widths, op: str, gpus: int, size: FloatArray, node: int) -> FloatArray:
    """Time on more devices of one domain than were measured, shape (T,).

    ``T(n) = T(w) + hop * (rounds(n) - rounds(w)) + (volume(n) / volume(w) - 1) * (T(w) - T0(w))``
    with ``w`` the widest measured width, ``T0`` its smallest message, ``hop`` the measured growth
    of that latency. Leaving out width 8: 3 to 15 % median error on NVLink; 16 devices of an NVL72
    rack from 2 and 4: 13 %.
    """
    widest = max(widths)
    series = widths[widest]
    time_s, latency_s = _measured_s(series, size), _latency_s(series)
    rounds = _rounds(op, gpus, node) - _rounds(op, widest, node)
    growth = _volume(op, gpus) / _volume(op, widest) - 1
    return time_s + _hop_s(widths, op, node) * rounds + growth * (time_s - latency_s)


def _across_s(widths: Widths, op: str, gpus: int, size: FloatArray, fabric: Fabric) -> FloatArray:
    """Time on several machines or domains, shape (T,).

    ``T = L + 2 * sqrt(L * wire) + max(stage, wire)``: the network alone, cut into the best number
    of chunks, takes ``(sqrt(L) + sqrt(wire))**2`` (pipelining over latency ``L``: van de Geijn,
    1994; Thakur et al., 2005); the stage inside a full machine overlaps with the wire time.

    - ``wire``: volume over the machine's share of the network. All-reduce: each machine's sum
      crosses once each way between two (a tree of two), and as in a ring of all devices,
      ``2 (n - 1) / n``, between more. NCCL's own model says so (``nNodes <= 2 ? bw : bw / 2``,
      src/graph/tuning.cc) and so do runs on 4 machines, where pure hierarchical volumes,
      ``2 (N - 1) / N``, would be 23 % too fast. Others: ``(n - 1) / n`` of the message through
      each machine's network; alltoall ``(n - m) / n`` of each rank's message, ``m`` a machine's
      devices, through that rank's share.
    - ``L``: all-reduce climbs and descends a tree, ``2 log2(N)`` crossings; the others pass every
      machine's devices in turn (ring), ``N - 1`` crossings and machines.
    """
    local = fabric.local
    groups = math.ceil(gpus / local)
    bytes_per_s, crossing_s = fabric.network(gpus)
    if op == ALL_REDUCE:
        volume = 1.0 if groups == 2 else _volume(op, gpus)
        latency_s = 2 * math.log2(groups) * crossing_s
    else:
        volume = local * (gpus - local) / gpus if op == "alltoall" else _volume(op, gpus)
        latency_s = (groups - 1) * (crossing_s + (local - 1) * _hop_s(widths, op, fabric.node))
    wire_s = volume * size * DTYPE_BYTES["bf16"] / (local * bytes_per_s)
    # A lone device has no stage inside the machine, but the launch stays.
    stage_s = _local_s(widths, op, local, size, fabric.node)[0]
    stage_s = np.maximum(stage_s, _latency_s(widths[min(widths)]))
    return latency_s + 2 * np.sqrt(latency_s * wire_s) + np.maximum(stage_s, wire_s)


def _volume(op: str, gpus: int) -> float:
    """Bytes that each device sends over bytes of the message, at the least.

    Patarasuk and Yuan, 2009: ``2 (n - 1) / n`` for an all-reduce; half of that for its two halves
    and for an exchange. It is the factor between nccl-tests' algbw and busbw (PERFORMANCE.md).
    """
    return (2 if op == ALL_REDUCE else 1) * (gpus - 1) / gpus


def _rounds(op: str, gpus: int, node: int) -> float:
    """Latency steps inside a domain: NCCL's tuning model (src/graph/tuning.cc).

    All-reduce trees chain the devices of a machine and branch between machines; rings and
    pairwise exchanges visit every device.
    """
    if op == ALL_REDUCE and gpus > node:
        return node - 1 + math.log2(gpus / node)
    return gpus - 1


def _hop_s(widths: Widths, op: str, node: int) -> float:
    """Growth of the smallest message's time per round, from the two widest measured widths.

    0 where one width was measured alone: nothing says how its latency grows.
    """
    if len(widths) < 2:
        return 0.0
    narrow, wide = sorted(widths)[-2:]
    growth_s = _latency_s(widths[wide]) - _latency_s(widths[narrow])
    return max(0.0, growth_s) / (_rounds(op, wide, node) - _rounds(op, narrow, node))


def _latency_s(series: MessageSeries) -> float:
    """Time of the smallest measured message."""
    return float(np.exp(_fit(series)[1][0]))


def _measured_s(series: MessageSeries, size: FloatArray) -> FloatArray:
    """Time of ``size`` elements by one measured series, shape (T,)."""
    axis, log_time = _fit(series)
    low, weight = bracket(np.log(axis), np.log(size))
    time_s: FloatArray = np.exp(log_time[low] * (1 - weight) + log_time[low + 1] * weight)
    beyond: FloatArray = np.maximum(1.0, size / axis[-1])
    return time_s * beyond


@lru_cache(maxsize=256)
def _fit(series: MessageSeries) -> tuple[FloatArray, FloatArray]:
    """Measured sizes and their monotone log times, shapes (E,)."""
    known = ~np.isnan(series.time_s)
    return series.elements[known].astype(np.float64), isotonic(np.log(series.time_s[known]))
