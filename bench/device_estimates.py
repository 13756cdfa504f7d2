"""How far kernel times that are scaled from another device are from measured ones.

``python -m bench.device_estimates [--engine vllm] [--pairs MEASURED:PREDICTED ...] [--json PATH]``

Takes one measured device of each pair for the relative and predicts the other one's table from it,
as `planner.io.devices.kernel_table_for` does for a device that nobody measured, then compares the
two over every cell that both hold: the same kernel, shape, batch and precision. Prints the median
and the 90th percentile of the absolute relative error per kernel family and precision (devices for
collectives), and beside them the medians of two plainer assumptions: the relative's times as they
are, and those times the ratio of ideal times on the two devices (no launch kept, no share of the
multiprocessors). Takes 5 s for the pairs of `docs/add-a-device.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from planner.io.devices import load_device
from planner.io.profiles import available_kernel_tables, load_kernel_table
from simulator.kernel_work import (
    context_work,
    gemm_work,
    generation_work,
    latent_work,
    moe_work,
    recurrent_work,
)
from simulator.table import MoeGrid
from simulator.variant import scaled_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.kernel_work import Work
    from simulator.table import KernelTable

    FloatArray = NDArray[np.float64]

H100, H200, B200 = "H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"
A100, L40S, RTX_PRO = "A100-SXM4-80GB", "L40S", "RTX-PRO-6000-Server"
PAIRS: Final = (
    (H100, H200),
    (H200, H100),
    (L40S, RTX_PRO),
    (RTX_PRO, L40S),
    (B200, H100),
    (H200, B200),
    (H100, A100),
    (A100, L40S),
)
"""Pairs of `docs/add-a-device.md`: the measured device, and the one predicted from it."""


class Figures(NamedTuple):
    """Absolute relative errors over the common cells of one family, percent.

    The last two are medians of the plainer assumptions; ``None`` where they say nothing:
    collectives have no ideal time.
    """

    n: int
    median_abs_pct: float
    p90_abs_pct: float
    same_times_pct: float | None
    ratio_pct: float | None


Name = tuple[str, str]
"""Family and kind: the precision, the devices of a collective, or empty where all are pooled."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One grid or series of a kernel table.

    Parameters
    ----------
    name
        What it is pooled under.
    axes
        Coordinates of the cells, one array for each axis of ``time_s``.
    time_s
        Seconds; NaN where not measured.
    work
        Arithmetic and traffic of the cells; empty where nothing is known of them.

    """

    name: Name
    axes: tuple[NDArray[Any], ...]
    time_s: FloatArray
    work: tuple[Work, ...] = ()


class Relative(NamedTuple):
    """A measured device and its table."""

    device: Device
    table: KernelTable


def judge(source: Relative, real: Relative, box: Relative | None = None) -> dict[Name, Figures]:
    """Predict one device's table from another's and compare it with the measured one.

    Parameters
    ----------
    source, real
        The device predicted from, and the one predicted.
    box
        Measured device whose collectives go over PCIe, where the predicted one's do.

    Raises
    ------
    ValueError
        If a device's multiprocessor rate is not known.

    """
    pcie = (box.table, box.device) if box is not None else None
    scaled = scaled_table(source.table, source.device, real.device, pcie)
    predicted, before = dict(kernels(scaled)), dict(kernels(source.table))
    errors: dict[Name, list[FloatArray]] = defaultdict(list)
    same, ratio = defaultdict(list), defaultdict(list)
    for key, kernel in kernels(real.table):
        name = kernel.name
        if key in predicted:
            errors[name].append(common_errors(predicted[key], predicted[key].time_s, kernel))
        if key in predicted and key in before:
            plain = before[key]
            same[name].append(common_errors(plain, plain.time_s, kernel))
            if plain.work:
                by_ratio = _ideal_s(plain, real.device) / _ideal_s(plain, source.device)
                ratio[name].append(common_errors(plain, plain.time_s * by_ratio, kernel))
    out: dict[Name, Figures] = {}
    for name, parts in errors.items():
        pooled = 100 * np.concatenate(parts)
        if len(pooled):
            p90 = float(np.quantile(pooled, 0.9))
            plainer = (_median_pct(same[name]), _median_pct(ratio[name]))
            out[name] = Figures(len(pooled), float(np.median(pooled)), p90, *plainer)
    return out


def common_errors(one: Kernel, time_s: FloatArray, real: Kernel) -> FloatArray:
    """``|predicted / measured - 1|`` at the coordinates that two kernels share, shape (N,).

    Parameters
    ----------
    one, real
        Where the predicted and the measured cells lie.
    time_s
        Predicted seconds of ``one``'s cells.

    """
    shared = [
        np.intersect1d(mine, other, assume_unique=True, return_indices=True)[1:]
        for mine, other in zip(one.axes, real.axes, strict=True)
    ]
    here, there = zip(*shared, strict=True)
    error: FloatArray = np.abs(time_s[np.ix_(*here)] / real.time_s[np.ix_(*there)] - 1)
    return error[~np.isnan(error)]


def kernels(table: KernelTable) -> Iterator[tuple[tuple[Any, ...], Kernel]]:
    """Every kernel of a table, with the labels that name the same one in another table.

    Latent decode is the kernel alone and with its projections, pooled; the per-head products
    around it are a family of their own.
    """
    for dtype, grid in table.gemm.items():
        yield ("gemm", dtype), _kernel(("GEMM", dtype), grid, gemm_work(dtype, grid))
    for one in table.context:
        yield _labelled("context", one), _kernel(("prefill attention", ""), one, context_work(one))
    for one in table.generation:
        name = ("decode attention", "")
        yield _labelled("generation", one), _kernel(name, one, generation_work(one))
    for dtype, experts in table.moe.items():
        yield ("moe", dtype), _kernel(("MoE", dtype), experts, moe_work(dtype, experts))
    for latent in table.latent:
        name = ("latent prefill" if latent.phase == "context" else "latent decode", "")
        yield _labelled("latent", latent), _kernel(name, latent, latent_work(latent))
    for (side, dtype), products in table.latent_bmm.items():
        yield ("latent_bmm", side, dtype), _kernel(("latent products", ""), products)
    for layer in table.recurrent:
        yield (
            _labelled("recurrent", layer),
            _kernel(("recurrent", ""), layer, recurrent_work(layer)),
        )
    for (mode, devices), message in table.all_reduce.items():
        name = ("all-reduce", f"{mode}, {devices} devices")
        yield ("all_reduce", mode, devices), _kernel(name, message)
    for (operation, devices), message in table.nccl.items():
        yield ("nccl", operation, devices), _kernel(("NCCL", f"{devices} devices"), message)
    for sent in table.all_to_all:
        yield _labelled("all_to_all", sent), _kernel(("expert all-to-all", ""), sent)


def _kernel(name: Name, grid: Any, work: tuple[Work, ...] = ()) -> Kernel:
    """Every array of a grid but its times is an axis, in the order of the times' axes."""
    if isinstance(grid, MoeGrid):
        # Along the first axis lie layouts, the same where all their numbers and the skew are.
        rows = np.rec.fromarrays((*grid.layout.T, grid.skew))
        return Kernel(name, (rows, grid.tokens), grid.time_s, work)
    arrays = {field: value for field, value in vars(grid).items() if isinstance(value, np.ndarray)}
    time_s = arrays.pop("time_s")
    return Kernel(name, tuple(arrays.values()), time_s, work)


