"""What is assumed of how public runs were measured, against or beside what their columns say.

``bench/assumptions.csv`` holds one assumption a line: for which clients, settings and engine
versions (an empty cell stands for any; ``seats`` of ``load``: the limit on running requests equals
the load), the name and value of what is assumed, the evidence, and what it changes on the
development file. A name is a rule of `simulator.rules.Rules`, ``kv_cache_dtype``,
``more_in_flight``: requests that a closed loop keeps in flight beyond its load, or
``budget_prompts``: whole prompts that the token budget holds where the row states none, or
``hold_iterations``: most iterations for which attention groups wait until each has a prompt. No
line names a model.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench.names import version_key
from simulator.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.clients import Client
    from bench.names import Release

_FILE: Final = Path(__file__).with_name("assumptions.csv")


@dataclass(frozen=True)
class Assumed:
    """What holds for one run.

    Parameters
    ----------
    rules
        Scheduling rules in place of the engine version's own, by name.
    kv_cache_dtype
        In place of the one stated; empty: none.
    more_in_flight
        Requests that a closed loop keeps in flight beyond its load.
    budget_prompts
        Prompts that an unstated token budget holds; 0: the engine's default budget.
    hold_iterations
        TensorRT-LLM's ``timeout_iters`` with ``enable_balance``; 0: prompts are not held back.

    """

    rules: Mapping[str, Any]
    kv_cache_dtype: str
    more_in_flight: int
    budget_prompts: int
    hold_iterations: int


class _Line(NamedTuple):
    arrival: str
    lengths: str
    seats: str
    engine: str
    before_version: str
    name: str
    value: str

    def holds(self, row: Mapping[str, str], client: Client, release: Release) -> bool:
        lengths = "fixed" if client.has_fixed_lengths else "spread"
        seats = "load" if row.get("max_num_seqs") == row.get("load") else ""
        before = not self.before_version or (
            version_key(release.number) < version_key(self.before_version)
        )
        return (
            before
            and self.arrival in ("", client.arrival)
            and self.lengths in ("", lengths)
            and self.seats in ("", seats)
            and self.engine in ("", release.engine)
        )


def assumed_of(row: Mapping[str, str], client: Client, release: Release) -> Assumed:
    """What is assumed of a row, its client and its engine version; a later line wins."""
    own = Rules()._asdict()
    values = {line.name: line.value for line in _lines() if line.holds(row, client, release)}
    return Assumed(
        rules={n: type(own[n])(int(value)) for n, value in values.items() if n in own},
        kv_cache_dtype=values.get("kv_cache_dtype", ""),
        more_in_flight=int(values.get("more_in_flight", "0")),
        budget_prompts=int(values.get("budget_prompts", "0")),
        hold_iterations=int(values.get("hold_iterations", "0")),
    )


@lru_cache(maxsize=1)
def _lines() -> tuple[_Line, ...]:
    with _FILE.open(newline="", encoding="utf-8") as file:
        return tuple(
            _Line(*(row[field] for field in _Line._fields)) for row in csv.DictReader(file)
        )
