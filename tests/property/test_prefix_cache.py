"""The compiled block pool against a naive one of lists and dictionaries, and jumps with it.

The naive pool keeps its free blocks in a list and the blocks of each content in another, as vLLM's
``BlockPool`` describes them. Only the loop's order of events and the cost of an iteration are those
of the other reference engine.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from simulator.prefix_cache import CONTENT, HOLDERS, NEXT_FREE, PREVIOUS_FREE
from simulator.rules import PREFIX_AWARE, ROUND_ROBIN, ROUTERS, Rules
from simulator.run import Run
from simulator.state import ARRIVAL, FINISH, FIRST_TOKEN
from simulator.timing import in_ps, stages_of
from simulator.workload import Workload
from tests.builders import TICK_S, Case, limits
from tests.property.test_jump import random_cost, same_states
from tests.property.test_reference_engine import NEVER_PS, Request, Server

Content = tuple[str, int, int]


@dataclass
class Pool:
    """Blocks of one replica."""

    free: list[int]
    cached: defaultdict[Content, list[int]] = field(default_factory=lambda: defaultdict(list))
    content: dict[int, Content] = field(default_factory=dict)
    holders: Counter[int] = field(default_factory=Counter)

    def new(self) -> int:
        """Take the first free block and forget what it held."""
        block = self.free.pop(0)
        if block in self.content:
            self.cached[self.content.pop(block)].remove(block)
        self.holders[block] = 1
        return block

    def give_back(self, blocks: list[int]) -> None:
        """Free blocks that nobody else holds, in this order; those without content come first."""
        for block in blocks:
            self.holders[block] -= 1
        mine = [block for block in blocks if self.holders[block] == 0]
        unknown = [block for block in mine if block not in self.content]
        self.free = unknown + self.free + [block for block in mine if block in self.content]


@dataclass(eq=False)
class CachedRequest(Request):
    """A request, the contents of its full blocks, and the blocks that it holds."""

    contents: list[Content] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    found: int = -1


@dataclass(eq=False)
class CachedServer(Server):
    """vLLM V1 with a block pool."""

    pool: Pool = field(default_factory=lambda: Pool([]))

    def hits(self, request: CachedRequest) -> list[int]:
        """Cached blocks from the first on, short of the last known token."""
        blocks = []
        for content in request.contents[: (request.tokens - 1) // self.under.block_tokens]:
            if not self.pool.cached[content]:
                break
            blocks.append(self.pool.cached[content][0])
        return blocks

    def lacks(self, request: Request, tokens: int) -> int:
        """Blocks missing to hold the first ``tokens`` tokens."""
        assert isinstance(request, CachedRequest)
        return -(-tokens // self.under.block_tokens) - len(request.table)

    def allocate(self, request: Request, tokens: int) -> None:
        """Take the blocks that ``tokens`` more need, and cache those that they fill."""
        assert isinstance(request, CachedRequest)
        after = request.computed + tokens
        for _ in range(self.lacks(request, after)):
            request.table.append(self.pool.new())
        for j in range(after // self.under.block_tokens):
            block = request.table[j]
            if block not in self.pool.content:
                self.pool.content[block] = request.contents[j]
                self.pool.cached[request.contents[j]].append(block)
        self.free = len(self.pool.free)

    def release(self, request: Request) -> None:
        """Give all blocks of a request back, the last one first."""
        assert isinstance(request, CachedRequest)
        self.pool.give_back(request.table[::-1])
        request.table = []
        self.free = len(self.pool.free)

    def schedule(self) -> list[tuple[Request, int]]:
        """Running requests as without a cache; the queue with what it finds cached."""
        head, self.waiting = self.waiting, []
        running = len(self.running)
        chosen = super().schedule()  # nobody waits: running requests only
        preempted = len(self.running) < running
        self.waiting += head
        budget = self.under.max_num_batched_tokens - sum(tokens for _, tokens in chosen)
        while not preempted and budget > 0 and len(self.running) < self.under.max_num_seqs:
            if not self.waiting:
                break
            request = self.waiting[0]
            assert isinstance(request, CachedRequest)
            hits = self.hits(request)
            found = len(hits) * self.under.block_tokens
            tokens = min(request.tokens - found, budget)
            must_fit = request.tokens if self.rules.reserve_full_prompt else found + tokens
            idle = [block for block in hits if self.pool.holders[block] == 0]
            if self.lacks(request, must_fit) - len(hits) + len(idle) > self.free:
                break
            for block in hits:
                self.pool.holders[block] += 1
            self.pool.free = [block for block in self.pool.free if block not in idle]
            request.table = hits
            request.computed = found
            if request.found < 0:
                request.found = found
            self.running.append(self.waiting.pop(0))
            self.allocate(request, tokens)
            chosen.append((request, tokens))
            budget -= tokens
        return chosen


def naive_requests(case: Case) -> list[CachedRequest]:
    """Requests with the contents of their full blocks, none of them sent."""
    what, requests = case.workload, []
    for i in range(what.num_requests):
        request = CachedRequest(int(what.prompt_tokens[i]), int(what.output_tokens[i]))
        ids = what.block_ids[what.block_starts[i] : what.block_starts[i + 1]].tolist()
        full = (request.prompt + request.output) // case.limits.block_tokens
        request.contents = [("prompt", block, 0) for block in ids]
        request.contents += [("own", i, j) for j in range(len(ids), full)]
        requests.append(request)
    return requests


class NaiveRun:
    """Clients, router and servers; sends go before batches that end at that instant."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.requests = naive_requests(case)
        self.servers = []
        for _ in range(case.replicas):
            server = CachedServer(case.limits, case.rules, case.cost, case.limits.num_blocks)
            server.pool = Pool(list(range(case.limits.num_blocks)))
            self.servers.append(server)
        self.wake = [NEVER_PS] * case.replicas
        self.outstanding = [0] * case.replicas
        self.told: list[set[Content]] = [set() for _ in self.servers]
        self.routed = 0
        self.sends: list[tuple[int, int]] = []
        known = case.workload.known
        for i, at_ps in zip(known, in_ps(case.workload.arrival_s[known]).tolist(), strict=True):
            self.send(int(i), at_ps)
        self.unsent = list(range(len(known), len(self.requests)))

    def send(self, i: int, at_ps: int) -> None:
        """Let a client send a request."""
        self.requests[i].sent_ps = at_ps
        heapq.heappush(self.sends, (at_ps + self.case.limits.ingress_ps, i))

    def choose(self, i: int) -> int:
        """The router's choice."""
        router, replicas = self.case.rules.router, range(self.case.replicas)
        if router == ROUND_ROBIN:
            return self.routed % len(replicas)
        prompt = [content for content in self.requests[i].contents if content[0] == "prompt"]

        def told(r: int) -> int:
            if router != PREFIX_AWARE:
                return 0
            return next((k for k, c in enumerate(prompt) if c not in self.told[r]), len(prompt))

        chosen = min(replicas, key=lambda r: (-told(r), self.outstanding[r]))
        self.told[chosen].update(prompt)
        return chosen

    def route(self, now_ps: int) -> None:
        """Queue what reaches a scheduler by now."""
        while self.sends and self.sends[0][0] <= now_ps:
            at_ps, i = heapq.heappop(self.sends)
            r = self.choose(i)
            self.routed += 1
            self.outstanding[r] += 1
            self.servers[r].waiting.append(self.requests[i])
            if not self.servers[r].batch:
                self.wake[r] = min(self.wake[r], at_ps)

    def step(self) -> None:
        """What happens next."""
        r = min(range(self.case.replicas), key=lambda k: self.wake[k])
        if self.sends and self.sends[0][0] <= self.wake[r]:
            self.route(self.sends[0][0])
            return
        server, now_ps = self.servers[r], self.wake[r]
        for _ in server.stop():
            self.outstanding[r] -= 1
            if self.case.workload.concurrency and self.unsent:
                self.send(self.unsent.pop(0), now_ps)
        self.route(now_ps)
        server.start(now_ps)
        self.wake[r] = server.end_ps if server.batch else NEVER_PS

    def finish(self) -> None:
        """Go on until every request has its tokens."""
        while any(request.finish_ps == NEVER_PS for request in self.requests):
            self.step()