def _labelled(family: str, one: object) -> tuple[Any, ...]:
    """What tells one series of a family from the others: all its fields that are not arrays."""
    return family, *(value for value in vars(one).values() if not isinstance(value, np.ndarray))


def _ideal_s(kernel: Kernel, device: Device) -> FloatArray:
    first, *others = (part.ideal_s(device) for part in kernel.work)
    for other in others:
        first = first + other
    return first


def _median_pct(parts: list[FloatArray]) -> float | None:
    pooled = np.concatenate(parts) if parts else np.empty(0)
    return 100 * float(np.median(pooled)) if len(pooled) else None


def measured(name: str, engine: str) -> Relative:
    """A device and its table of the engine's newest version, or of the only one."""
    versions = [key[2] for key in available_kernel_tables() if key[:2] == (name, engine)]
    newest = max(versions, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
    return Relative(load_device(name), load_kernel_table(name, engine, newest))


def pcie_box(source: str, target: str, engine: str) -> Relative | None:
    """Where the target's collectives over PCIe come from: the source if it is such a box.

    Else the first measured one that is not the target itself; ``None`` where NVLink joins the
    target's whole node, or where there is no other box.
    """
    device = load_device(target)
    if device.nvlink_domain >= device.scaleup_domain:
        return None
    others = (one for one, its, _ in available_kernel_tables() if its == engine and one != target)
    boxes = [name for name in (source, *others) if load_device(name).nvlink_domain == 1]
    return measured(boxes[0], engine) if boxes else None


def _pairs(parser: argparse.ArgumentParser, texts: list[str], engine: str) -> list[tuple[str, str]]:
    """Pairs of the command line, each of two devices that can be scaled from and to."""
    shipped = {name for name, its, _ in available_kernel_tables() if its == engine}
    known = sorted(name for name in shipped if load_device(name).sm_hz > 0)
    pairs = []
    for text in texts:
        source, _, target = text.partition(":")
        if source not in known or target not in known:
            rule = f"must be MEASURED:PREDICTED, two of: {', '.join(known)}"
            parser.error(f"--pairs {text!r} {rule}")
        pairs.append((source, target))
    return pairs


def main() -> None:
    """Run the benchmark."""
    engines = sorted({engine for _, engine, _ in available_kernel_tables()})
    parser = argparse.ArgumentParser(prog="bench.device_estimates", description=__doc__)
    parser.add_argument("--engine", default="vllm", choices=engines)
    parser.add_argument("--pairs", nargs="+", default=[":".join(pair) for pair in PAIRS])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = _pairs(parser, args.pairs, args.engine)
    out: dict[str, Any] = {}
    print(
        f"{'family':<18} {'kind':<16} {'n':>9} {'median %':>9} {'p90 %':>7}"
        f" {'same times %':>13} {'ratio %':>8}"
    )
    for source_name, target_name in pairs:
        source, real = (measured(name, args.engine) for name in (source_name, target_name))
        box = pcie_box(source_name, target_name, args.engine)
        print(
            f"{target_name} ({args.engine} {real.table.engine_version})"
            f" from {source_name} ({source.table.engine_version})"
        )
        of_pair = out.setdefault(args.engine, {}).setdefault(
            f"{target_name} from {source_name}", {}
        )
        for (family, kind), figures in judge(source, real, box).items():
            same, ratio = (_cell(value) for value in figures[3:])
            print(
                f"{family:<18} {kind:<16} {figures.n:>9,} {figures.median_abs_pct:>9.2f}"
                f" {figures.p90_abs_pct:>7.2f} {same:>13} {ratio:>8}",
                flush=True,
            )
            of_pair.setdefault(family, {})[kind or "all"] = figures._asdict()
    if args.json:
        args.json.write_text(json.dumps(out, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
