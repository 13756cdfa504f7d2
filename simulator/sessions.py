"""Sessions of several turns: each prompt is all that was said before and some new tokens.

A turn is sent when the one before it has finished and its reader has thought. What the model
answered is part of the next prompt, token by token, so a prefix cache that still holds a session
finds all full blocks of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.ragged import runs, starts_of

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

TURNS: Final = 4
THINKING: Final = 5
"""Streams of a seed, beside those of ``simulator.arrivals``."""

FIXED, EXPONENTIAL, LOGNORMAL = "fixed", "exponential", "lognormal"
"""Distributions of a think time."""


@dataclass(frozen=True)
class Sessions:
    """Turns of all sessions: first turns by start, then second ones in the same order, and so on.

    Parameters
    ----------
    arrival_s
        (N,) starts of the sessions, seconds; 0 for later turns, which the run decides.
    prompt_tokens, output_tokens
        (N,) lengths; a prompt is the prompt and output before it and the turn's new tokens.
    after
        (N,) the turn before, -1 for a first one.
    think_s
        (N,) from that turn's last token to the send; 0 for a first one.
    session
        (N,) session of each turn, counted by start.
    dropped
        Turns that were left out because the history before them fills the context.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    after: Ints
    think_s: Floats
    session: Ints
    dropped: int


def geometric_turns(sessions: int, mean: float, rng: np.random.Generator) -> Ints:
    """Turns per session, geometrically distributed from 1 on: each turn is as likely the last."""
    return rng.geometric(1 / mean, sessions).astype(np.int64)


def think_times_s(
    turns: int, mean_s: float, distribution: str, cv: float, rng: np.random.Generator
) -> Floats:
    """Think times of ``turns`` turns, seconds.

    Parameters
    ----------
    turns, rng
        How many to draw, and from what.
    mean_s
        Mean, seconds.
    distribution
        ``FIXED``, ``EXPONENTIAL`` or ``LOGNORMAL``.
    cv
        Coefficient of variation of the lognormal one: ``sigma**2 = ln(1 + cv**2)``,
        ``mu = ln(mean_s) - sigma**2 / 2``.
    """
    if distribution == FIXED or mean_s == 0:
        return np.full(turns, mean_s)
    if distribution == EXPONENTIAL:
        return rng.exponential(mean_s, turns)
    variance = math.log1p(cv**2)
    return rng.lognormal(math.log(mean_s) - variance / 2, math.sqrt(variance), turns)


def turns_of(turns: Ints, num_requests: int) -> Ints:
    """Turns of the first sessions that hold ``num_requests`` turns; the last one's may be cut."""
    end = np.cumsum(turns)
    sessions = int(np.searchsorted(end, num_requests)) + 1
    kept = turns[:sessions].copy()
    kept[-1] -= max(0, int(end[sessions - 1]) - num_requests)
    return kept


def build_sessions(
    turns: Ints,
    start_s: Floats,
    new_tokens: Ints,
    output_tokens: Ints,
    think_s: Floats,
    max_model_len: int,
) -> Sessions:
    """Put sessions together from their parts.

    A session ends before the first turn whose prompt leaves no room for a token in the context.

    Parameters
    ----------
    turns
        (S,) turns of each session, at least 1.
    start_s
        (S,) when each starts, ascending.
    new_tokens, output_tokens, think_s
        (T,) of every turn, session after session; the first think time of each is not used.
    max_model_len
        The context, tokens.

    Raises
    ------
    ValueError
        When the first prompt of a session leaves no room in the context.
    """
    session = np.repeat(np.arange(len(turns)), turns)
    begin = np.cumsum(turns) - turns
    turn = np.arange(len(session)) - begin[session]
    said = np.cumsum(new_tokens + output_tokens)
    before = said - new_tokens - output_tokens  # of all sessions so far
    prompt = before - before[begin][session] + new_tokens
    kept = prompt < max_model_len  # and no turn after one that is not: prompts only grow
    if not kept[begin].all():
        number = int(np.argmin(kept[begin]))
        raise ValueError(f"the first prompt of session {number + 1} fills the context")
    # By turn; a stable sort keeps the order of the sessions in each.
    order = np.flatnonzero(kept)
    order = order[np.argsort(turn[order], kind="stable")]
    place = np.full(len(session), -1)
    place[order] = np.arange(len(order))
    is_first = turn[order] == 0
    return Sessions(
        arrival_s=np.where(is_first, start_s[session[order]], 0.0),
        prompt_tokens=prompt[order],
        output_tokens=output_tokens[order],
        after=np.where(is_first, -1, place[order - 1]),
        think_s=np.where(is_first, 0.0, think_s[order]),
        session=session[order],
        dropped=len(session) - len(order),
    )


def session_block_ids(sessions: Sessions, block_tokens: int) -> tuple[Ints, Ints]:
    """Content ids of the full blocks of every prompt, and where each prompt's begin.

    Blocks of one session's history have equal ids in all its turns; no two sessions share any.

    Returns
    -------
    ids, starts
        (M,) ids from 0 to K - 1 in order of first appearance, one prompt after another; (N + 1,).

    Raises
    ------
    ValueError
        When there would be more than ``simulator.ragged.MAX_IDS``.
    """
    blocks = sessions.prompt_tokens // block_tokens
    old = np.where(sessions.after < 0, 0, blocks[sessions.after])
    # A table of every session's blocks; each turn fills in the ids that it is the first to need.
    longest = np.zeros(int(sessions.session.max()) + 1, np.int64)
    np.maximum.at(longest, sessions.session, blocks)
    base = starts_of(longest)[sessions.session]
    table = np.empty(int(longest.sum()), np.int64)
    table[runs(base + old, blocks - old)] = np.arange(len(table))
    return table[runs(base, blocks)], starts_of(blocks)
