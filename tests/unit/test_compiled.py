"""The compiled loops against the plain Python that they are compiled from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
if "count references" in sys.argv:  # before anything is compiled, and without the disk cache
    from simulator import compiled
    compiled._FLAGS.update(_nrt=True, cache=False)
import hashlib
import numba
from simulator.rules import Rules
from simulator.run import Run
from tests.builders import TICK_S, bytes_of, limits, linear_cost, workload

prompts = [1 + (7 * i) % 23 for i in range(40)]
outputs = [1 + (5 * i) % 19 for i in range(40)]
arrivals = [i * TICK_S / 3 for i in range(40)]
cost = linear_cost(TICK_S, token_s=1e-4 / 3, sequence_s=1e-5, context_s=1e-6 / 7, prompt_s=1e-7)
digest = hashlib.blake2b()
preemptions = 0
for concurrency in (0, 6):
    for reserve in (True, False):
        what = workload(prompts, outputs, arrivals if not concurrency else None, concurrency)
        under = limits(seqs=5, tokens=24, blocks=14, ingress_s=1e-4)
        rules = Rules(reserve_full_prompt=reserve)
        run = Run(what, 2, under, cost, rules, record_gaps=True)
        result = run.finish()
        preemptions += result.preemptions
        digest.update(result.trajectory_hash().encode())
        for part in (*bytes_of(run.state), *(array.tobytes() for array in result.gaps)):
            digest.update(part)
print(numba.config.DISABLE_JIT, preemptions > 0, digest.hexdigest())
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the script in a fresh interpreter."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    """JIT switched off?, preempted?, digest of everything: compiled, counted and plain."""
    running = {
        "compiled": start(),
        "references counted": start("count references"),
        "plain": start(NUMBA_DISABLE_JIT="1"),
    }
    found = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found[name] = out.split()
    return found


def test_plain_python_gives_the_same_bytes(outcomes: dict[str, list[str]]) -> None:
    """State, times and gaps of four runs agree bit by bit with the interpreter's."""
    assert outcomes["compiled"][:2] == ["0", "True"]
    assert outcomes["plain"][:2] == ["1", "True"]
    assert outcomes["plain"][2] == outcomes["compiled"][2]


def test_reference_counting_changes_nothing(outcomes: dict[str, list[str]]) -> None:
    """The undocumented option that switches it off leaves every byte as it is."""
    assert outcomes["references counted"] == outcomes["compiled"]