def prompts_with_ids(rng: np.random.Generator, n: int, block_tokens: int) -> Workload:
    """Prompts from a tree of blocks with few branches; some show only part of their blocks."""
    prompts, outputs = rng.integers(1, 40, n), rng.integers(1, 30, n)
    numbers: dict[tuple[int, int], int] = {}
    ids, starts = [], [0]
    for prompt in prompts.tolist():
        blocks = prompt // block_tokens
        if rng.integers(4) == 0:
            blocks = int(rng.integers(0, blocks + 1))
        above = -1
        for _ in range(blocks):
            above = numbers.setdefault((above, int(rng.integers(8) // 6)), len(numbers))
            ids.append(above)
        starts.append(len(ids))
    kind, arrivals = rng.integers(3), np.zeros(n)
    if kind == 0:
        arrivals = np.cumsum(rng.integers(0, rng.choice([2, 10, 60]), n)) * TICK_S / 4
    return Workload(
        arrivals,
        prompts,
        outputs,
        concurrency=int(rng.integers(1, n + 1)) if kind == 1 else 0,
        block_ids=np.array(ids, np.int64),
        block_starts=np.array(starts, np.int64),
        block_tokens=block_tokens,
    )


def random_case(rng: np.random.Generator) -> Case:
    """Few requests with common prefixes; in most cases blocks are tight."""
    block_tokens = int(rng.choice([1, 2, 4]))
    what = prompts_with_ids(rng, int(rng.integers(1, 14)), block_tokens)
    longest = int((what.prompt_tokens + what.output_tokens).max())
    return Case(
        workload=what,
        replicas=int(rng.integers(1, 4)),
        limits=limits(
            seqs=int(rng.integers(1, 7)),
            tokens=int(rng.integers(7, 50)),
            blocks=-(-longest // block_tokens) + int(rng.choice([0, 1, 3, 10, 300])),
            block_tokens=block_tokens,
            ingress_s=float(rng.choice([0, TICK_S])),
        ),
        cost=random_cost(rng),
        rules=Rules(
            reserve_full_prompt=bool(rng.integers(2)),
            prefix_caching=True,
            router=int(rng.choice([ROUND_ROBIN, ROUTERS.index("shortest_queue"), PREFIX_AWARE])),
        ),
    )


def free_order(run: Run, r: int) -> list[int]:
    """Free blocks of a replica, the next to be taken first."""
    block, order = run.state.pool.block[r], []
    end = len(block) - 1
    at = int(block[end, NEXT_FREE])
    while at != end:
        assert block[block[at, PREVIOUS_FREE], NEXT_FREE] == at
        order.append(at)
        at = int(block[at, NEXT_FREE])
    return order


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_naive_pool_gives_the_same_run(seed: int) -> None:
    """Times, preemptions, tokens found, and in the end the free blocks in order."""
    case = random_case(np.random.default_rng(seed))
    run = Run(case.workload, case.replicas, case.limits, case.cost, case.rules, plain=True)
    result = run.finish()
    naive = NaiveRun(case)
    naive.finish()
    event(f"preemptions: {result.preemptions > 0}, hits: {result.cached_tokens.any()}")
    got = run.state.time_ps[:, [ARRIVAL, FIRST_TOKEN, FINISH]]
    assert got.tolist() == [[one.sent_ps, one.first_ps, one.finish_ps] for one in naive.requests]
    assert result.preempted.tolist() == [one.preemptions for one in naive.requests]
    assert result.cached_tokens.tolist() == [one.found for one in naive.requests]
    for r, server in enumerate(naive.servers):
        assert free_order(run, r) == server.pool.free
        known = run.state.pool.block[r, :-1, CONTENT] >= 0
        assert np.flatnonzero(known).tolist() == sorted(server.pool.content)
        assert not run.state.pool.block[r, :, HOLDERS].any()


def same_pools(one: Run, other: Run) -> None:
    """Two runs have come to the same state, block by block."""
    same_states(one, other)
    for name in ("block", "request", "found", "sent"):
        mine, others = getattr(one.state.pool, name), getattr(other.state.pool, name)
        np.testing.assert_array_equal(mine, others, err_msg=name)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    piece=st.sampled_from([1, 7, 50, 10**8]),
    late=st.booleans(),
    chunked=st.booleans(),
    prompts_per_step=st.sampled_from([0, 0, 1]),
)
def test_jumps_end_in_the_same_state(
    seed: int, piece: int, late: bool, chunked: bool, prompts_per_step: int
) -> None:
    """With every arrival and router, whole or cut prompts, and overlapped scheduling."""
    case = random_case(np.random.default_rng(seed))
    rules = case.rules._replace(
        late_results=late, chunked=chunked, prompts_per_step=prompts_per_step
    )
    under = case.limits
    if not chunked:
        longest = int((case.workload.prompt_tokens + case.workload.output_tokens).max())
        under = under._replace(max_num_batched_tokens=longest + seed % 3)
    what = (case.workload, case.replicas, under, case.cost, rules)
    plain, jump = (Run(*what, plain=flag) for flag in (True, False))
    plain.finish()
    while not jump.advance(piece):
        pass
    same_pools(plain, jump)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stages=st.integers(2, 3), in_flight=st.integers(1, 3))
def test_jumps_agree_on_pipelines(seed: int, stages: int, in_flight: int) -> None:
    """Several stages and batches in flight."""
    case = random_case(np.random.default_rng(seed))
    cost = stages_of([case.cost], [0] * stages, np.arange(257) * TICK_S / 64)
    rules = case.rules._replace(batches_in_flight=in_flight)
    what = (case.workload, case.replicas, case.limits, cost, rules)
    plain, jump = (Run(*what, plain=flag) for flag in (True, False))
    plain.finish()
    jump.finish()
    same_pools(plain, jump)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_cache_without_common_content_or_preemption_changes_nothing(seed: int) -> None:
    """With blocks for all and no known content, every request computes all its tokens."""
    case = random_case(np.random.default_rng(seed))
    none = np.zeros(0, np.int64)
    what = replace(case.workload, block_ids=none, block_starts=none, block_tokens=0)
    under = case.limits._replace(num_blocks=4000)
    runs = [
        Run(what, case.replicas, under, case.cost, case.rules._replace(prefix_caching=caching))
        for caching in (True, False)
    ]
    cached, plain = (run.finish() for run in runs)
    same_states(*runs)
    assert not cached.cached_tokens.any()
    assert cached.trajectory_hash() == plain.trajectory_hash()
