"""Hashes of a trace's prompts as ids of an engine's blocks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InputError
from planner.io.block_ids import block_ids_for
from planner.io.trace_file import Hashes
from planner.io.traces import read_trace
from planner.requests import requests_of
from planner.scenario import Scenario

if TYPE_CHECKING:
    from planner.io.traces import RawTrace

SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published traces are not here")


def blocks(
    hashes: list[list[int]], hash_tokens: int, prompts: list[int], block_tokens: int
) -> list[list[int]]:
    """Ids of each prompt, and a check of the arrays they come in."""
    flat = np.array(list(itertools.chain.from_iterable(hashes)), np.int64)
    ids, starts = block_ids_for(
        Hashes(flat, np.array([len(h) for h in hashes])),
        hash_tokens,
        np.array(prompts),
        block_tokens,
    )
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_the_same_size() -> None:
    """Ids count from 0; a last part that is not full has none."""
    assert blocks([[70, 80, 90], [70, 81]], 16, [40, 32], 16) == [[0, 1], [0, 2]]


def test_refined() -> None:
    """A part of 8 tokens is four blocks of 2; of a last part of 5 tokens two are full."""
    found = blocks([[7, 8], [7, 9]], 8, [13, 16], 2)
    assert found == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8, 9]]


def test_coarsened() -> None:
    """Blocks of three parts are equal where all parts up to their end are."""
    found = blocks([[1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 5]], 4, [24, 24, 20], 12)
    assert found == [[0, 1], [2, 3], [0]]


def test_sizes_that_do_not_divide_each_other() -> None:
    """Parts of 4 in blocks of 6: tokens 0-5 need two parts, 6-11 the third as well."""
    assert blocks([[1, 2, 3], [1, 2, 4]], 4, [12, 12], 6) == [[0, 1], [0, 2]]


def test_equal_parts_after_different_ones_differ() -> None:
    """A cached block is found by all tokens before it, not by its own."""
    assert blocks([[5, 5], [6, 5]], 4, [8, 8], 4) == [[0, 1], [2, 3]]


def test_a_prompt_of_unknown_content_has_no_ids() -> None:
    """It shares with nobody; the others keep theirs."""
    assert blocks([[5], [], [5]], 4, [4, 400, 4], 4) == [[0], [], [0]]


def by_dictionary(
    hashes: list[list[int]], hash_tokens: int, prompts: list[int], block_tokens: int
) -> list[list[int]]:
    """The definition, spelt out: a block is all hashes up to its end, and its place."""
    ids: dict[tuple[tuple[int, ...], int], int] = {}
    found = []
    for row, tokens in zip(hashes, prompts, strict=True):
        full = min(tokens, len(row) * hash_tokens) // block_tokens
        parts = [-(-(j + 1) * block_tokens // hash_tokens) for j in range(full)]
        keys = [(tuple(row[:end]), j) for j, end in enumerate(parts)]
        found.append([ids.setdefault(key, len(ids)) for key in keys])
    return found


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1),
    st.integers(1, 7),
    st.integers(1, 20),
)
def test_any_sizes(hashes: list[list[int]], hash_tokens: int, block_tokens: int) -> None:
    """As by the definition, and in order of first appearance, whatever the sizes."""
    # Equal hashes stand for equal tokens, so a part is as long wherever it occurs: full.
    prompts = [len(row) * hash_tokens for row in hashes]
    expected = by_dictionary(hashes, hash_tokens, prompts, block_tokens)
    assert blocks(hashes, hash_tokens, prompts, block_tokens) == expected


def published_trace(name: str) -> RawTrace:
    """A published file with its content."""
    return read_trace(SHARED / name, source=name, content=True)


@published
@pytest.mark.parametrize(
    ("name", "reusable"),
    [
        ("sharegpt-llama-3.1-8b-300-sps10", 1220),
        ("sharegpt-qwen3-30b-a3b-300-sps10", 1278),
        ("sharegpt-qwen3-32b-300-sps10", 1278),
    ],
)
def test_published_blocks_share_what_their_authors_count(name: str, reusable: int) -> None:
    """Blocks at the start of a prompt that an earlier prompt had: the file's own column."""
    trace = published_trace(f"sharegpt_block_hashes/{name}.csv")
    assert trace.hashes is not None
    ids, starts = block_ids_for(trace.hashes, 16, trace.prompt_tokens, 16)
    assert np.diff(starts).tolist() == (trace.prompt_tokens // 16).tolist()
    # A block is old if its id was counted before; an old one never follows a new one.
    newest = np.maximum.accumulate(np.concatenate(([-1], ids)))[:-1]
    assert int((ids <= newest).sum()) == reusable


@published
def test_tokens_and_hashes_of_one_trace_agree() -> None:
    """LLMServingSim's token ids give the blocks that its block hashes say."""
    tokens = published_trace("llmservingsim_sharegpt-llama-3.1-8b-300-sps10.jsonl")
    hashed = published_trace("sharegpt_block_hashes/sharegpt-llama-3.1-8b-300-sps10.csv")
    assert tokens.hashes is not None
    assert hashed.hashes is not None
    assert (tokens.hash_tokens, hashed.hash_tokens) == (1, 16)
    assert tokens.prompt_tokens.tolist() == hashed.prompt_tokens.tolist()
    for block_tokens in (16, 64, 512):
        one = block_ids_for(tokens.hashes, 1, tokens.prompt_tokens, block_tokens)
        other = block_ids_for(hashed.hashes, 16, hashed.prompt_tokens, block_tokens)
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@published
def test_mooncake_in_small_blocks() -> None:
    """Every full block of 16 tokens has an id; whole parts are 32 of them."""
    trace = published_trace("mooncake_conversation_trace.jsonl")
    assert trace.hashes is not None
    ids, starts = block_ids_for(trace.hashes, 512, trace.prompt_tokens, 16)
    assert np.diff(starts).tolist() == (trace.prompt_tokens // 16).tolist()
    first = np.unique(ids, return_index=True)[1]
    assert (np.diff(first) > 0).all()
    # The first two requests begin with the same part of 512 tokens, and share no more.
    one, two = ids[starts[0] : starts[1]], ids[starts[1] : starts[2]]
    assert one[:32].tolist() == two[:32].tolist()
    assert not set(one[32:]) & set(two)


def scenario(tmp_path: Path, text: str) -> Scenario:
    """A scenario on a trace of this text."""
    (tmp_path / "t.jsonl").write_text(text)
    fields = {
        "schema_version": 1,
        "model": {"config": "Qwen/Qwen3-8B"},
        "cluster": {"pools": [{"device": "H100-SXM-80GB", "nodes": 1, "devices_per_node": 1}]},
        "engine": {"name": "vllm", "version": "0.24.0"},
        "objective": {"minimize": "mean_e2e"},
        "workload": {"trace": "t.jsonl"},
    }
    return Scenario.model_validate(fields, base_dir=tmp_path)


MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [3, 4]}\n'
    '{"timestamp": 1, "input_length": 600, "output_length": 0, "hash_ids": [8, 9]}\n'
    '{"timestamp": 2, "input_length": 520, "output_length": 5, "hash_ids": [3, 7]}\n'
)


