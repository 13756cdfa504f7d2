"""Unit factors and element sizes, in one place so that no other file spells them out."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
S_PER_MS: Final = 1e-3
MS_PER_S: Final = 1e3
PS_PER_S: Final = 1e12

DTYPE_BYTES: Final[dict[str, int]] = {"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4}
"""Bytes of one element of each dtype that the simulator knows."""
