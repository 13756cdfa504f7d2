"""How weights and activations of one precision are stored and multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Precision:
    """Storage and arithmetic of one named precision.

    Parameters
    ----------
    weight_bytes
        Bytes of one stored weight, its share of the block's scale included.
    activation_bytes
        Bytes of one activation that enters the product.
    arithmetic
        Tensor-core peak that the product runs at: ``bf16``, ``fp8`` or ``fp4``.

    """

    weight_bytes: float
    activation_bytes: float
    arithmetic: str


_FP32_SCALE: Final = 4
_E8M0_SCALE: Final = 1
_E4M3_SCALE: Final = 1
_BF16_SCALE: Final = 2
_HALF: Final = 0.5

FP8_BLOCK: Final = 128
"""Rows and columns of fp8 weights under one scale (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""

PRECISIONS: Final[dict[str, Precision]] = {
    "bf16": Precision(2, 2, "bf16"),
    # One scale per tensor or channel: nothing beside the weights.
    "fp8": Precision(1, 1, "fp8"),
    "fp8_block": Precision(1 + _FP32_SCALE / FP8_BLOCK**2, 1, "fp8"),
    # OCP Microscaling MXFP8: an E8M0 scale per 32 weights.
    "mxfp8": Precision(1 + _E8M0_SCALE / 32, 1, "fp8"),
    "int8": Precision(1, 1, "fp8"),
    # Weight-only, one scale per channel: nothing beside the weights.
    "int8_wo": Precision(1, 2, "bf16"),
    # Weight-only group quantisation (AWQ, GPTQ): a 16-bit scale per group, commonly 128 or 32.
    "int4": Precision(_HALF + _BF16_SCALE / 128, 2, "bf16"),
    "int4_g32": Precision(_HALF + _BF16_SCALE / 32, 2, "bf16"),
    # Weights as int4, activations as fp8 (TensorRT-LLM's W4A8 of AWQ).
    "int4_fp8": Precision(_HALF + _BF16_SCALE / 128, 1, "fp8"),
    # OCP Microscaling MXFP4: an E8M0 scale per 32 weights; activations 16 or 8 bits wide.
    "mxfp4": Precision(_HALF + _E8M0_SCALE / 32, 2, "bf16"),
    "mxfp4_mxfp8": Precision(_HALF + _E8M0_SCALE / 32, 1, "fp8"),
    # NVFP4: an E4M3 scale per 16 weights.
    "nvfp4": Precision(_HALF + _E4M3_SCALE / 16, _HALF + _E4M3_SCALE / 16, "fp4"),
}
"""Every precision by its name in scenarios, kernel tables and model shapes."""
