"""Collectives of one layer: what joins attention's groups and the experts' ranks.

With one attention group (``dp`` 1) every rank holds all tokens: mixer and feed-forward network
each end in an all-reduce over the stage, whether experts are cut (``moe_tp``) or dealt out
(``ep``), because every rank computes its part of every token (vLLM
``layers/fused_moe/layer.py``, ``maybe_all_reduce_tensor_model_parallel``; SGLang without an
all-to-all backend; TensorRT-LLM).

With several groups each holds its own tokens. Mixers and dense networks reduce inside a group;
before routed experts the groups gather one another's tokens and afterwards scatter the sums back
(vLLM's default ``allgather_reducescatter``,
``distributed/device_communicators/all2all.py``), then reduce inside the group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.collectives import all_reduce_s, nccl_s
from simulator.model import Experts
from simulator.parts import Axis, Part
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from simulator.device import Device
    from simulator.fabric import Fabric
    from simulator.model import Layer, ModelShape
    from simulator.parts import Sizes
    from simulator.plan import Shape
    from simulator.table import KernelTable


def all_reduces(layer: Layer, shape: Shape) -> int:
    """All-reduces of one layer over ``shape.tp`` ranks: after its mixer and its feed-forward part.

    Megatron-LM (arXiv 1909.08053); shared and routed experts are summed before theirs.
    """
    return ((layer.mixer is not None) + (layer.ffn is not None)) if shape.tp > 1 else 0


def collective_parts(
    model: ModelShape,
    device: Device,
    table: KernelTable,
    layer: Layer,
    shape: Shape,
    sizes: Sizes,
    fabric: Fabric | None,
    nccl_from_bytes: Mapping[int, int],
) -> Iterator[Part]:
    """Collectives of one layer: inside an attention group by its tokens, between them by all.

    Parameters
    ----------
    model, device, table, layer, shape, sizes
        As for `simulator.parts.layer_parts`.
    fabric
        What joins the devices; ``None`` for one scale-up domain.
    nccl_from_bytes
        By ``tp``, the message size from which NCCL reduces instead of the engine's own kernel.

    """
    count = all_reduces(layer, shape)
    if count:
        yield _all_reduce(model, device, table, shape.tp, sizes, fabric, nccl_from_bytes).times(
            count
        )
    if shape.dp > 1 and isinstance(layer.ffn, Experts):
        # Strided over the stage: groups of a stage that leaves a machine meet across the network.
        leaves = fabric is not None and shape.width > fabric.local
        ranks = shape.width if leaves else shape.dp
        elements = np.maximum(sizes.in_groups(shape.dp), 1) * model.hidden_size
        for name, operation in (
            ("all-gather tokens", "all_gather"),
            ("reduce-scatter tokens", "reduce_scatter"),
        ):
            time_s, label = nccl_s(table, device, operation, ranks, elements, fabric)
            yield Part(name, Axis.GROUPS_TOKENS, time_s, label)


def _all_reduce(
    model: ModelShape,
    device: Device,
    table: KernelTable,
    tp: int,
    sizes: Sizes,
    fabric: Fabric | None,
    nccl_from_bytes: Mapping[int, int],
) -> Part:
    """One all-reduce of the hidden states inside a CUDA graph, by tokens."""
    elements = np.maximum(sizes.tokens, 1) * model.hidden_size
    time_s, label = all_reduce_s(table, device, "graph", tp, elements, fabric)
    if tp in nccl_from_bytes:
        by_nccl = elements * DTYPE_BYTES["bf16"] >= nccl_from_bytes[tp]
        nccl, nccl_label = nccl_s(table, device, "all_reduce", tp, elements, fabric)
        time_s = np.where(by_nccl, nccl, time_s)
        label = np.where(by_nccl, nccl_label, label)
    return Part("all-reduce", Axis.TOKENS, time_s, label)
