"""Time of expert parallelism's all-to-all: tokens to their experts' ranks, and results back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from simulator.collectives import nccl_s
from simulator.interpolate import Provenance, labels, point_labels, positive
from simulator.precision import PRECISIONS
from simulator.scattered import Curve, Scatter, curve, fit_rates
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from simulator.device import Device
    from simulator.fabric import Fabric
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import AllToAllSeries, KernelTable

PHASES: Final = ("dispatch", "combine")
BF16_BYTES: Final = DTYPE_BYTES["bf16"]
DEFAULT_SENT: Final = {"dispatch": "fp8", "combine": "bf16"}
"""What ``default`` stands for: DeepEP's "FP8 dispatching and BF16 combining" (``docs/legacy.md`` of
deepseek-ai/DeepEP)."""
LOW_LATENCY: Final = ("_ll", "_generation")
"""Ends of the names of backends that send one copy per expert; others send one per machine, which
passes it on to its ranks (DeepEP's normal kernels, same document)."""
NCCL_OPERATION: Final = "alltoall"
FEATURE_SCALE: Final = np.array([1.0, 1.0, 0.5, 1.0, 1.0])
"""Weights of log hidden size, log experts per token, log experts, log ranks and log nodes in the
distance between two series; the number of experts changes latency only."""


class Exchange(NamedTuple):
    """Shape of one all-to-all, as in `AllToAllSeries`."""

    ranks: float
    nodes: float
    hidden_size: float
    top_k: float
    num_experts: float


def all_to_all_s(
    table: KernelTable,
    device: Device,
    backend: str,
    phase: str,
    dtype: str,
    ranks: int,
    hidden_size: int,
    top_k: int,
    num_experts: int,
    tokens: ArrayLike,
    fabric: Fabric | None = None,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one phase of the exchange.

    The time is modelled as a sum of seven terms at rates fitted per backend, phase and dtype
    (`_terms`): launch, the network's latency, bytes of the rank's own tokens, of their copies to
    other ranks, to other experts, to ranks on other nodes and to other nodes. The log excess of
    measured over modelled times, at equal tokens, is averaged over near series; a measured shape
    is its own nearest. Log time never falls with the tokens; beyond the table the boundary's
    excess is held.

    Left out and predicted (`bench/leave_out_moe.py`), medians over seven devices with p90 in
    brackets: token counts 1.1 to 1.6 % (3 to 6) on SGLang's series, 0.9 to 2.2 % (5 to 12) on
    TensorRT-LLM's, 3.5 to 12 % (14 to 42) on vLLM's, where two devices with the same link differ
    by 5 to 20 %. Numbers of ranks that were not measured: 12 % (59) across machines of H100 and of
    H200, 5 % (22) inside GB200's NVLink domain.

    Parameters
    ----------
    table, device
        Measured series, and the link and scale-up domain of the device.
    backend
        As in the table, for example ``deepep_ht``. One that the table lacks is timed as NCCL's
        all-to-all of the same copies, without that as their bytes over the link.
    phase
        ``dispatch`` or ``combine``.
    dtype
        What is sent: a precision, or ``default``. One that was not measured takes the rates of the
        measured dtype with the nearest bytes per element.
    ranks
        Expert-parallel ranks; 1 sends nothing.
    hidden_size, top_k, num_experts
        Shape of the layer.
    tokens
        Tokens of each rank, shape (T,), each at least 1.
    fabric
        What joins the ranks; ``None`` where one scale-up domain does. A backend that was measured
        on one node only is carried across the network at the fabric's bandwidth and latency.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``tokens``. Ranks and nodes that were not measured are
        labelled extrapolated.

    Raises
    ------
    ValueError
        If a size is below 1 or ``phase`` is unknown, or if the ranks exceed the fabric.

    """
    count = positive("tokens", tokens)
    positive("sizes of the exchange", [ranks, hidden_size, top_k, num_experts])
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES}, got {phase!r}")
    if ranks == 1:
        return np.zeros(count.shape), labels(count.shape, Provenance.MEASURED)
    group = _group(table, backend, phase, dtype)
    shape = Exchange(ranks, _nodes(group, ranks, fabric), hidden_size, top_k, num_experts)
    if not group:
        return _unmeasured_s(
            table, device, backend, _sent_bytes(dtype, phase), shape, count, fabric
        )
    prediction = _prediction(group, device, dtype, shape)
    time_s = prediction.curve.at(count)
    if fabric is not None and max(series.ranks for series in group) <= fabric.local < ranks:
        time_s = time_s + _network_s(fabric, backend, _sent_bytes(dtype, phase), shape, count)
    label = np.maximum(point_labels(prediction.tokens, count), np.int8(prediction.label))
    return time_s, label


def _group(table: KernelTable, backend: str, phase: str, dtype: str) -> tuple[AllToAllSeries, ...]:
    """Measured series of the backend and phase, at the dtype nearest in bytes to that asked for."""
    found = [
        series
        for series in table.all_to_all
        if (series.backend, series.phase) == (backend, phase)
        and not bool(np.isnan(series.time_s).all())
    ]
    nearest = min(
        (series.dtype for series in found),
        key=lambda name: (
            name != dtype,
            abs(_sent_bytes(name, phase) - _sent_bytes(dtype, phase)),
            name,
        ),
        default=None,
    )
    return tuple(series for series in found if series.dtype == nearest)


def _nodes(group: tuple[AllToAllSeries, ...], ranks: int, fabric: Fabric | None) -> int:
    """Nodes that the ranks lie on; without a fabric as measured at that many ranks, else 1."""
    if fabric is not None:
        return -(-ranks // fabric.node)
    return min((series.nodes for series in group if series.ranks == ranks), default=1)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """Curve of one shape, token counts that it rests on, and its label."""

    curve: Curve
    tokens: FloatArray
    label: Provenance


@lru_cache(maxsize=1024)
def _prediction(
    group: tuple[AllToAllSeries, ...], device: Device, dtype: str, shape: Exchange
) -> _Prediction:
    rates, near = _fit(group, device)
    place = np.array([shape])
    log_excess, distance = near.excess(_features(place)[0], 0.0)
    sent_bytes = _sent_bytes(dtype, group[0].phase)

    def modelled_s(tokens: FloatArray) -> FloatArray:
        time_s: FloatArray = rates @ _terms(place, tokens, sent_bytes, device)[:, 0]
        return time_s

    tokens = np.exp(near.log_tokens)
    if any(_exchange(series)[:2] == shape[:2] for series in group):
        label = Provenance.INTERPOLATED
    else:
        label = Provenance.EXTRAPOLATED
    if dtype != group[0].dtype:
        label = Provenance.EXTRAPOLATED
    elif distance == 0:
        label = Provenance.MEASURED
        own = next(series for series in group if _exchange(series) == shape)
        tokens = own.tokens[~np.isnan(own.time_s)].astype(np.float64)
    return _Prediction(
        curve(near.log_tokens, log_excess, modelled_s),
        tokens,
        label,
    )


@lru_cache(maxsize=64)
def _fit(group: tuple[AllToAllSeries, ...], device: Device) -> tuple[FloatArray, Scatter]:
    """Rates of the terms, shape (7,), and the excess of every series over them."""
    axis = np.unique(np.concatenate([series.tokens for series in group]))
    time_s = np.full((len(group), len(axis)), np.nan)
    for row, series in enumerate(group):
        time_s[row, np.searchsorted(axis, series.tokens)] = series.time_s
    shapes = np.array([_exchange(series) for series in group])
    tokens = axis.astype(np.float64)
    terms = _terms(shapes, tokens, _sent_bytes(group[0].dtype, group[0].phase), device)
    rates = fit_rates(terms, time_s)
    modelled_s = np.tensordot(rates, terms, axes=1)
    near = Scatter(_features(shapes), np.zeros(len(group)), np.log(tokens), time_s, modelled_s)
    return rates, near


def _sent_bytes(dtype: str, phase: str) -> float:
    """Bytes of one element that is sent."""
    name = DEFAULT_SENT[phase] if dtype == "default" else dtype
    return PRECISIONS["nvfp4" if name == "fp4" else name].activation_bytes


def _exchange(series: AllToAllSeries) -> Exchange:
    return Exchange(
        series.ranks, series.nodes, series.hidden_size, series.top_k, series.num_experts
    )


def _features(shapes: FloatArray) -> FloatArray:
    """Place of each `Exchange`, shape (S, 5), among the others."""
    ranks, nodes, hidden, top_k, experts = np.log(shapes).T
    features: FloatArray = np.stack([hidden, top_k, experts, ranks, nodes], axis=1) * FEATURE_SCALE
    return features


def _distinct(groups: FloatArray, top_k: FloatArray) -> FloatArray:
    """Expected number of ``groups`` that ``top_k`` uniform choices touch."""
    return groups * (1 - (1 - 1 / groups) ** top_k)


def _terms(shapes: FloatArray, tokens: FloatArray, sent_bytes: float, device: Device) -> FloatArray:
    """Terms of the time, shape (7, S, T), of (S, 5) shapes; bytes in seconds over the link.

    High-throughput backends send one copy per rank and, between nodes, one per node; low-latency
    ones one per expert. The fit finds which.
    """
    ranks, nodes, hidden, top_k, _ = (column[:, None] for column in shapes.T)
    own = hidden * sent_bytes * tokens / device.link_bytes_per_s
    one = np.ones_like(own)
    remote = 1 - 1 / ranks
    off_node = 1 - 1 / nodes
    return np.stack(
        [
            one,
            one * (nodes > 1),
            own,
            own * _distinct(ranks, top_k) * remote,
            own * top_k * remote,
            own * _distinct(ranks, top_k) * off_node,
            own * _distinct(nodes, top_k) * off_node,
        ]
    )


def _network_s(
    fabric: Fabric, backend: str, sent_bytes: float, shape: Exchange, tokens: FloatArray
) -> FloatArray:
    """Seconds of the copies that leave a machine or NVLink domain, over the network.

    Added to the exchange inside: the kernels hardly overlap the two. From the 8 ranks of one H100
    machine, with 50 GB/s per device, SGLang's DeepEP series on 16, 32 and 64 ranks are predicted to
    10 to 19 % (low-latency) and 28 to 52 %, too fast (high-throughput); taking the longer of the
    two instead, to 13 to 23 % and 43 to 62 %.
    """
    bytes_per_s, latency_s = fabric.network(int(shape.ranks))
    machines, top_k = np.array(shape.ranks / fabric.local), np.array(shape.top_k)
    copies = top_k if backend.endswith(LOW_LATENCY) else _distinct(machines, top_k)
    moved_bytes = tokens * shape.hidden_size * sent_bytes * copies * (1 - 1 / machines)
    time_s: FloatArray = latency_s + moved_bytes / bytes_per_s
    return time_s


def _unmeasured_s(
    table: KernelTable,
    device: Device,
    backend: str,
    sent_bytes: float,
    shape: Exchange,
    tokens: FloatArray,
    fabric: Fabric | None,
) -> tuple[FloatArray, LabelArray]:
    """NCCL's all-to-all where that was measured, else the copies' bytes over the link."""
    ranks, top_k = np.array(shape.ranks), np.array(shape.top_k)
    moved_bytes = tokens * shape.hidden_size * sent_bytes * _distinct(ranks, top_k)
    fits = fabric is not None or shape.ranks <= device.scaleup_domain
    if fits and any(name == NCCL_OPERATION for name, _ in table.nccl):
        elements = np.maximum(moved_bytes / BF16_BYTES, 1.0)
        time_s, label = nccl_s(table, device, NCCL_OPERATION, int(shape.ranks), elements, fabric)
        return time_s, np.maximum(label, np.int8(Provenance.EXTRAPOLATED))
    time_s = moved_bytes * (1 - 1 / shape.ranks) / device.link_bytes_per_s
    if fabric is not None and shape.ranks > fabric.local:
        time_s = time_s + _network_s(fabric, backend, sent_bytes, shape, tokens)
    return time_s, labels(tokens.shape, Provenance.ROOFLINE)
