"""Facts of one accelerator that time, memory, cost and the scaling of kernel times depend on."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.precision import PRECISIONS


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
        Dense tensor-core peaks, FLOP/s; 0 where the device cannot multiply at that precision.
    link_bytes_per_s
        Bandwidth in one direction of the link that joins devices in a node: NVLink, else PCIe.
    scaleup_domain
        Devices that reach each other without a network: those of one node, or of one rack where
        NVLink spans it.
    elementwise_launch_s
        Time of a kernel too small to be bound by anything else, inside a CUDA graph.
    elementwise_bytes_per_s
        Memory bandwidth that elementwise kernels reach.
    price_per_hour
        USD per device and hour, or ``None`` where no price is known.
    fp4_flops
        As ``bf16_flops``, for 4-bit floats.
    nvlink_domain
        Devices joined by NVLink; 1 where they meet over PCIe alone. Below ``scaleup_domain``
        where NVLink bridges join groups and PCIe joins the groups.
    pcie_bytes_per_s
        Bandwidth of the PCIe slot in one direction; 0: not known.
    tdp_w
        Power limit of the board, watts, or ``None`` where none is known.
    sustained_bf16_flops, sustained_fp8_flops, sustained_fp4_flops
        Rates that large dense products hold under that power limit, FLOP/s. A board may hold more
        than its datasheet peak, which is given at a lower clock. 0: not known, or no such peak.
    sm_hz
        Streaming multiprocessors times their boost clock; 0: not known.

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
    fp4_flops: float = 0.0
    nvlink_domain: int = 1
    pcie_bytes_per_s: float = 0.0
    tdp_w: float | None = None
    sustained_bf16_flops: float = 0.0
    sustained_fp8_flops: float = 0.0
    sustained_fp4_flops: float = 0.0
    sm_hz: float = 0.0

    def flops(self, dtype: str) -> float:
        """Dense peak of a product at ``dtype``, FLOP/s; 0: the device cannot run it.

        Parameters
        ----------
        dtype
            A name of `simulator/precision.py`. The peak is that of the arithmetic it runs in:
            4-bit weights multiplied as bf16 have the bf16 peak.

        """
        return {"bf16": self.bf16_flops, "fp8": self.fp8_flops, "fp4": self.fp4_flops}[
            PRECISIONS[dtype].arithmetic
        ]

    def sustained_flops(self, dtype: str) -> float:
        """Rate that large products at ``dtype`` hold, FLOP/s; the peak where that is unknown."""
        sustained = {
            "bf16": self.sustained_bf16_flops,
            "fp8": self.sustained_fp8_flops,
            "fp4": self.sustained_fp4_flops,
        }[PRECISIONS[dtype].arithmetic]
        return sustained or self.flops(dtype)
