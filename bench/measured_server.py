"""A measured serving run: its servers, what they served, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """Requests of one server in order of arrival: (N,) seconds, tokens, tokens."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints


@dataclass(frozen=True)
class Server:
    """One server of a run; ``None`` where the files do not say.

    Parameters
    ----------
    tp, ep
        Tensor-parallel width, and devices that experts are spread over.
    max_model_len, memory_fraction, max_num_seqs, max_num_batched_tokens, block_tokens
        Settings it was started with.
    num_blocks
        KV blocks that it reported.
    prefix_caching
        Whether blocks are used again.
    custom_all_reduce
        Whether the engine's own all-reduce kernel was on.
    cuda_graphs
        Whether CUDA graphs were on.
    requests
        What it served.

    """

    tp: int
    requests: Requests
    ep: int = 1
    max_model_len: int | None = None
    memory_fraction: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_tokens: int | None = None
    num_blocks: int | None = None
    prefix_caching: bool | None = None
    custom_all_reduce: bool = True
    cuda_graphs: bool = True


@dataclass(frozen=True)
class ServingRun:
    """A measured run.

    Parameters
    ----------
    name
        What reports call it.
    engine, engine_version, model, weights, kv_cache, device
        As the files spell them.
    trace, rate
        What it served, and how fast; the bench splits runs by these.
    servers
        Servers that shared the requests.
    measured_s
        ``ttft``, ``tpot``, ``e2e`` and ``makespan`` where they were recorded, seconds.
    pooled_tpot
        Whether TPOT is the mean over tokens (all time after first tokens over all later tokens)
        or over requests.

    """

    name: str
    engine: str
    engine_version: str
    model: str
    weights: str
    kv_cache: str
    device: str
    trace: str
    rate: str
    servers: tuple[Server, ...]
    measured_s: Mapping[str, float]
    pooled_tpot: bool
