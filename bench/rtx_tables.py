"""Measured layer times of one card (LLMServingSim's tables) as an iteration cost.

Files ``HARDWARE__MODEL__tpN__KIND.csv``, times in microseconds, one layer on one rank:

``dense``
    Each product and elementwise kernel by tokens.
``attention``
    One attention call over a prompt chunk after cached tokens and decodes of equal context.
``per_sequence``
    Head and sampler by sequences.
``moe``
    Routed experts by tokens and experts hit.

The tables were measured with the engine version that the runs used (vLLM 0.19.0), so nothing in
them is fitted; only host time is added.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.uncovered import UncoveredError
from simulator.collectives import all_reduce_s
from simulator.layer_collectives import all_reduces
from simulator.model import Experts
from simulator.plan import Shape
from simulator.timing import one_stage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    from simulator.device import Device
    from simulator.engine_rules import GraphRules, HostConstants
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits
    from simulator.table import KernelTable
    from simulator.timing import IterationCost

    Floats = npt.NDArray[np.float64]
    Series = tuple[Floats, Floats]

_S_PER_US: Final = 1e-6

_PER_LAYER: Final = {
    "qkv_proj": 1,
    "qk_norm": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
    "layernorm": 2,  # before attention and before the feed-forward network
}
"""Kernels of one layer and how often it runs them; a model without one has no rows of it."""

_ONCE: Final = ("embedding", "final_layernorm")
_SAMPLED: Final = ("lm_head", "sampler")


@dataclass(frozen=True, eq=False)
class MixedLoad:
    """Decodes that share an iteration with prompt chunks.

    Parameters
    ----------
    decodes
        (I,) decoding sequences of each such iteration.
    context
        Their mean context, tokens.

    """

    decodes: Floats
    context: float


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Tables of one model on one card at one tensor-parallel width.

    Parameters
    ----------
    dense, sampled
        By kernel: knots (tokens, or sequences) and times, seconds, shapes (P,).
    attention
        By (prompt chunk, cached tokens, decodes, context): seconds.
    experts
        By (tokens, experts hit): seconds; empty without routed experts.

    """

    dense: Mapping[str, Series]
    sampled: Mapping[str, Series]
    attention: Mapping[tuple[int, int, int, int], float]
    experts: Mapping[tuple[int, int], float]

    def decode_attention_s(self, decodes: Floats) -> tuple[Floats, Floats]:
        """Attention without prompt tokens: contexts (C,), and seconds (len(decodes), C).

        Linear in sequences between the measured counts. A context counts if it was measured for
        every count.
        """
        points = {key[2:]: time for key, time in self.attention.items() if not key[0] and key[2]}
        counts = np.array(sorted({n for n, _ in points}), np.float64)
        contexts = [
            c for c in sorted({c for _, c in points}) if all((n, c) in points for n in counts)
        ]
        grid = np.array([[points[int(n), c] for n in counts] for c in contexts])
        time_s = np.array([np.interp(decodes, counts, row) for row in grid]).T
        return np.array(contexts, np.float64), time_s

    def prompt_attention_s(self, longest: int) -> Floats:
        """Attention of the first ``l`` tokens of a sequence, (longest + 1,).

        Up to the largest chunk measured from the start, then one such chunk after another. The
        time per token is interpolated: it is linear in length where scores dominate.
        """
        chunks = sorted((key[0], time) for key, time in self.attention.items() if _starts(key))
        tokens = [float(chunk) for chunk, _ in chunks]
        total_s = [time for _, time in chunks]
        step = chunks[-1][0]
        after = sorted(
            (key[1], time) for key, time in self.attention.items() if _follows(key, step)
        )
        cached, time_s = np.array(after).T
        while tokens[-1] < longest:
            total_s.append(total_s[-1] + float(np.interp(tokens[-1], cached, time_s)))
            tokens.append(tokens[-1] + step)
        lengths = np.arange(longest + 1, dtype=np.float64)
        per_token = np.interp(lengths, tokens, np.array(total_s) / np.array(tokens))
        return np.maximum.accumulate(lengths * per_token)

    def mixing_s(self, chunk: Floats, load: MixedLoad) -> Floats:
        """What one attention call over a chunk and decodes takes beyond two calls, seconds.

        A chunk switches the whole call to a kernel that neither splits long contexts over idle
        cores nor packs the heads of a group: 64 decodes of 1024 tokens take 1.4 (RTX PRO 6000) to
        1.8 (RTX 4090) times as long beside 16 prompt tokens. Bilinear in decodes and context,
        the mean over the iterations of ``load``; linear in the chunk.
        """
        chunks = np.array(sorted({key[0] for key in self.attention if not key[1] and key[2]}))
        excess = []
        for c in chunks[chunks > 0]:
            alone = self.attention[int(c), 0, 0, 0]
            points = {
                (n, kv): self.attention[c, 0, n, kv] - alone - self.attention[0, 0, n, kv]
                for kind, cached, n, kv in self.attention
                if kind == c and not cached and n and (0, 0, n, kv) in self.attention
            }
            excess.append(np.maximum(_bilinear(points, load.decodes, load.context), 0.0).mean())
        out: Floats = np.interp(chunk, chunks[chunks > 0], excess)
        return out

    def experts_s(self, tokens: Floats, experts: Experts) -> Floats:
        """Routed experts of one layer by tokens, if every expert is as likely as any other.

        ``E (1 - (1 - k / E) ** n)`` of ``E`` experts are hit by ``n`` tokens of ``k`` each.
        """
        knots = sorted({n for n, _ in self.experts})
        rows = []
        for n in knots:
            hit = experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** n)
            own = sorted((e, time) for (m, e), time in self.experts.items() if m == n)
            rows.append(float(np.interp(hit, *np.array(own).T)))
        out: Floats = np.interp(tokens, knots, rows)
        return out


