"""How far interpolated kernel times are from measured ones that were left out.

``python -m bench.kernel_interpolation [--device NAME ...] [--engine NAME ...] [--family NAME ...]
[--seed 0] [--json PATH]``

`bench.leave_out` states the protocol. Prints the median and the 90th percentile of the absolute
relative error per device, engine, family, protocol and precision, over every kernel table that
ships or the ones asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from bench import leave_out_dense, leave_out_latent, leave_out_moe
from planner.io.devices import load_device
from planner.io.profiles import available_kernel_tables, load_kernel_table

if TYPE_CHECKING:
    from bench.leave_out import Check

CHECKS: Final[tuple[tuple[str, Check], ...]] = (
    ("gemm", leave_out_dense.gemm),
    ("context attention", leave_out_dense.context_attention),
    ("generation attention", leave_out_dense.generation_attention),
    ("all-reduce", leave_out_dense.all_reduce),
    ("nccl", leave_out_dense.nccl),
    ("moe", leave_out_moe.moe),
    ("all-to-all", leave_out_moe.all_to_all),
    ("context MLA", leave_out_latent.context_mla),
    ("generation MLA", leave_out_latent.generation_mla),
    ("context DSA", leave_out_latent.context_dsa),
    ("generation DSA", leave_out_latent.generation_dsa),
    ("gated delta net", leave_out_latent.gated_delta_net),
    ("Mamba-2", leave_out_latent.mamba2),
)
"""Every family's check, by the name that ``--family`` takes."""


class Figures(NamedTuple):
    """Errors of one family, protocol and precision on one table, percent."""

    n: int
    median_abs_pct: float
    p90_abs_pct: float


Key = tuple[str, str, str]
ALL: Final = "all"
"""Name of all precisions of a family together."""


def judge(table: tuple[str, str, str], families: list[str], seed: int) -> dict[Key, Figures]:
    """Figures of one kernel table by (family, protocol, precision).

    Every family draws from a generator of its own, so that asking for fewer families changes
    nothing about the others.
    """
    kernels, device = load_kernel_table(*table), load_device(table[0])
    errors = defaultdict(list)
    for name, check in CHECKS:
        if name in families:
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            for found in check(kernels, device, random):
                errors[found.family, found.protocol, found.precision].append(found.errors)
    for family, protocol in {key[:2]: None for key in errors}:
        precisions = [parts for key, parts in errors.items() if key[:2] == (family, protocol)]
        if len(precisions) > 1:
            errors[family, protocol, ALL] = [part for parts in precisions for part in parts]
    pooled = {key: 100 * np.concatenate(parts) for key, parts in errors.items()}
    return {
        key: Figures(len(all_), float(np.median(all_)), float(np.quantile(all_, 0.9)))
        for key, all_ in pooled.items()
        if len(all_)
    }


def main() -> None:
    """Run the benchmark."""
    tables = available_kernel_tables()
    names = [name for name, _ in CHECKS]
    parser = argparse.ArgumentParser(prog="bench.kernel_interpolation", description=__doc__)
    for option, choices in (
        ("device", sorted({table[0] for table in tables})),
        ("engine", sorted({table[1] for table in tables})),
        ("family", names),
    ):
        parser.add_argument(f"--{option}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = [table for table in tables if table[0] in args.device and table[1] in args.engine]
    if not wanted:
        parser.error("no kernel table of these engines ships for these devices")
    out: dict[str, Any] = {}
    print(
        f"{'family':<22} {'left out':<12} {'precision':<12} {'n':>7} {'median %':>9} {'p90 %':>7}"
    )
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(judge, table, args.family, args.seed) for table in wanted]
        for (device, engine, version), job in zip(wanted, jobs, strict=True):
            print(f"{device}, {engine} {version}")
            for (family, protocol, precision), figures in job.result().items():
                print(
                    f"{family:<22} {protocol:<12} {precision:<12} {figures.n:>7,}"
                    f" {figures.median_abs_pct:>9.2f} {figures.p90_abs_pct:>7.2f}",
                    flush=True,
                )
                of_family = out.setdefault(device, {}).setdefault(engine, {}).setdefault(family, {})
                of_family.setdefault(protocol, {})[precision or ALL] = figures._asdict()
    if args.json:
        args.json.write_text(json.dumps(out, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
