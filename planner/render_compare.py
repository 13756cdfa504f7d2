"""Comparisons and explanations as a person likes to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from planner.render import number

if TYPE_CHECKING:
    from rich.console import Console

    from planner.compare import Comparison
    from planner.explain import Explanation


_SMALL = 0.1


def render_comparison(comparison: Comparison, to: Console) -> None:
    """Draw two plans quantity by quantity, and what their inputs do not share."""
    first, second = comparison.first, comparison.second
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for side in (first, second):
        table.add_column(side.plan, justify="right", overflow="fold")
    table.add_column("change", justify="right")
    for row in comparison.rows:
        change = "" if row.change_pct is None else f"{row.change_pct:+.1f} %"
        table.add_row(row.name, _cell(row.first), _cell(row.second), change)
    to.print(table)
    for side in (first, second):
        if side.breaks:
            to.print(Text(f"{side.plan} breaks {', '.join(side.breaks)}", style="red"))
    for difference in comparison.inputs:
        to.print(Text(f"note: the reports differ in {difference}", style="yellow"))


def render_explanation(explanation: Explanation, to: Console) -> None:
    """Draw why a plan is not the best."""
    to.print(Text(explanation.verdict, style="bold"))
    if explanation.cannot_run is not None:
        return
    if explanation.settled is None:
        to.print(Text("it is not in the searched space (search.space)"))
    else:
        to.print(Text(f"in the search {explanation.settled}"))
    binding = [use for use in explanation.limits if use.binds]
    for use in explanation.limits:
        held = "held requests back" if use.binds else "never bound"
        to.print(Text(f"{use.name}: peak {use.peak:,} of {use.limit:,}, {held}"))
    if not binding:
        to.print(Text("no limit bound: its time per iteration decides"))
    table = Table(title="ms per iteration", title_justify="left", box=None, pad_edge=False)
    table.add_column("operator")
    for name in (explanation.best or "no plan", explanation.plan):
        table.add_column(name, justify="right", overflow="fold")
    for name, best_ms, own_ms in explanation.operators:
        table.add_row(name, f"{best_ms:.3f}", f"{own_ms:.3f}")
    to.print(table)
    if explanation.comparison is not None and explanation.best != explanation.plan:
        render_comparison(explanation.comparison, to)


def _cell(value: float) -> str:
    """Counts whole, small shares with two digits, everything else as in reports."""
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < _SMALL else number(value)
