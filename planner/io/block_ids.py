"""Hashes that a trace gives for parts of its prompts, as ids of an engine's KV blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.ragged import runs, starts_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from planner.io.trace_file import Hashes

    Ints = NDArray[np.int64]


def block_ids_for(
    hashes: Hashes, hash_tokens: int, prompt_tokens: Ints, block_tokens: int
) -> tuple[Ints, Ints]:
    """Ids of the full blocks of every prompt, from hashes of its parts.

    Two ids are equal where all hashes up to the end of the block are: the same tokens, and the
    same before them. So it does not matter whether a file's hashes stand for a part alone or for
    all of the prompt up to it. A block smaller than a part gets one id per place in the part, a
    larger one the id of all parts that it touches, and sizes need not divide each other. What is
    shared less than a whole part is not seen: of Mooncake's 512 tokens, up to 511.

    Parameters
    ----------
    hashes
        Hashes of the prompts' parts; a prompt without any gets no ids.
    hash_tokens
        Tokens of one part; the last of a prompt may have fewer.
    prompt_tokens
        (N,) lengths, tokens.
    block_tokens
        Tokens of one of the engine's blocks. A prompt's last block has no id if it is not full.

    Returns
    -------
    ids, starts
        (M,) ids from 0 to K - 1 in order of first appearance, one prompt after another; (N + 1,)
        where each prompt's begin. At 16 tokens for Mooncake's conversation trace (12,031
        prompts, 9.0 million ids): 0.2 s.

    Raises
    ------
    ValueError
        When there would be more than ``simulator.ragged.MAX_IDS``.
    """
    known_tokens = np.minimum(prompt_tokens, hashes.counts * hash_tokens)
    starts = starts_of(known_tokens // block_tokens)
    chain = _chained(hashes)
    # Block j of a prompt belongs to the part that its last token is in; `through` is how many
    # blocks of the prompt end by the end of each part.
    place = np.arange(len(chain)) - np.repeat(starts_of(hashes.counts)[:-1], hashes.counts)
    known = np.repeat(known_tokens, hashes.counts)
    through = np.minimum((place + 1) * hash_tokens, known) // block_tokens
    blocks = through - place * hash_tokens // block_tokens
    # A chain's parts have as many blocks wherever they occur, but for a last one that is cut.
    width = np.zeros(int(chain.max(initial=-1)) + 1, np.int64)
    np.maximum.at(width, chain, blocks)
    first = starts_of(width)[chain]
    return runs(first, blocks), starts


def _chained(hashes: Hashes) -> Ints:
    """An id for each hash and all before it in its prompt, in order of first appearance.

    All prompts' first parts are numbered, then their second ones by number of the first and own
    hash, and so on: numpy's sort in place of a dictionary, whose entries take 100 bytes and more.
    """
    own, distinct = _dense(hashes.ids)
    begin = starts_of(hashes.counts)[:-1]
    by_length = np.argsort(-hashes.counts, kind="stable")
    lengths = -hashes.counts[by_length]  # ascending
    chain = np.empty(len(own), np.int64)
    number = 0
    for depth in range(int(hashes.counts.max(initial=0))):
        at = begin[by_length[: np.searchsorted(lengths, -depth)]] + depth
        # Both factors are below 2**24 (MAX_HASHES), so the pair fits.
        before = chain[at - 1] if depth else np.zeros(len(at), np.int64)
        pairs, count = _dense(before * distinct + own[at])
        chain[at] = pairs + number
        number += count
    return _in_order(chain)


def _dense(values: Ints) -> tuple[Ints, int]:
    """``values`` as numbers from 0, and how many are distinct."""
    distinct, number = np.unique(values, return_inverse=True)
    return number.reshape(-1).astype(np.int64), len(distinct)


def _in_order(numbers: Ints) -> Ints:
    """Numbers from 0 up, renumbered in order of first appearance."""
    first = np.unique(numbers, return_index=True)[1]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[numbers]