def has_tables(folder: Path, hardware: str, model: str, tp: int) -> bool:
    """Whether a card has layer tables for a model at this width."""
    return (folder / f"{_stem(hardware, model, tp)}dense.csv").exists()


def read_tables(folder: Path, hardware: str, model: str, tp: int) -> LayerTables:
    """Tables of ``model`` (with or without its organisation) on a card as the files call it.

    Raises
    ------
    UncoveredError
        If one of them is missing.

    """
    stem = _stem(hardware, model, tp)
    dense, sampled = (_series(folder / f"{stem}{kind}.csv") for kind in ("dense", "per_sequence"))
    attention = {
        tuple(int(row[c]) for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")): _s(
            row
        )
        for row in _rows(folder / f"{stem}attention.csv")
    }
    moe, experts = folder / f"{stem}moe.csv", {}
    if "gate_up_proj" not in dense:
        experts = {(int(r["tokens"]), int(r["activated_experts"])): _s(r) for r in _rows(moe)}
    return LayerTables(dense, sampled, attention, experts)  # type: ignore[arg-type]


def layer_cost(
    tables: LayerTables,
    model: ModelShape,
    tp: int,
    limits: BatchingLimits,
    graphs: GraphRules,
    host: HostConstants,
    *,
    max_context: int,
    load: MixedLoad | None = None,
    collectives: tuple[KernelTable, Device] | None = None,
) -> IterationCost:
    """Cost of one replica from layer tables.

    Parameters
    ----------
    tables, model, tp
        Measured times, the model's layers, and the width they were measured for.
    limits, graphs
        Sizes of a batch, and which of them replay as CUDA graphs: those are padded up.
    host
        Host time; its eager floor and prefill multiplier are not used, the tables hold both.
    max_context
        Longest sequence, tokens.
    load
        Decodes that a prompt chunk usually meets. `IterationCost` adds attention of chunks and
        decodes, which one call does not; what it takes beyond that is charged for this load
        (``None``: not at all).
    collectives
        Kernel table and device whose all-reduce stands for the card's; needed beyond one card.

    """
    layers = model.num_layers
    tokens = np.arange(limits.max_num_batched_tokens + 1, dtype=np.float64)
    linear = np.zeros(len(tokens))
    for name in _ONCE:
        linear = linear + _interpolated(tables.dense[name], tokens)
    for name, times in _PER_LAYER.items():
        if name in tables.dense:
            linear = linear + layers * times * _interpolated(tables.dense[name], tokens)
    for layer, count in model.layer_counts.items():
        if isinstance(layer.ffn, Experts):
            linear = linear + count * tables.experts_s(tokens, layer.ffn)
        if tp > 1 and collectives is not None:
            table, device = collectives
            elements = np.maximum(tokens, 1) * model.hidden_size
            reduce_s, _ = all_reduce_s(table, device, "graph", tp, elements)
            linear = linear + count * all_reduces(layer, Shape(tp)) * reduce_s
    decode = _padded(linear, graphs.captured(limits, tp))
    mixed = _padded(linear, graphs.captured_with_prompts(limits, tp))
    if load is not None:
        chunk = np.maximum(tokens - load.decodes.mean(), 1)
        mixed[1:] += layers * tables.mixing_s(chunk, load)[1:]
    sequences = np.arange(limits.max_num_seqs + 1, dtype=np.float64)
    sampled = host.sequence_s * sequences
    for name in _SAMPLED:
        sampled = sampled + _interpolated(tables.sampled[name], sequences)
    sampled[0] = 0.0
    contexts, attention = tables.decode_attention_s(sequences)
    attention[0] = 0.0
    return one_stage(
        decode_s=decode,
        mixed_s=np.maximum(np.maximum.accumulate(mixed), decode),
        sampled_s=np.maximum.accumulate(sampled),
        # Below the shortest context measured its time holds.
        attention_s=_rising(layers * np.column_stack([attention[:, :1], attention])),
        context_knots=np.concatenate([[1], contexts]),
        prefill_s=layers * tables.prompt_attention_s(max_context),
        iteration_host_s=host.iteration_s,
    )


