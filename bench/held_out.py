"""Host constants for a cluster from fits of clusters other than it.

A cluster is a model, device, engine and version. ``bench/host_fits.json`` holds the constants
fitted to each cluster of the development file (`bench.fit_host`). The rule:

- host time per step and per sequence belong to an engine version's loop: they are those of the
  nearest other dense cluster of the same engine, if its minor version differs by one at most, and
  else the median over all other dense clusters;
- ingress and the prefill multiplier belong to server and kernels: the median over all other dense
  clusters;
- the prefill multiplier of a mixture of experts, whose kernel times are further off, is the median
  over other such models on the same engine, if there are any. Across engines it does not hold:
  offline runs of Mixtral on TensorRT-LLM 0.14 come out 25 % slow with that of vLLM and SGLang.

Compared on the development file, TPOT of its five dense clusters with both latencies: the median of
all others for every constant leaves 6.7 % (3.4 to 11.7), their mean 6.9 % (3.3 to 13.1), the median
of the same engine's others 6.5 % (5.0 to 8.2) but 23 % in TTFT, this rule 5.9 % (5.0 to 7.8).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from bench.names import Release, version_key
from bench.runs_csv import Cluster
from simulator.engine_rules import HostConstants
from simulator.units import S_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FITS: Final = Path(__file__).with_name("host_fits.json")


class Constants(NamedTuple):
    """The host constants that are fitted, in milliseconds, and the prefill factor.

    ``None`` where the runs tell nothing of a constant.
    """

    iteration_ms: float
    sequence_ms: float
    ingress_ms: float | None
    prefill_multiplier: float | None

    def host(self) -> HostConstants:
        """As the simulator takes them; what is not known has no effect."""
        return HostConstants(
            iteration_s=self.iteration_ms * S_PER_MS,
            sequence_s=self.sequence_ms * S_PER_MS,
            ingress_s=(self.ingress_ms or 0.0) * S_PER_MS,
            prefill_multiplier=self.prefill_multiplier or 1.0,
        )


_CONSTANTS: Final = len(Constants._fields)


@dataclass(frozen=True)
class HostFit:
    """One cluster's fit.

    Parameters
    ----------
    cluster, release
        What was fitted, and the profile that it ran on.
    runs
        Measured runs that it was fitted to.
    constants
        What fits best.
    mean_abs_pct
        Error left, by metric, percent.
    is_moe
        Whether its model has experts; then only the prefill multiplier was fitted.

    """

    cluster: Cluster
    release: Release
    runs: int
    constants: Constants
    mean_abs_pct: dict[str, float]
    is_moe: bool = False


def constants_for(
    cluster: Cluster, release: Release, fits: Sequence[HostFit], *, is_moe: bool
) -> Constants:
    """Constants for ``cluster``, which none of them was fitted on.

    Parameters
    ----------
    cluster, release
        The cluster to be judged, and its engine version.
    fits
        Fits to choose from.
    is_moe
        Whether its model has experts.

    Raises
    ------
    ValueError
        If there is no other dense cluster.

    """
    donors = [fit for fit in fits if fit.cluster != cluster and not fit.is_moe]
    if not donors:
        raise ValueError(f"no fit of a dense cluster other than {cluster.label}")
    median = Constants(*(_median([d.constants[i] for d in donors]) for i in range(_CONSTANTS)))
    near = [donor for donor in donors if _distance(donor.release, release) is not None]
    if near:
        step = min(near, key=lambda donor: (_distance(donor.release, release), donor.cluster))
        median = median._replace(
            iteration_ms=step.constants.iteration_ms, sequence_ms=step.constants.sequence_ms
        )
    alike = [
        fit
        for fit in fits
        if fit.is_moe
        and fit.cluster.model != cluster.model
        and fit.release.engine == release.engine
    ]
    if is_moe and alike:
        prefill = _median([fit.constants.prefill_multiplier for fit in alike])
        median = median._replace(prefill_multiplier=prefill)
    return median


def _median(values: Iterable[float | None]) -> float:
    return float(np.median([value for value in values if value is not None]))


def _distance(one: Release, other: Release) -> tuple[int, ...] | None:
    """How far apart two versions of an engine are, part by part; ``None``: too far, or another."""
    if one.engine != other.engine:
        return None
    first, second = (_parts(release.number) for release in (one, other))
    if first[0] != second[0] or abs(first[1] - second[1]) > 1:
        return None
    return tuple(abs(a - b) for a, b in zip(first[1:], second[1:], strict=True))


def _parts(number: str) -> tuple[int, int, int]:
    """Major, minor and patch."""
    major, minor, patch = (*version_key(number)[0], 0, 0, 0)[:3]
    return major, minor, patch


@lru_cache(maxsize=1)
def stored_fits() -> tuple[HostFit, ...]:
    """The fits of ``bench/host_fits.json``."""
    data = json.loads(FITS.read_text(encoding="utf-8"))
    return tuple(
        HostFit(
            Cluster(**entry["cluster"]),
            Release(**entry["release"]),
            entry["runs"],
            Constants(*entry["constants"]),
            entry["mean_abs_pct"],
            entry.get("is_moe", False),
        )
        for entry in data
    )
