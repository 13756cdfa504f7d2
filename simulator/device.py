"""Facts of one accelerator that time, memory and cost depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator type.

    Parameters
    ----------
    name
        Name as in the device catalogue, for example ``H100-SXM-80GB``.
    memory_bytes
        Memory that the driver reports to the engine, bytes.
    memory_bandwidth_bytes_per_s
        Datasheet memory bandwidth.
    bf16_flops, fp8_flops
        Dense tensor-core peaks, FLOP/s.
    link_bytes_per_s
        Scale-up link bandwidth in one direction.
    scaleup_domain
        Devices joined by that link.
    elementwise_launch_s
        Time of a kernel too small to be bound by anything else, inside a CUDA graph.
    elementwise_bytes_per_s
        Memory bandwidth that elementwise kernels reach.
    price_per_hour
        USD per device and hour, or ``None`` where no price is known.

    """

    name: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    link_bytes_per_s: float
    scaleup_domain: int
    elementwise_launch_s: float
    elementwise_bytes_per_s: float
    price_per_hour: float | None

    def flops(self, dtype: str) -> float:
        """Dense peak for operands of ``dtype``, FLOP/s."""
        return self.fp8_flops if dtype == "fp8" else self.bf16_flops