def _stem(hardware: str, model: str, tp: int) -> str:
    return f"{hardware}__{model.rsplit('/', 1)[-1]}__tp{tp}__"


def _interpolated(series: Series, at: Floats) -> Floats:
    """Linear between knots; beyond the last one its time per token holds."""
    knots, time_s = series
    out: Floats = np.interp(at, knots, time_s) * np.maximum(at / knots[-1], 1.0)
    return out


def _padded(linear: Floats, captured: tuple[int, ...]) -> Floats:
    """Device time by tokens, never falling; inside the captured range that of the next size."""
    out = linear.copy()
    out[0] = 0.0
    if captured:
        sizes = np.array(captured)
        out[1 : sizes[-1] + 1] = linear[sizes[np.searchsorted(sizes, np.arange(1, sizes[-1] + 1))]]
    return np.maximum.accumulate(out)


def _rising(grid: Floats) -> Floats:
    for axis in range(grid.ndim):
        grid = np.maximum.accumulate(grid, axis=axis)
    return grid


def _bilinear(points: Mapping[tuple[int, int], float], decodes: Floats, context: float) -> Floats:
    """Interpolated in context for every measured count, then in the count; shape of ``decodes``."""
    by_count: dict[int, list[tuple[int, float]]] = {}
    for (n, kv), time_s in points.items():
        by_count.setdefault(n, []).append((kv, time_s))
    counts = sorted(by_count)
    rows = [np.interp(context, *np.array(sorted(by_count[n])).T) for n in counts]
    out: Floats = np.interp(decodes, counts, rows)
    return out


def _starts(key: tuple[int, int, int, int]) -> bool:
    """Whether a row is a prompt chunk alone from the start of its sequence."""
    return key[0] > 0 and key[1] == key[2] == 0


def _follows(key: tuple[int, int, int, int], chunk: int) -> bool:
    """Whether a row is such a chunk alone, after any cached tokens."""
    return key[0] == chunk and key[2] == 0


def _series(path: Path) -> dict[str, Series]:
    """By kernel: knots and seconds."""
    rows = _rows(path)
    axis = "tokens" if rows and "tokens" in rows[0] else "sequences"
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        points.setdefault(row["layer"], []).append((int(row[axis]), _s(row)))
    out = {}
    for name, own in points.items():
        knots, time_s = np.array(sorted(own), np.float64).T
        out[name] = (knots, time_s)
    return out


def _s(row: Mapping[str, str]) -> float:
    return float(row["time_us"]) * _S_PER_US


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise UncoveredError(f"no layer table {path.name}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
