"""Arrival processes beyond Poisson, and lengths with a long tail, each drawn from a seed.

Every draw uses numpy's PCG64 and a stream of its own (``SeedSequence`` spawn keys), so that gaps
and lengths of one seed are independent. numpy keeps PCG64's bits the same everywhere; logarithms
in the last place are the platform's, so two platforms agree to about 1e-15 of a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Draw = Callable[[np.random.Generator, int], Floats]

ARRIVALS: Final = 1
PROMPTS: Final = 2
OUTPUTS: Final = 3
"""Streams of one seed."""

_MAX_TOKENS: Final = 2**31 - 1
"""Longest length drawn, tokens: what the simulator's 32-bit fields can hold."""


@dataclass(frozen=True)
class RateWindows:
    """A client's arrivals described window by window, as ServeGen does.

    Parameters
    ----------
    start_s, end_s
        Ends of each window, seconds; a window ends where the next starts.
    rate
        Mean arrivals per second in each; 0: none.
    is_weibull
        Whether gaps are Weibull distributed; otherwise Gamma.
    shape
        Shape of that distribution.

    """

    start_s: tuple[float, ...]
    end_s: tuple[float, ...]
    rate: tuple[float, ...]
    is_weibull: tuple[bool, ...]
    shape: tuple[float, ...]

    @property
    def mean_requests(self) -> float:
        """Expected number of arrivals."""
        windows = zip(self.start_s, self.end_s, self.rate, strict=True)
        return math.fsum((end - start) * rate for start, end, rate in windows)


def generator(seed: int, stream: int) -> np.random.Generator:
    """Random numbers of one stream of ``seed``."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,))))


def gamma_arrivals_s(num_requests: int, request_rate: float, cv: float, seed: int) -> Floats:
    """Arrivals whose gaps are Gamma distributed, first at 0.

    Parameters
    ----------
    num_requests, seed
        How many to draw, and the seed of the draw.
    request_rate
        Mean arrivals per second; the mean over few requests of a large ``cv`` strays from it.
    cv
        Coefficient of variation of the gaps: 1 is Poisson, above it bursts.

    """
    gaps = _gamma_gaps(1 / cv**2)(generator(seed, ARRIVALS), num_requests)
    return _from_gaps(gaps / request_rate)


def weibull_arrivals_s(num_requests: int, request_rate: float, shape: float, seed: int) -> Floats:
    """Arrivals whose gaps are Weibull distributed, first at 0; a ``shape`` of 1 is Poisson."""
    gaps = _weibull_gaps(shape)(generator(seed, ARRIVALS), num_requests)
    return _from_gaps(gaps / request_rate)


def diurnal_arrivals_s(
    num_requests: int, request_rate: float, amplitude: float, period_s: float, seed: int
) -> Floats:
    """Arrivals at the rate ``request_rate * (1 + amplitude * sin(2 pi t / period_s))``.

    A Poisson process at the peak rate, thinned to the rate of the moment (Lewis and Shedler,
    "Simulation of nonhomogeneous Poisson processes by thinning", 1979). Time starts at the
    rising mean, and the first arrival keeps its distance from there.

    Parameters
    ----------
    num_requests, seed
        How many to draw, and the seed of the draw.
    request_rate
        Mean arrivals per second over whole periods.
    amplitude
        Swing of the rate over its mean, from 0 to 1.
    period_s
        Time from one peak to the next, seconds.

    """
    rng = generator(seed, ARRIVALS)
    peak = request_rate * (1 + amplitude)
    parts: list[Floats] = []
    drawn, now_s = 0, 0.0
    while drawn < num_requests:
        # Half again the number that is missing: most runs need two rounds.
        candidates = int(1.5 * (num_requests - drawn)) + 16
        times = now_s + np.cumsum(rng.exponential(1 / peak, candidates))
        rate = request_rate * (1 + amplitude * np.sin(2 * np.pi * times / period_s))
        kept = times[rng.random(candidates) * peak < rate]
        parts.append(kept)
        drawn, now_s = drawn + len(kept), float(times[-1])
    return np.concatenate(parts)[:num_requests]


def windowed_arrivals_s(windows: RateWindows, num_requests: int | None, seed: int) -> Floats:
    """Arrivals that follow the rates and burstiness of ``windows``, first at 0.

    Gaps are drawn with mean 1 in a time that runs at the rate of the moment, each with the shape
    of the window that it starts in. So every window expects its rate times its length, and a gap
    may cross into the next one.

    Parameters
    ----------
    windows
        The client, as :func:`planner.io.trace_rates.read_rates` gives it.
    num_requests
        Keep this many from the start; ``None``: all.
    seed
        Seed of the draw.

    Returns
    -------
    ndarray
        Arrivals, seconds; fewer than ``num_requests`` where the windows end before.

    """
    rng = generator(seed, ARRIVALS)
    parts: list[Floats] = []
    drawn, left = 0, 0.0  # left: what remains of the gap that crossed into this window, in units
    columns = (windows.start_s, windows.end_s, windows.rate, windows.is_weibull, windows.shape)
    for start_s, end_s, rate, is_weibull, shape in zip(*columns, strict=True):
        units = rate * (end_s - start_s)
        if left >= units:
            left -= units
            continue
        draw = _weibull_gaps(shape) if is_weibull else _gamma_gaps(shape)
        places = _fill(left, units, draw, rng)
        inside = places[places < units]
        left = float(places[len(inside)]) - units
        parts.append(start_s + inside / rate)
        drawn += len(inside)
        if num_requests is not None and drawn >= num_requests:
            break
    arrivals = np.concatenate(parts)[:num_requests] if parts else np.empty(0)
    # A window's last arrival may round beyond the next one's first.
    return np.asarray(np.maximum.accumulate(arrivals - arrivals[:1]))


def lognormal_lengths(
    num_requests: int, mean: float, cv: float, longest: int | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Lengths drawn from a lognormal distribution and rounded, at least 1, tokens.

    Parameters
    ----------
    num_requests, rng
        How many to draw, and from what.
    mean, cv
        Mean, tokens, and coefficient of variation before rounding and cutting:
        ``sigma**2 = ln(1 + cv**2)``, ``mu = ln(mean) - sigma**2 / 2``.
    longest
        Longer draws become this, which lowers the mean; ``None``: no limit but 2**31 - 1.

    """
    variance = math.log1p(cv**2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), num_requests)
    return np.clip(np.rint(drawn), 1, longest or _MAX_TOKENS).astype(np.int64)


def _gamma_gaps(shape: float) -> Draw:
    """What draws Gamma gaps of mean 1."""
    return lambda rng, count: rng.standard_gamma(shape, count) / shape


def _weibull_gaps(shape: float) -> Draw:
    """What draws Weibull gaps of mean 1."""
    return lambda rng, count: rng.weibull(shape, count) / math.gamma(1 + 1 / shape)


def _from_gaps(gaps_s: Floats) -> Floats:
    gaps_s[0] = 0.0
    return np.cumsum(gaps_s)


def _fill(first: float, end: float, draw: Draw, rng: np.random.Generator) -> Floats:
    """Places from ``first`` on, ``draw``'s gaps apart, up to one beyond ``end``."""
    places = np.array([first])
    while places[-1] < end:
        more = draw(rng, int(end - places[-1]) + 16)
        places = np.concatenate((places, places[-1] + np.cumsum(more)))
    return places
