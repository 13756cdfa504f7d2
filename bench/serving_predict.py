"""Simulates the servers of a measured run under given host constants."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.names import checkpoint_of, device_of, release_of
from bench.rtx_tables import LayerTables, MixedLoad, has_tables, layer_cost, read_tables
from bench.serving_files import HASHED_TOKENS, read_contents
from bench.uncovered import UncoveredError
from planner.engine_settings import EngineSettings
from planner.errors import PlannerError
from planner.io.devices import kernel_table_for, load_device, measured_device
from planner.io.engines import load_engine
from planner.io.hf_config import read_model
from simulator.cost import CostCompiler
from simulator.kv_layout import kv_layout
from simulator.memory import memory_budget
from simulator.plan import Shape
from simulator.rules import VLLM_V1
from simulator.run import Run
from simulator.state import Limits
from simulator.timing import in_ps
from simulator.weights import weight_bytes_per_rank
from simulator.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

    from bench.measured_server import Requests, Server, ServingRun
    from bench.names import Checkpoint
    from bench.serving_files import Ints
    from planner.io.engines import EngineProfile
    from simulator.device import Device
    from simulator.engine_rules import GraphRules, HostConstants
    from simulator.model import ModelShape
    from simulator.plan import BatchingLimits
    from simulator.rules import Rules
    from simulator.run import RunResult
    from simulator.table import KernelTable
    from simulator.timing import IterationCost

METRICS: Final = ("ttft", "tpot", "e2e", "makespan")


@dataclass(frozen=True)
class Folders:
    """Where layer tables and block hashes lie; ``None`` where not given."""

    profiles: Path | None = None
    traces: Path | None = None


@dataclass(frozen=True, eq=False)
class _Machine:
    """What servers of one model, device and engine version have in common, looked up.

    Parameters
    ----------
    model, device, engine
        What is served, on what, by what.
    costs
        Costs under the host constants asked for last, by everything else they depend on.

    """

    model: ModelShape
    device: Device
    engine: EngineProfile
    costs: dict[Hashable, tuple[HostConstants, IterationCost]] = field(default_factory=dict)


@dataclass(eq=False)
class Prepared:
    """A run whose every name is resolved.

    Parameters
    ----------
    run
        The measured run.
    cluster
        Runs with the same constants: engine version, model and precision.
    policy, cuda_graphs, has_tables, host
        The engine's scheduler, whether CUDA graphs were on, whether layer tables are its costs,
        and the constants of its profile.
    servers
        What simulates each of its servers.
    notes
        What stands in for what.

    """

    run: ServingRun
    cluster: str
    policy: int
    cuda_graphs: bool
    has_tables: bool
    host: HostConstants
    servers: list[_Simulated]
    notes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Kind of its servers: the device and how many of them each one is wide."""
        return f"{self.run.device} {_shape(self.run.servers[0]).text}"

    def predict_s(self, host: HostConstants) -> dict[str, float]:
        """Means of the metrics that were measured, seconds."""
        results = [server.result(host) for server in self.servers]
        outputs = np.concatenate([s.workload.output_tokens for s in self.servers])
        arrival_s, first_s, finish_s = (
            np.concatenate([getattr(result, name) for result in results])
            for name in ("arrival_s", "first_token_s", "finish_s")
        )
        several = outputs > 1
        decode_s, later = (finish_s - first_s)[several], (outputs - 1)[several]
        tpot_s = decode_s.sum() / later.sum() if self.run.pooled_tpot else (decode_s / later).mean()
        means = {
            "ttft": (first_s - arrival_s).mean(),
            "tpot": tpot_s,
            "e2e": (finish_s - arrival_s).mean(),
            "makespan": finish_s.max() - arrival_s.min(),
        }
        return {metric: float(means[metric]) for metric in METRICS if metric in self.run.measured_s}