def test_a_trace_gives_its_blocks_to_the_workload(tmp_path: Path) -> None:
    """At the engine's block size, without the row that was skipped; not where nothing shares."""
    work, *_ = requests_of(scenario(tmp_path, MOONCAKE), 4096, 256)
    assert work.block_tokens == 256
    assert work.block_ids.tolist() == [0, 1, 0, 1]
    assert work.block_starts.tolist() == [0, 2, 4]
    plain, *_ = requests_of(scenario(tmp_path, MOONCAKE), 4096)
    assert (plain.block_tokens, len(plain.block_ids), len(plain.block_starts)) == (0, 0, 0)
    without = MOONCAKE.replace("hash_ids", "ids")
    other, *_ = requests_of(scenario(tmp_path, without), 4096, 256)
    assert (other.block_tokens, len(other.block_ids)) == (0, 0)


def test_too_much_content_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both limits say what to set; a number of requests that stays below them is fine."""
    monkeypatch.setattr("simulator.ragged.MAX_IDS", 3)
    with pytest.raises(InputError) as caught:
        requests_of(scenario(tmp_path, MOONCAKE), 4096, 256)
    rule = "4 blocks of prompts are above 3: set a lower workload.num_requests"
    assert str(caught.value) == f"t.jsonl: {rule}"
    monkeypatch.setattr("planner.io.traces.MAX_HASHES", 3)
    path = tmp_path / "t.jsonl"
    with pytest.raises(InputError, match=r"^t: has more than 3 content hashes, .*num_requests"):
        read_trace(path, source="t", content=True)
    assert len(read_trace(path, source="t", content=True, num_requests=1)) == 1


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ("[3]", "has 1 entries; 600 prompt tokens have 2 parts of 512"),
        ("[3, 4, 5]", "has 3 entries; 600 prompt tokens have 2 parts of 512"),
        ("5", "must be a list of whole numbers"),
        ('["3", "4"]', "must be a list of whole numbers below 2**63"),
        ("[3, 4.0]", "must be a list of whole numbers below 2**63"),
        ("[true, 4]", "must be a list of whole numbers below 2**63"),
        (f"[3, {2**63}]", "must be a list of whole numbers below 2**63"),
    ],
)
def test_bad_hashes(tmp_path: Path, hashes: str, message: str) -> None:
    """One line with the place; a reader that does not need them does not look."""
    path = tmp_path / "t.jsonl"
    path.write_text(MOONCAKE.replace("[8, 9]", hashes))
    with pytest.raises(InputError) as caught:
        read_trace(path, source="t", content=True)
    assert str(caught.value) == f"t: line 2, hash_ids: {message}"
    assert len(read_trace(path, source="t")) == 2


HEADER = (
    "request,arrival_s,input_tokens,output_tokens,input_full_blocks,"
    "reusable_blocks_infinite_cache,block16_hash_ids_input_then_output\n"
)


def test_a_csv_of_blocks(tmp_path: Path) -> None:
    """Blocks of the answer, and the one that prompt and answer share, are left out."""
    path = tmp_path / "t.csv"
    path.write_text(f"{HEADER}0,0.5,40,30,2,0,7 8 9 10\n1,1.5,16,1,1,1,7\n2,2,5,1,0,0,\n")
    trace = read_trace(path, source="t", content=True)
    assert (trace.format, trace.hash_tokens) == ("block_hashes", 16)
    assert trace.arrival_s.tolist() == [0.0, 1.0, 1.5]
    assert trace.hashes is not None
    assert trace.hashes.ids.tolist() == [7, 8, 7]
    assert trace.hashes.counts.tolist() == [2, 1, 0]
    for cells, message in (
        ("40,30,2,0,7", "'7' has 1 ids; 40 prompt tokens have 2 blocks"),
        ("40,30,2,0,7 -8 9", "'7 -8 9' must be whole numbers below 1e18 with spaces between"),
    ):
        path.write_text(f"{HEADER}0,0.5,{cells}\n")
        with pytest.raises(InputError) as caught:
            read_trace(path, source="t", content=True)
        where = "line 2, block16_hash_ids_input_then_output"
        assert str(caught.value) == f"t: {where}: {message}"
