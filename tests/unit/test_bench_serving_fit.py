"""Fit of host constants: found where runs show them, at the prior where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.serving_fit import Prior, fit, in_units
from simulator.engine_rules import HostConstants

if TYPE_CHECKING:
    from collections.abc import Callable

Means = dict[str, float]

PRIOR = Prior((4.0, 0.4, 0.3, 0.2, 6.0, 1.2), (1.0, 0.1, 0.05, 0.1, 3.0, 0.1), "test")
TRUE = HostConstants(
    iteration_s=4.8e-3,
    sequence_s=0.45e-3,
    ingress_s=9e-3,
    eager_layer_s=0.3e-3,
    eager_dealt_layer_s=0.2e-3,
    prefill_multiplier=1.25,
)


def server(kernel_s: float, batch: float, prompt_s: float) -> Callable[[HostConstants], Means]:
    """Means of a server that never queues."""

    def predict(host: HostConstants) -> Means:
        tpot = kernel_s + host.iteration_s + batch * host.sequence_s
        ttft = host.ingress_s + host.iteration_s + host.prefill_multiplier * prompt_s
        return {"ttft": ttft, "tpot": tpot}

    return predict


SERVERS = [server(0.01, 1, 0.02), server(0.02, 6, 0.3), server(0.03, 3, 0.01), server(0.01, 9, 0.1)]


def test_finds_constants_that_the_runs_show() -> None:
    """Four servers of different batches and prompts tell all constants apart."""
    found = in_units(fit(SERVERS, [s(TRUE) for s in SERVERS], PRIOR))
    for name, value in in_units(TRUE).items():
        assert found[name] == pytest.approx(value, rel=0.06), name


def test_what_the_runs_do_not_show_stays_at_the_prior() -> None:
    """TPOT alone says nothing about ingress or prompts."""
    only_tpot = [{"tpot": s(TRUE)["tpot"]} for s in SERVERS]
    found = fit(SERVERS, only_tpot, PRIOR)
    assert found.prefill_multiplier == pytest.approx(1.2)
    assert found.ingress_s == pytest.approx(6e-3)
    assert found.eager_layer_s == pytest.approx(0.3e-3)
    assert found.iteration_s != pytest.approx(4e-3, rel=0.05)


def test_no_constant_leaves_its_range() -> None:
    """Servers faster than their kernels push no constant below its least value."""
    fast = [{m: v * 0.3 for m, v in s(TRUE).items()} for s in SERVERS]
    found = fit(SERVERS, fast, PRIOR)
    assert min(in_units(found).values()) >= 0.0
    assert found.prefill_multiplier >= 1.0


def test_a_spread_of_zero_holds_a_constant() -> None:
    """A constant without spread is not fitted."""
    held = Prior(PRIOR.mean, (1.0, 0.1, 0.0, 0.0, 0.0, 0.1), "test")
    found = fit(SERVERS, [s(TRUE) for s in SERVERS], held)
    assert found.ingress_s == pytest.approx(6e-3)
    nothing = Prior(PRIOR.mean, (0.0,) * 6, "test")
    assert fit(SERVERS, [s(TRUE) for s in SERVERS], nothing) == nothing.host()


def test_kinds_count_alike_however_often_measured() -> None:
    """Two kinds that contradict each other: many runs of one must not outvote the other."""
    one, other = server(0.02, 1, 0.02), server(0.02, 1, 0.02)
    low, high = one(TRUE), {m: 1.1 * v for m, v in other(TRUE).items()}
    even = fit([one, other], [low, high], PRIOR, ["a", "b"])
    many = fit([one] * 5 + [other], [low] * 5 + [high], PRIOR, ["a"] * 5 + ["b"])
    plain = fit([one] * 5 + [other], [low] * 5 + [high], PRIOR)
    assert many.iteration_s == pytest.approx(even.iteration_s, rel=0.03)
    assert plain.iteration_s < 0.97 * even.iteration_s
