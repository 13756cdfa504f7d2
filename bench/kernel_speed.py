"""How long loading a kernel table and compiling a plan's iteration cost take.

``python -m bench.kernel_speed [--device H100-SXM-80GB] [--json PATH]``

Loading: the best of five reads of every shipped file, caches emptied before each. Compiling: one
plan's cost with the table's fits made, for models of every kind of layer, the median over widths.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from planner.io.devices import device_names, kernel_table_for, load_device, measured_device
from planner.io.engines import load_engine
from planner.io.hf_config import read_model
from planner.io.profiles import available_kernel_tables, load_kernel_table
from simulator.cost import CostCompiler
from simulator.engine_rules import HostConstants
from simulator.plan import BatchingLimits, Shape
from simulator.units import MS_PER_S

MODELS: Final = (
    "meta-llama/Llama-3.1-70B",
    "mistralai/Mixtral-8x7B-v0.1",
    "openai/gpt-oss-120b",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V3.2",
    "Qwen/Qwen3.5-397B-A17B",
)
"""Dense; experts; windows; latent attention; sparse attention; linear attention."""
ENGINE: Final = ("vllm", "0.24.0")
LIMITS: Final = BatchingLimits(max_num_seqs=1024, max_num_batched_tokens=8192)
MAX_MODEL_LEN: Final = 16_384
REPEATS: Final = 5


def load_ms(table: tuple[str, str, str]) -> float:
    """Best time of reading one shipped file."""
    times = []
    for _ in range(REPEATS):
        load_kernel_table.cache_clear()
        began_s = time.perf_counter()
        load_kernel_table(*table)
        times.append(time.perf_counter() - began_s)
    return MS_PER_S * min(times)


def compile_ms(model_name: str, device_name: str) -> float:
    """Median time over widths of compiling one plan's cost, the table's fits made."""
    device = load_device(device_name)
    engine = load_engine(*ENGINE, device=measured_device(device_name))
    table = kernel_table_for(device_name, engine.name, engine.kernel_table_version)
    model = read_model(
        model_name,
        base_dir=Path(),
        weight_dtype=None,
        kv_cache_dtype="auto",
        max_model_len=MAX_MODEL_LEN,
        source="bench",
    )
    times = []
    for warm in (False, True):
        compiler = CostCompiler(
            model,
            device,
            table,
            HostConstants(),
            engine.graphs,
            max_tokens=LIMITS.max_num_batched_tokens,
            max_seqs=LIMITS.max_num_seqs,
            max_context=MAX_MODEL_LEN,
        )
        for tp in compiler.widths:
            began_s = time.perf_counter()
            compiler.compile(Shape(tp), LIMITS)
            if warm:
                times.append(time.perf_counter() - began_s)
    return MS_PER_S * float(np.median(times))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench.kernel_speed", description=__doc__)
    parser.add_argument("--device", default="H100-SXM-80GB", choices=device_names())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loads = {"/".join(table): load_ms(table) for table in available_kernel_tables()}
    slowest = max(loads, key=lambda name: loads[name])
    print(f"loading: {min(loads.values()):.1f} to {loads[slowest]:.1f} ms ({slowest})")
    compiles = {name: compile_ms(name, args.device) for name in MODELS}
    for name, ms in compiles.items():
        print(f"compiling {name} on {args.device}: {ms:.1f} ms")
    out: dict[str, Any] = {"load_ms": max(loads.values()), "compile_ms": max(compiles.values())}
    if args.json:
        args.json.write_text(json.dumps(out, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
