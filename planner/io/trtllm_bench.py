"""The limits that ``trtllm-bench`` derives where its user gives none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from simulator.kv_layout import kv_bytes_per_token
from simulator.plan import BatchingLimits
from simulator.weights import parameter_count

if TYPE_CHECKING:
    from simulator.model import ModelShape

BUILD_FRACTION: Final = 0.95
"""Share of the free memory that the C++ build counts as KV cache; the PyTorch backend counts with
its KV fraction, 0.9 by default (bench/build/tuning.py; from 2026 bench/tuning/heuristics.py)."""

_WEIGHT_BYTES: Final = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5}
"""Bytes that the heuristic takes for every weight, by the checkpoint's dtype."""

_OTHERWISE: Final = BatchingLimits(2048, 8192)
"""Its answer for other dtypes: the engine's defaults."""

_MOST_REQUESTS: Final = 4096
_MOST_TOKENS: Final = 32_768
_LEAST_BATCH, _LEAST_TOKENS = 64, 2048
_BATCH_STEPS: Final = ((256, 32), (1024, 128))
_TOKEN_STEPS: Final = ((4096, 256), (8192, 512))
_BATCH_STEP_ABOVE, _TOKEN_STEP_ABOVE = 256, 1024


def bench_limits(
    model: ModelShape,
    device_bytes: int,
    *,
    tp: int,
    pp: int = 1,
    input_tokens: float,
    output_tokens: float,
    fraction: float = BUILD_FRACTION,
    checkpoint_bytes: int | None = None,
    longest_prompt_tokens: int | None = None,
) -> BatchingLimits:
    """Batch size and token budget of TensorRT-LLM's benchmark after 0.14.

    Its heuristic (bench/build/tuning.py, ``calc_engine_setting`` and what it rounds with): all KV
    memory over the tokens of a mean request gives the requests, at most 4096; the tokens are
    those of a steady mix of prompts and outputs; both are rounded up.

    Parameters
    ----------
    model
        The model, with the dtypes of its weights and KV cache.
    device_bytes
        Memory of one device.
    tp, pp
        Tensor- and pipeline-parallel widths.
    input_tokens, output_tokens
        Mean lengths of the data set.
    fraction
        Share of the memory that the weights leave that counts as KV cache.
    checkpoint_bytes
        Size of the checkpoint, which replaces parameters times bytes in releases of 2026.
    longest_prompt_tokens
        Longest prompt, for the PyTorch backend with chunked context off, which widens the budget
        to hold it beside a full batch; ``None`` for the others.

    Raises
    ------
    ValueError
        If the weights leave no memory.

    """
    devices = tp * pp
    if model.weight_dtype not in _WEIGHT_BYTES:
        return _OTHERWISE
    weights = checkpoint_bytes or parameter_count(model) * _WEIGHT_BYTES[model.weight_dtype]
    free_bytes = device_bytes * devices - weights
    if free_bytes <= 0:
        raise ValueError(f"the weights do not fit on {devices} devices")
    # KV heads are replicated beyond their number: the whole pipeline holds tp times one rank's.
    token_bytes = kv_bytes_per_token(model, tp) * tp
    requests = int(free_bytes * fraction / (token_bytes * (input_tokens + output_tokens)))
    raw_batch = min(requests, _MOST_REQUESTS) / pp
    raw_tokens = min(raw_batch * (1 + input_tokens / output_tokens), _MOST_TOKENS)
    batch = max(_LEAST_BATCH, _rounded(raw_batch, _BATCH_STEPS, _BATCH_STEP_ABOVE))
    tokens = max(_LEAST_TOKENS, _rounded(raw_tokens, _TOKEN_STEPS, _TOKEN_STEP_ABOVE))
    if longest_prompt_tokens is not None:
        tokens = max(tokens, longest_prompt_tokens + batch)
    return BatchingLimits(batch, tokens)


def _rounded(value: float, steps: tuple[tuple[int, int], ...], above: int) -> int:
    """``value`` rounded up to a multiple that grows with it: (bound, step) below each bound."""
    step = next((step for bound, step in steps if value < bound), above)
    return int(-(-value // step) * step)