def prepare(run: ServingRun, folders: Folders) -> Prepared:
    """Look up what a run names.

    A card with layer tables of its own is simulated from these, anything else from the kernel
    tables that ship.

    Raises
    ------
    UncoveredError
        If the run cannot be simulated; the text says why.

    """
    release = release_of(run.engine, run.engine_version)
    checkpoint = checkpoint_of(run.model, weight_dtype=run.weights, kv_cache_dtype=run.kv_cache)
    try:
        machine = _machine(run.device, checkpoint, release.engine, release.version)
        simulated = [_simulated(machine, run, server, folders) for server in run.servers]
    except PlannerError as error:
        raise UncoveredError(str(error)) from error
    engine = machine.engine
    # Names of one shape (base and instruct) are one cluster, and so are all cards with tables.
    has_tables = simulated[0].tables is not None
    if has_tables and any(server.ep > 1 for server in run.servers):
        raise UncoveredError("the card's layer tables hold no experts spread over devices")
    own = "layer tables" if has_tables else f"{machine.device.name}, {_shape_key(machine.model)}"
    name = f"{release.engine} {release.asked}, {own}"
    notes = (release.note, *(() if has_tables else engine.warnings))
    return Prepared(
        run=run,
        cluster=name,
        policy=simulated[0].rules.policy,
        cuda_graphs=run.servers[0].cuda_graphs,
        has_tables=has_tables,
        host=engine.host,
        servers=simulated,
        notes=tuple(note for note in notes if note),
    )


@lru_cache(maxsize=32)
def _machine(card: str, checkpoint: Checkpoint, engine: str, version: str) -> _Machine:
    device = load_device(_device_name(card))
    return _Machine(
        model=read_model(str(checkpoint.section()["config"])),
        device=device,
        engine=load_engine(engine, version, device=measured_device(device.name)),
    )


def _shape_key(model: ModelShape) -> str:
    """Sizes of a model as text: equal for checkpoints that differ in name only."""
    billions = weight_bytes_per_rank(model, Shape(1)) / 1e9
    return f"{model.num_layers} layers of {model.hidden_size}, {billions:.1f} GB"


@dataclass(eq=False)
class _Simulated:
    """One server, ready to run under any host constants."""

    machine: _Machine
    server: Server
    rules: Rules
    limits: Limits
    batching: BatchingLimits
    graphs: GraphRules
    workload: Workload
    max_tokens: int
    max_context: int
    tables: LayerTables | None
    table: KernelTable | None

    def result(self, host: HostConstants) -> RunResult:
        """The finished run."""
        limits = self.limits._replace(ingress_ps=int(in_ps(host.ingress_s)))
        if self.tables is None:
            return self._run(limits, self._kernel_cost(host)).finish()
        # One run shows which decodes the chunks meet, the next one charges for them; a third
        # moves no mean of the two measured cards by more than 0.03 %.
        seen = self._run(limits, self._layer_cost(host, None))
        seen.record_iterations()
        load = self._mixed_load(seen.finish())
        return self._run(limits, self._layer_cost(host, load)).finish()

    def _run(self, limits: Limits, cost: IterationCost) -> Run:
        return Run(self.workload, 1, limits, cost, self.rules)

    def _kernel_cost(self, host: HostConstants) -> IterationCost:
        nccl_from = dict(self.machine.engine.nccl_all_reduce_from_bytes)
        if not self.server.custom_all_reduce:
            nccl_from[self.server.tp] = 0
        key = (_shape(self.server), self.batching, self.graphs, *sorted(nccl_from.items()))
        key = (*key, self.max_tokens, self.max_context)
        for_host, cost = self.machine.costs.get(key, (None, None))
        if cost is None or for_host != host:
            assert self.table is not None
            compiler = CostCompiler(
                self.machine.model,
                self.machine.device,
                self.table,
                host,
                self.graphs,
                nccl_all_reduce_from_bytes=nccl_from,
                max_tokens=self.max_tokens,
                max_seqs=self.batching.max_num_seqs,
                max_context=self.max_context,
            )
            whole = dataclasses.replace(self.batching, max_num_batched_tokens=self.max_tokens)
            cost = compiler.compile(_shape(self.server), whole)
            self.machine.costs[key] = host, cost
        return cost

    def _layer_cost(self, host: HostConstants, load: MixedLoad | None) -> IterationCost:
        assert self.tables is not None
        return layer_cost(
            self.tables,
            self.machine.model,
            self.server.tp,
            self.batching,
            self.graphs,
            host,
            max_context=self.max_context,
            load=load,
            collectives=(self.table, self.machine.device) if self.table is not None else None,
        )

    def _mixed_load(self, result: RunResult) -> MixedLoad | None:
        """Decodes of the iterations that also computed prompt tokens, and their mean context.

        A sequence decodes at every length from its prompt to its end, so the context is the mean
        over all output tokens.
        """
        assert result.log is not None
        mixed = result.log.prompt_tokens > 0
        if not mixed.any():
            return None
        prompts, outputs = self.workload.prompt_tokens, self.workload.output_tokens
        context = np.average(prompts + outputs / 2, weights=outputs)
        return MixedLoad(result.log.decodes[mixed].astype(np.float64), float(context))


