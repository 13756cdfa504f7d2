"""Constants for a cluster that nobody fitted: the stated rule, and never the cluster's own fit."""

from __future__ import annotations

from typing import Final

import pytest

from bench.fit_host import clusters_of
from bench.held_out import Constants, HostFit, constants_for, stored_fits
from bench.names import Release
from bench.runs_csv import Cluster
from tests.unit.test_bench_points import ROW


def _fit(model: str, version: str, *constants: float | None, moe: bool = False) -> HostFit:
    iteration, sequence, ingress, prefill = constants
    assert iteration is not None
    assert sequence is not None
    return HostFit(
        Cluster(model, "H100", "vllm", version),
        Release("vllm", version, version, version, ""),
        9,
        Constants(iteration, sequence, ingress, prefill),
        {},
        moe,
    )


FITS: Final = [
    _fit("a", "0.10.2", 0.4, 0.01, 2.0, 1.0),
    _fit("b", "0.12.0", 1.2, 0.04, 4.0, 1.1),
    _fit("c", "0.15.0", 2.0, 0.07, 9.0, 1.3),
    _fit("d", "0.11.1", 0.2, 0.06, None, None),
    _fit("e", "0.19.0", 0.0, 0.0, 0.0, 1.8, moe=True),
    _fit("f", "0.19.0", 0.0, 0.0, 0.0, 2.2, moe=True),
]


def _for(model: str, version: str, *, is_moe: bool = False) -> Constants:
    cluster = Cluster(model, "H100", "vllm", version)
    release = Release("vllm", version, version, version, "")
    return constants_for(cluster, release, FITS, is_moe=is_moe)


def test_host_time_is_the_nearest_versions() -> None:
    """Of 0.10.2, 0.11.1 and 0.12.0, the middle one is nearest to 0.11.2; others are medians."""
    found = _for("z", "0.11.2")
    assert (found.iteration_ms, found.sequence_ms) == (0.2, 0.06)
    assert (found.ingress_ms, found.prefill_multiplier) == (4.0, 1.1)


def test_a_cluster_never_sees_its_own_fit() -> None:
    """The cluster of 0.12.0 takes 0.11.1's host time, and medians without its own constants."""
    found = _for("b", "0.12.0")
    assert (found.iteration_ms, found.sequence_ms) == (0.2, 0.06)
    assert (found.ingress_ms, found.prefill_multiplier) == (5.5, 1.15)


def test_versions_further_off_give_the_median() -> None:
    """No fit within one minor version: the median of all."""
    assert _for("z", "0.24.0").iteration_ms == pytest.approx(0.8)
    assert _for("z", "1.0.0").sequence_ms == pytest.approx(0.05)


def test_mixtures_of_experts_take_the_prefill_multiplier_of_other_models() -> None:
    """Neither their own model's, nor a dense one's."""
    assert _for("e", "0.24.0", is_moe=True).prefill_multiplier == 2.2
    assert _for("z", "0.24.0", is_moe=True).prefill_multiplier == 2.0
    assert _for("z", "0.24.0").prefill_multiplier == 1.1
    other = Release("sglang", "0.5.9", "0.5.9", "0.5.9", "")
    cluster = Cluster("z", "H100", "sglang", "0.5.9")
    assert constants_for(cluster, other, FITS, is_moe=True).prefill_multiplier == 1.1


def test_no_other_cluster_is_an_error() -> None:
    """A cluster alone cannot be judged by constants that did not see it."""
    cluster = FITS[0].cluster
    with pytest.raises(ValueError, match="no fit of a dense cluster other than"):
        constants_for(cluster, FITS[0].release, FITS[:1], is_moe=False)


def test_the_stored_fits_are_read() -> None:
    """Every dense fit is of a cluster of its own and within the fit's bounds."""
    fits = stored_fits()
    dense = [fit for fit in fits if not fit.is_moe]
    assert len({fit.cluster for fit in fits}) == len(fits)
    assert len(dense) >= 5
    for fit in fits:
        assert fit.runs >= 9
        assert 0.0 <= fit.constants.iteration_ms <= 10.0
        assert fit.constants.host().prefill_multiplier >= 1.0


def test_clusters_are_ordered_and_dense_first() -> None:
    """Rows that are left out, or that cannot be simulated, are in no cluster."""
    rows = [
        {**ROW, "model": "Mixtral 8x7B"},
        {**ROW, "model": "Qwen/Qwen3-8B"},
        ROW,
        {**ROW, "hardware": "MI300X"},
        {**ROW, "scorable": "no"},
        {**ROW, "tpot_ms": "", "ttft_ms": ""},
    ]
    found = clusters_of(rows)
    assert [cluster.model for cluster in found] == [
        "Qwen/Qwen3-8B",
        "meta-llama/Llama-3.1-8B",
        "Mixtral 8x7B",
    ]
    assert all(len(cases) == 1 for cases in found.values())
