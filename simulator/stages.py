"""Which layers each pipeline stage of a replica holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simulator.model import ModelShape
    from simulator.plan import Shape

SpareLayers = Literal["before_last", "last", "first"]
"""Where an engine puts the layers that are left over when they do not divide by the stages:

``before_last``
    One each to the stages before the last one, from the back: vLLM (distributed/utils.py,
    ``get_pp_indices``, since 0.7) and SGLang, which took it over.
``last``
    All to the last stage (the same function of vLLM 0.6.0).
``first``
    One each to the first stages (TensorRT-LLM, tensorrt_llm/mapping.py, ``pp_layers``).
"""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage.

    Parameters
    ----------
    model
        The model with this stage's layers only.
    is_first, is_last
        Whether it holds the embedding, and the last norm and the head.

    """

    model: ModelShape
    is_first: bool
    is_last: bool


def layers_of_stages(
    num_layers: int, shape: Shape, spare: SpareLayers = "before_last"
) -> tuple[int, ...]:
    """Layers of each stage: those that the shape names, or as the engine deals them out.

    Raises
    ------
    ValueError
        If the named layers are not the model's, or a stage would hold none.

    """
    if shape.layers:
        if sum(shape.layers) != num_layers:
            named = "-".join(map(str, shape.layers))
            raise ValueError(
                f"layers={named} are {sum(shape.layers)}; the model has {num_layers} layers"
            )
        return shape.layers
    if shape.pp > num_layers:
        raise ValueError(f"pp is {shape.pp}; the model has {num_layers} layers")
    each, over = divmod(num_layers, shape.pp)
    counts = [each] * shape.pp
    if spare == "last":
        counts[-1] += over
    else:
        first = 0 if spare == "first" else shape.pp - 1 - over
        for stage in range(first, first + over):
            counts[stage] += 1
    return tuple(counts)


def stages_of_replica(
    model: ModelShape, shape: Shape, spare: SpareLayers = "before_last"
) -> tuple[Stage, ...]:
    """The stages of a replica, first to last.

    Raises
    ------
    ValueError
        As :func:`layers_of_stages`.

    """
    counts = layers_of_stages(model.num_layers, shape, spare)
    ends = list(accumulate(counts))
    last = len(counts) - 1
    return tuple(
        Stage(replace(model, layers=model.layers[end - count : end]), i == 0, i == last)
        for i, (end, count) in enumerate(zip(ends, counts, strict=True))
    )
