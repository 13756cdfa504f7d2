"""Time of routed experts from measured layouts of a mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from simulator.interpolate import Provenance, labels, point_labels, positive, roofline_s
from simulator.kernel_work import BF16_BYTES, FLOPS_PER_MAC
from simulator.moe_routing import most_loaded_rank
from simulator.precision import PRECISIONS
from simulator.scattered import Curve, Scatter, curve, fit_rates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import KernelTable, MoeGrid


STAND_INS: Final[dict[str, tuple[str, ...]]] = {
    "bf16": ("fp8", "fp8_block"),
    "fp8": ("bf16", "fp8_block"),
    "fp8_block": ("bf16", "fp8"),
    "mxfp8": ("bf16", "fp8_block", "fp8"),
    "int8": ("bf16", "fp8", "fp8_block"),
    "int8_wo": ("bf16", "int4", "int8"),
    "int4": ("bf16", "int4_g32", "mxfp4"),
    "int4_g32": ("int4", "bf16", "mxfp4"),
    "int4_fp8": ("int4", "bf16", "fp8"),
    "mxfp4": ("bf16", "int4", "int4_g32"),
    "mxfp4_mxfp8": ("nvfp4", "fp8", "bf16", "fp8_block"),
    "nvfp4": ("fp8", "mxfp4_mxfp8", "bf16", "fp8_block"),
}
"""Precisions whose fitted rates are applied to the bytes and FLOPs of one that a table lacks, best
first. The order is that of the median error over the tables that have both: fp8 from bf16 6 to 12 %
(vLLM 0.19's on H200, which 0.24's table lacks, from 0.24's bf16 7 %), from fp8_block 5 to 97 %;
fp8_block from bf16 6 to 48 %, from fp8 3 to 50 %; int4 from bf16 10 to 66 %, from mxfp4 9 to 254 %;
nvfp4 from fp8 9 to 27 %, from mxfp4_mxfp8 16 to 24 %; mxfp4_mxfp8 from nvfp4 11 to 19 %."""

FEATURE_SCALE: Final = np.array([0.5, 1.0, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0, 0.25])
"""Weights of `_features` in the distance between two layouts. Rounded optimum of a coordinate
descent over twelve tables (three engines, four devices); the optimum is flat: equal weights cost
0.3 points of median error on unseen models and 1 point on unseen layouts."""
NEAR: Final = 0.7
"""Largest distance at which a layout counts as interpolated: a factor 2 in hidden size, or 4 in
expert width or local experts. Unseen models in bf16 on H100 (vLLM) have 2.6 to 3.4 % median error
within it and 5.4 to 7.9 % beyond; in nvfp4 on B200 6 to 8 % and 17 to 51 %."""
ENOUGH_SHAPES: Final = 3
"""Shapes of a layer from which a precision's own grid is its best source everywhere. Unseen models
from 1, 2 and 3 int4 shapes (A100, SGLang): 18, 10 and 8 % median error and 100 to 165, 20 to 170
and 20 to 150 % p90; blended with bf16, 13, 9 and 8 % and 26 to 69, 19 to 62 and 20 to 30 %."""


class Layout(NamedTuple):
    """A row of `MoeGrid.layout`: one layer's experts and how they are spread."""

    hidden_size: float
    intermediate_size: float
    top_k: float
    num_experts: float
    moe_tp: float
    moe_ep: float
    gated: float


def moe_s(
    table: KernelTable,
    device: Device,
    dtype: str,
    hidden_size: int,
    intermediate_size: int,
    top_k: int,
    num_experts: int,
    moe_tp: int,
    moe_ep: int,
    gated: bool,
    skew: float,
    tokens: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of the most loaded rank's routed experts (permutation, both products, reduction).

    The time is modelled as a sum of six terms (`_terms`): launch, weights of the experts that any
    token is routed to, activations of the rank's copies, handling of all copies, of all tokens, and
    arithmetic. Their rates are fitted per grid by non-negative least squares of relative errors
    (the weights' comes out at 0.9 to 1.3 times the datasheet's seconds for most kernels). The
    log excess of measured over modelled times, at equal tokens per expert, is averaged over near
    layouts by inverse distance; a measured layout is its own nearest. Log time is made
    non-decreasing in tokens, and the excess joined linearly in log tokens; beyond the table the
    boundary's excess is held. Times at the measured skews are joined linearly in the exponent, the
    outermost ones held.

    Left out and predicted (`bench/leave_out_moe.py`), medians by precision over nine devices' vLLM
    tables, with p90 in brackets: token counts 1.4 to 4.3 % (7 to 16), layouts 1.4 to 7.9 % (8 to
    42), models seen in no precision 3.8 to 8.4 % (17 to 41) where more than three were measured.
    Precisions with one to three models (int4, mxfp4): 9 to 32 % (25 to 79), and 67 % for int4 on
    Blackwell, whose only kernel is thrice as slow as its bytes. Rows measured twice differ by 0.2
    to 1.7 % (1 to 13). What p90 holds is engines' choice of kernel, which no width foretells:
    another kernel for some shapes, or a poor configuration of the same one.

    A width moved by 1 % moves the time by under 2 % in 99 of 100 cases (H100, B200; vLLM).

    Parameters
    ----------
    table, device
        Measured kernels, and the roofline of the same device.
    dtype
        A precision of `simulator/precision.py`. One that the table lacks takes the rates and
        excess of `STAND_INS`; without any the time is pure roofline with balanced routing.
    hidden_size, intermediate_size
        Width of the routed experts' input, and of one whole expert.
    top_k, num_experts
        Experts per token, and of the layer.
    moe_tp, moe_ep
        Shards of each expert, and ranks that the experts are spread over.
    gated
        Whether an expert has two input matrices.
    skew
        Exponent of the power law that tokens are routed by, 0 for the table's balanced routing
        (`simulator/moe_routing.py`).
    tokens
        Tokens entering the layer, of all ranks together, shape (T,), each at least 1. So the
        tables count: at ``moe_ep`` 8 and 4,096 tokens a rank with balanced routing computes
        4,096 * top_k / 8 copies (its arithmetic and its weights' traffic fall with ``moe_ep``),
        yet still handles all 4,096 tokens' routing.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``tokens``.

    Raises
    ------
    ValueError
        If a size is below 1 or ``skew`` below 0.

    """
    count = positive("tokens", tokens)
    layout = Layout(
        hidden_size, intermediate_size, top_k, num_experts, moe_tp, moe_ep, float(gated)
    )
    positive("sizes of the layer", layout[:-1])
    if skew < 0:
        raise ValueError(f"skew must be at least 0, got {skew}")
    sources = [name for name in (dtype, *STAND_INS[dtype]) if _measured(table, name)]
    if not sources:
        return _roofline(device, dtype, layout, count), labels(count.shape, Provenance.ROOFLINE)
    time_s, label, distance = _at_skew(table, device, sources[0], dtype, layout, skew, count)
    few = sources[0] == dtype and _shapes(table.moe[dtype]) < ENOUGH_SHAPES
    if few and distance > NEAR and len(sources) > 1:
        other_s, _, _ = _at_skew(table, device, sources[1], dtype, layout, skew, count)
        time_s = _between(time_s, other_s, min(distance / NEAR - 1, 1.0))
    return time_s, label


@lru_cache(maxsize=64)
def _shapes(grid: MoeGrid) -> int:
    """Distinct shapes of a layer that were measured, whatever their shards."""
    measured = grid.layout[~np.isnan(grid.time_s).all(axis=1)]
    return len(np.unique(measured[:, [0, 1, 2, 3, 6]], axis=0))


def _between(low_s: FloatArray, high_s: FloatArray, weight: float) -> FloatArray:
    """Weighted geometric mean."""
    time_s: FloatArray = low_s ** (1 - weight) * high_s**weight
    return time_s


def _at_skew(
    table: KernelTable,
    device: Device,
    source: str,
    dtype: str,
    layout: Layout,
    skew: float,
    tokens: FloatArray,
) -> tuple[FloatArray, LabelArray, float]:
    """Times and labels from the grid of precision ``source``, and the nearest layout's distance."""
    grid = table.moe[source]
    low, high, weight = _skew_bracket(grid, skew)
    below = _prediction(grid, device, source, dtype, layout, low)
    above = _prediction(grid, device, source, dtype, layout, high)
    time_s = below.curve.at(tokens)
    if weight > 0:
        time_s = _between(time_s, above.curve.at(tokens), weight)
    worst = max(below.label, above.label)
    if dtype != source or not low <= skew <= high:
        worst = Provenance.EXTRAPOLATED
    elif 0 < weight < 1:
        worst = max(worst, Provenance.INTERPOLATED)
    label = np.maximum(point_labels(below.tokens, tokens), np.int8(worst))
    return time_s, label, max(below.distance, above.distance)


def _measured(table: KernelTable, dtype: str) -> bool:
    return dtype in table.moe and bool((~np.isnan(table.moe[dtype].time_s)).any())


def _skew_bracket(grid: MoeGrid, skew: float) -> tuple[float, float, float]:
    """Measured exponents around ``skew``, and the weight of the upper one."""
    known = np.unique(grid.skew[~np.isnan(grid.time_s).all(axis=1)])
    at = float(np.clip(skew, known[0], known[-1]))
    low = float(known[known <= at][-1])
    high = float(known[known >= at][0])
    return low, high, 0.0 if high == low else (at - low) / (high - low)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """Curve of one layout at one skew, measured token counts, label, and nearest distance."""

    curve: Curve
    tokens: FloatArray
    label: Provenance
    distance: float


@lru_cache(maxsize=4096)
def _prediction(
    grid: MoeGrid, device: Device, source: str, dtype: str, layout: Layout, skew: float
) -> _Prediction:
    """Curve of ``layout`` at ``dtype`` from a grid measured at precision ``source``."""
    rates, near = _fit(grid, device, source)
    rows = np.array([layout])
    log_excess, distance = near[skew].excess(_features(rows)[0], _log_load(rows)[0])

    def modelled_s(tokens: FloatArray) -> FloatArray:
        terms = _terms(rows, skew, tokens, dtype, device)[:, 0]
        # The routing model's change of range may dip; time never falls with the tokens.
        time_s: FloatArray = np.maximum.accumulate(rates @ terms)
        return time_s

    exact = (grid.skew == skew) & (grid.layout == rows[0]).all(axis=1)
    known = ~np.isnan(grid.time_s[exact]).all(axis=0) if exact.any() else np.array([False])
    if known.any():
        label = Provenance.MEASURED
    else:
        known = np.ones(len(grid.tokens), dtype=np.bool_)
        label = Provenance.INTERPOLATED if distance <= NEAR else Provenance.EXTRAPOLATED
    return _Prediction(
        curve(near[skew].log_tokens, log_excess, modelled_s),
        grid.tokens[known].astype(np.float64),
        label,
        distance,
    )


@lru_cache(maxsize=64)
def _fit(grid: MoeGrid, device: Device, dtype: str) -> tuple[FloatArray, dict[float, Scatter]]:
    """Rates of the terms, shape (6,), and by measured skew the excess of every layout."""
    tokens = grid.tokens.astype(np.float64)
    layout = grid.layout.astype(np.float64)
    terms = np.empty((6, *grid.time_s.shape))
    skews: list[float] = np.unique(grid.skew).tolist()
    for skew in skews:
        rows = grid.skew == skew
        terms[:, rows] = _terms(layout[rows], skew, tokens, dtype, device)
    rates = fit_rates(terms, grid.time_s)
    modelled_s = np.tensordot(rates, terms, axes=1)
    near = {}
    for skew in skews:
        rows = (grid.skew == skew) & ~np.isnan(grid.time_s).all(axis=1)
        near[skew] = Scatter(
            _features(layout[rows]),
            _log_load(layout[rows]),
            np.log(tokens),
            grid.time_s[rows],
            modelled_s[rows],
        )
    return rates, near


def _features(layout: FloatArray) -> FloatArray:
    """Place of each layout, shape (S, 7), among the others, shape (S, 9).

    Widths and experts of the rank set the kernels' tiles; whether experts are spread at all picks
    another kernel in some engines; the whole expert's width tells one model's shards from others.
    """
    hidden, width, top_k, experts, tp, ep, gated = layout.T
    columns = (
        np.log(width / tp),
        np.log(hidden),
        np.log(experts / ep),
        np.log(top_k),
        np.log(top_k / experts),
        np.log(ep),
        (ep > 1).astype(np.float64),
        gated,
        np.log(width),
    )
    features: FloatArray = np.stack(columns, axis=1) * FEATURE_SCALE
    return features


def _log_load(layout: FloatArray) -> FloatArray:
    """Log of copies per expert at one token, shape (S,)."""
    log_load: FloatArray = np.log(layout[:, 2] / layout[:, 3])
    return log_load


def _terms(
    layout: FloatArray, skew: float, tokens: FloatArray, dtype: str, device: Device
) -> FloatArray:
    """Seconds of each part of the work at datasheet rates, shape (6, S, T), of (S, 7) layouts.

    Launch (a constant); weights of active experts; activations of the rank's copies (input read,
    both products' outputs, the activated one read again); rows of all copies, also of those that
    other ranks compute (engines size workspaces by them and reduce over them); input and output of
    all tokens; arithmetic.
    """
    unique, inverse = np.unique(layout[:, [2, 3, 5]], axis=0, return_inverse=True)
    routed, of, over = (column[:, None] for column in unique.T)
    active, copies = most_loaded_rank(routed, of, over, skew, tokens[None, :])
    active, copies = active[inverse.ravel()], copies[inverse.ravel()]
    hidden, whole, top_k, _, tp, _, gated = (column[:, None] for column in layout.T)
    width = whole / tp
    precision = PRECISIONS[dtype]
    weights = (2 + gated) * hidden * width
    copy_bytes = (hidden + width) * precision.activation_bytes + (
        hidden + (1 + gated) * width
    ) * BF16_BYTES
    bandwidth = device.memory_bandwidth_bytes_per_s
    return np.stack(
        [
            np.ones_like(copies),
            active * weights * precision.weight_bytes / bandwidth,
            copies * copy_bytes / bandwidth,
            tokens * top_k * (hidden + width) * BF16_BYTES / bandwidth,
            np.broadcast_to(tokens * hidden * 2 * BF16_BYTES / bandwidth, copies.shape),
            # Without tensor cores for a precision its weights are expanded and multiplied as bf16.
            FLOPS_PER_MAC * copies * weights / (device.flops(dtype) or device.bf16_flops),
        ]
    )


def _roofline(device: Device, dtype: str, layout: Layout, tokens: FloatArray) -> FloatArray:
    """Least seconds with balanced routing: active weights and the rank's copies, or arithmetic."""
    _, weights, copies, _, _, flops = _terms(np.array([layout]), 0.0, tokens, dtype, device)[:, 0]
    return roofline_s(flops, weights + copies, 1.0, 1.0)
