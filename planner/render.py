"""Reports as a person likes to read them; the only file that draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TextIO

    from rich.console import RenderableType

    from planner.report import PlanReport, PlanSummary, SimulationReport

_WIDTH: Final = 100
"""Columns where the output is no terminal, so that a log looks the same everywhere."""

_THEORETICAL: Final = "theoretical: this engine version cannot launch it"

_STATUS_STYLE = {"optimal": "bold green", "feasible": "bold yellow", "infeasible": "bold red"}


def console(stream: TextIO) -> Console:
    """A console on ``stream``: without colour or motion where that is no terminal."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, no_color=True, force_terminal=False, width=_WIDTH)


def render_solve(report: PlanReport, to: Console) -> None:
    """Draw the answer of a solve."""
    to.print(_headline(report))
    if report.plan is None:
        if report.infeasible is not None:
            to.print(Text(f"reason  {report.infeasible['reason']}"))
            to.print(Text(report.infeasible["relaxation"]))
        to.print(_search(report))
    else:
        to.print(_plan(report.plan))
        to.print(_behaviour(report.metrics, report.metrics_interval))
        to.print(_kernel_times(report.provenance))
        to.print(_alternatives(report))
        to.print(_search(report))
        if not report.plan.theoretical:
            to.print(_launch(report.plan))
    _warnings(report.warnings, to)


def render_simulation(report: SimulationReport, to: Console) -> None:
    """Draw the answer of a simulation."""
    to.print(Text.assemble("simulated ", (report.plan.id, "bold cyan")))
    to.print(_plan(report.plan))
    to.print(_behaviour(report.metrics, report.metrics_interval))
    to.print(_kernel_times(report.provenance))
    if report.breaks:
        to.print(Text(f"breaks {', '.join(report.breaks)}", style="red"))
    _warnings(report.warnings, to)