def _simulated(machine: _Machine, run: ServingRun, server: Server, folders: Folders) -> _Simulated:
    model, device, engine = machine.model, machine.device, machine.engine
    settings = EngineSettings(
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens,
        memory_fraction=server.memory_fraction,
        block_tokens=server.block_tokens,
        prefix_caching=server.prefix_caching,
    )
    longest = _longest(server, model)
    defaults = engine.default_limits(device, longest, settings)
    batching = dataclasses.replace(
        defaults,
        max_num_seqs=server.max_num_seqs or defaults.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens or defaults.max_num_batched_tokens,
    )
    rules = engine.rules(longest, settings)
    if rules.policy != VLLM_V1:
        # Only V1's cache is modelled; without known contents others would find next to nothing.
        rules = rules._replace(prefix_caching=False)
    memory = engine.memory_rules(device, settings)
    layout = kv_layout(model, server.tp, memory.block_tokens, memory.state_dtype)
    blocks = server.num_blocks
    if blocks is None:
        blocks = memory_budget(model, device, _shape(server), batching, memory).num_blocks
        if server.max_model_len is not None:
            # It started, so it holds at least one longest request.
            blocks = max(blocks, layout.pages(server.max_model_len))
    tables, table = None, None
    named = (run.device, run.model, server.tp)
    if folders.profiles is not None and has_tables(folders.profiles, *named):
        tables = read_tables(folders.profiles, *named)
    if tables is None or server.tp > 1:
        table = kernel_table_for(device.name, engine.name, engine.kernel_table_version)
    graphs = engine.graphs_on(device)
    if not server.cuda_graphs:
        graphs = dataclasses.replace(graphs, sizes=(), full_decode=False, captures_seats=False)
    requests = server.requests
    return _Simulated(
        machine=machine,
        server=server,
        rules=rules,
        limits=Limits(
            max_num_seqs=batching.max_num_seqs,
            max_num_batched_tokens=batching.max_num_batched_tokens,
            num_blocks=blocks,
            block_tokens=layout.block_tokens,
            ingress_ps=0,
            growing=layout.growing,
            windowed=layout.windowed,
            window_blocks=layout.window_blocks,
            fixed=layout.fixed,
        ),
        batching=batching,
        graphs=graphs,
        workload=_workload(requests, folders.traces, layout.block_tokens, rules),
        max_tokens=max(
            batching.max_num_batched_tokens, batching.max_num_seqs, rules.prefill_tokens
        ),
        # A power of two, so that servers of one kind share their cost.
        max_context=1 << int((requests.input_tokens + requests.output_tokens).max()).bit_length(),
        tables=tables,
        table=table,
    )


def _shape(server: Server) -> Shape:
    """How a server is spread over devices."""
    return Shape(server.tp, ep=server.ep)


def _longest(server: Server, model: ModelShape | None) -> int:
    """Longest request that the server admits: as set, or what the checkpoint supports."""
    if server.max_model_len is not None:
        return server.max_model_len
    return model.max_position_embeddings if model is not None else 0


def _workload(requests: Requests, traces: Path | None, block_tokens: int, rules: Rules) -> Workload:
    """The requests, with the contents of their prompts where these are known and matter."""
    plain = Workload(requests.arrival_s, requests.input_tokens, requests.output_tokens)
    if not rules.prefix_caching or block_tokens != HASHED_TOKENS:
        return plain
    for prompts, outputs, blocks in _contents(traces):
        if np.array_equal(prompts, requests.input_tokens) and np.array_equal(
            outputs, requests.output_tokens
        ):
            flat = np.concatenate(blocks)
            _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
            by_appearance = np.argsort(np.argsort(first))
            starts = np.concatenate([[0], np.cumsum([len(ids) for ids in blocks])])
            return dataclasses.replace(
                plain,
                block_ids=by_appearance[inverse].astype(np.int64),
                block_starts=starts.astype(np.int64),
                block_tokens=block_tokens,
            )
    return plain


@lru_cache(maxsize=4)
def _contents(traces: Path | None) -> list[tuple[Ints, Ints, list[Ints]]]:
    return read_contents(traces)


def _device_name(name: str) -> str:
    """Catalogue name of a card as the files spell it: ``RTXPRO6000``, ``H100-SXM-80GB``."""
    spaced = name.replace("RTX", "RTX ").replace("PRO", "PRO ") if "-" not in name else name
    return device_of(spaced)
