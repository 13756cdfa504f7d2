"""What is known of host constants before a fit on serving runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.serving_fit import Prior, in_units

if TYPE_CHECKING:
    from bench.serving_predict import Prepared

from simulator.rules import VLLM_V0

_V0: Final = Prior(
    mean=(4.6, 0.38, 0.28, 0.0, 6.0, 1.19),
    spread=(1.0, 0.1, 0.05, 0.0, 3.0, 0.1),
    source=(
        "an earlier prototype's fit of vLLM 0.6 on H100 (host time adds 4.9 to 5.4 ms and 0.29 to "
        "0.51 ms per sequence between tp 2, 4 and 8)"
    ),
)
_TABLES: Final = Prior(
    mean=(0.3, 0.02, 0.0, 0.0, 0.0, 1.0),
    spread=(0.3, 0.02, 0.0, 0.0, 0.0, 0.0),
    source=(
        "fits of vLLM of 2025 (0.1 to 1.7 ms, 0.025 to 0.037 ms per sequence); the tables hold "
        "what a prompt costs, and the engine's clock starts behind the ingress"
    ),
)
_UNGRAPHED_LAYER_MS: Final = 0.95
"""Mixture models without CUDA graphs are bound by the host: 0.9 to 1.0 ms per layer and step."""
_UNGRAPHED_DEALT_LAYER_MS: Final = 0.2
"""Experts dealt out over devices take some seven launches more than cut ones in SGLang 0.4.4
(layers/moe/ep_moe: sort, two index kernels, reordering before and after, against one alignment and
one sum), each 0.02 to 0.04 ms, as a layer's 25 to 40 launches take 0.95 ms."""


def prior_for(run: Prepared) -> Prior:
    """Prior of a run's cluster: by the engine's scheduler, or else its profile's own constants."""
    if run.has_tables:
        return _TABLES
    if run.policy == VLLM_V0:
        return _V0
    own = in_units(run.host)
    if not run.cuda_graphs:
        own["eager_layer_ms"] = _UNGRAPHED_LAYER_MS
        own["eager_dealt_layer_ms"] = _UNGRAPHED_DEALT_LAYER_MS
    return Prior(
        mean=tuple(own.values()),
        spread=(0.5, 0.02, 0.1, 0.0 if run.cuda_graphs else 0.1, 5.0, 0.1),
        source="the engine profile's own constants",
    )