def render_list(rows: Sequence[Mapping[str, object]], to: Console) -> None:
    """Draw a catalogue: one row an entry; lists are for programs and stay in the JSON."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in columns:
        numeric = isinstance(rows[0][name], (int, float))
        table.add_column(
            name.replace("_", " "), justify="right" if numeric else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*("" if row[name] is None else f"{row[name]}" for name in columns))
    to.print(table)


def _headline(report: PlanReport) -> RenderableType:
    line = Text.assemble((report.status, _STATUS_STYLE.get(report.status, "bold")))
    if report.plan is None or report.objective is None:
        return Panel(line)
    objective = report.objective
    line.append("  theoretical " if report.plan.theoretical else "  deploy ")
    line.append(report.plan.id, style="bold cyan")
    line.append(f"  {objective.sense} {objective.name}: ")
    value = f"{objective.value:.0f}" if objective.unit == "devices" else number(objective.value)
    line.append(f"{value} {objective.unit}", style="bold")
    if report.status == "optimal":
        line.append("  (proved: no other plan in the space is better)")
    elif report.bound is not None and report.gap is not None:
        line.append(f"  (no plan beats {number(report.bound)}; gap {100 * report.gap:.1f} %)")
    return Panel(line)


def _plan(plan: PlanSummary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    replicas = f"{plan.replicas} replica{'s' if plan.replicas > 1 else ''}"
    ways = [("tensor", plan.tp), ("pipeline", plan.pp), ("attention data", plan.dp)]
    ways.append(("expert", plan.ep))
    spread = ", ".join(f"{name} parallel {n}" for name, n in ways if n > 1 or name == "tensor")
    shape = f"{replicas} of {spread} on {plan.devices} {plan.device or 'devices'}"
    if plan.cost_per_hour is not None:
        shape += f", {plan.cost_per_hour:.2f} USD/h"
    limits = (
        f"max_num_seqs {plan.max_num_seqs}, max_num_batched_tokens {plan.max_num_batched_tokens}"
    )
    memory = plan.memory
    split = (
        f"weights {memory['weights_gib']:.1f} + activations {memory['activations_gib']:.1f}"
        f" + overhead {memory['overhead_gib']:.1f} + KV cache {memory['kv_cache_gib']:.1f}"
        f" of {memory['usable_gib']:.1f} GiB per device"
    )
    table.add_row("plan", shape)
    if plan.theoretical:
        table.add_row("", Text(_THEORETICAL, style="yellow"))
    table.add_row("limits", limits)
    table.add_row("memory", split)
    holder = "attention group" if plan.dp > 1 else "replica"
    table.add_row("KV", f"{memory['kv_cache_tokens']:,.0f} tokens per {holder}")
    return table


def _behaviour(
    metrics: Mapping[str, float], intervals: Mapping[str, Mapping[str, float]]
) -> RenderableType:
    table = Table(title="behaviour", title_justify="left", box=None, pad_edge=False)
    statistics = ("mean", "p50", "p90", "p95", "p99")
    table.add_column("ms")
    for statistic in statistics:
        table.add_column(statistic, justify="right")
    table.add_column("90 % interval of the mean", justify="right")
    for metric, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E")):
        if f"mean_{metric}_ms" in metrics:
            around = _interval(intervals.get(f"mean_{metric}_ms"))
            cells = (number(metrics[f"{s}_{metric}_ms"]) for s in statistics)
            table.add_row(label, *cells, around)
    facts = (
        f"{metrics['request_throughput']:.2f} requests/s, "
        f"{metrics['output_throughput']:.0f} output tokens/s"
    )
    if "request_goodput" in metrics:
        facts += (
            f", goodput {metrics['request_goodput']:.2f} requests/s"
            f" ({100 * metrics['slo_attainment']:.1f} % meet the limits)"
        )
    if "cost_per_million_output_tokens" in metrics:
        facts += f", {metrics['cost_per_million_output_tokens']:.2f} USD per million output tokens"
    peak = (
        f"peak {metrics['peak_running']:.0f} running, {100 * metrics['peak_kv_usage']:.0f} % of KV"
        f" blocks, {metrics['preemptions']:.0f} preemptions"
    )
    lines: list[RenderableType] = [table, Text(facts), Text(peak)]
    if metrics["overloaded"]:
        lines.append(
            Text("overloaded: the backlog grows, so these figures are no capacity", style="red")
        )
    return Group(*lines)


def _interval(around: Mapping[str, float] | None) -> str:
    return f"{number(around['low'])} to {number(around['high'])}" if around else ""


def _kernel_times(provenance: Mapping[str, Any]) -> RenderableType:
    """How much of the kernel time rests on what."""
    shares = provenance["kernel_time_share"].items()
    text = ", ".join(f"{100 * share:.0f} % {label}" for label, share in shares if share > 0)
    return Text(f"kernel time: {text}")


def _alternatives(report: PlanReport) -> RenderableType:
    unit = report.objective.unit if report.objective else ""
    table = Table(title="runners-up", title_justify="left", box=None, pad_edge=False)
    table.add_column("plan")
    table.add_column("devices", justify="right")
    if unit != "devices":
        table.add_column(unit, justify="right")
    table.add_column("loses by", justify="right")
    table.add_column("")
    for row in report.alternatives:
        notes = [f"breaks {', '.join(row.breaks)}"] if row.breaks else []
        notes += ["theoretical"] if row.theoretical else []
        loss = "" if row.breaks else f"{row.loss_pct:.1f} %"
        cells = [str(row.devices), number(row.value)] if unit != "devices" else [str(row.devices)]
        table.add_row(row.id, *cells, loss, "; ".join(notes))
    return table


def _search(report: PlanReport) -> RenderableType:
    search = report.search
    table = Table(title="search", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{search.space:,}", "plans in the space")
    for rule, count in search.excluded_by_rule.items():
        table.add_row(f"{count:,}", f"excluded: {rule}")
    for count, text in (
        (search.breaks_slo, "proved to break an SLO"),
        (search.excluded_by_bound, "ruled out by their bound, never simulated"),
        (search.aborted, "stopped when their bound passed the best plan"),
        (search.identical, "identical to a simulated plan (the limits that differ never bind)"),
        (search.simulated, "simulated to the end"),
    ):
        if count:
            table.add_row(f"{count:,}", text)
    table.add_row(f"{search.iterations:,}", "iterations simulated")
    if search.seconds is not None:
        table.add_row(f"{search.seconds:.2f}", "seconds")
    every = search.exhaustive
    if every is not None:
        agrees = "the same plan and value" if every["agrees"] else f"ANOTHER plan: {every['best']}"
        if not every["complete"]:
            agrees = "no plan yet: it was interrupted"
        saved = 100 * (1 - every["search_share"])
        table.add_row(
            f"{every['distinct_iterations']:,}",
            f"iterations of all distinct plans: the search saved {saved:.1f} % of them",
        )
        table.add_row("", f"exhaustive simulation names {agrees}")
    return table


def _launch(plan: PlanSummary) -> RenderableType:
    lines = [Text("launch", style="italic")]
    lines.extend(Text(f"  {command}", overflow="fold") for command in plan.launch)
    return Group(*lines)


def _warnings(warnings: tuple[str, ...], to: Console) -> None:
    for warning in warnings:
        to.print(Text(f"note: {warning}", style="yellow"))


def number(value: float) -> str:
    """Three to four significant digits, thousands separated."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"
