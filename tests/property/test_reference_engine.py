"""The compiled engine against a naive one of objects and lists.

The naive engine follows the description of vLLM's V1 scheduler step by step and shares nothing
with the compiled one but the cost of an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import event, given, settings

from simulator.run import Run
from simulator.timing import iteration_s
from tests.builders import cases

if TYPE_CHECKING:
    from simulator.state import Limits
    from simulator.timing import IterationCost
    from simulator.workload import Workload
    from tests.builders import Case


@dataclass(eq=False)
class Request:
    """A request and what has become of it."""

    prompt: int
    output: int
    sent_s: float = np.inf
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    preemptions: int = 0
    first_s: float = np.inf
    finish_s: float = np.inf

    @property
    def tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""
        return self.prompt + self.generated


@dataclass(eq=False)
class Server:
    """One replica: its queues, its free blocks and the batch that it computes."""

    under: Limits
    cost: IterationCost
    free: int
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    batch: list[tuple[Request, int]] = field(default_factory=list)
    now_s: float = 0.0
    end_s: float = np.inf

    def next_event_s(self) -> float:
        """End of the batch, or the moment at which the head of the queue gets in."""
        if self.batch:
            return self.end_s
        return self.waiting[0].sent_s + self.under.ingress_s if self.waiting else np.inf

    def lacks(self, request: Request, tokens: int) -> int:
        """Blocks missing to hold the first ``tokens`` tokens."""
        return -(-tokens // self.under.block_tokens) - request.blocks

    def allocate(self, request: Request, tokens: int) -> None:
        """Take the blocks that ``tokens`` more need."""
        missing = self.lacks(request, request.computed + tokens)
        assert missing <= self.free
        request.blocks += missing
        self.free -= missing

    def release(self, request: Request) -> None:
        """Give all blocks of a request back."""
        self.free += request.blocks
        request.blocks = 0

    def schedule(self) -> list[tuple[Request, int]]:
        """Running requests in order, then the queue, under one token budget."""
        budget, chosen, preempted = self.under.max_num_batched_tokens, [], False
        for request in list(self.running):
            if request not in self.running or budget == 0:
                continue
            tokens = min(request.tokens - request.computed, budget)
            while self.lacks(request, request.computed + tokens) > self.free:
                victim = self.running.pop()
                self.release(victim)
                victim.computed = 0
                victim.preemptions += 1
                self.waiting.insert(0, victim)
                preempted = True
                if victim is request:
                    break
            if request in self.running:
                self.allocate(request, tokens)
                chosen.append((request, tokens))
                budget -= tokens
        while not preempted and budget > 0 and len(self.running) < self.under.max_num_seqs:
            if not self.waiting or self.waiting[0].sent_s + self.under.ingress_s > self.now_s:
                break
            head = self.waiting[0]
            tokens = min(head.tokens, budget)
            must_fit = head.tokens if self.under.reserve_full_prompt else tokens
            if self.lacks(head, must_fit) > self.free:
                break
            self.running.append(self.waiting.pop(0))
            self.allocate(head, tokens)
            chosen.append((head, tokens))
            budget -= tokens
        return chosen

    def start(self, now_s: float) -> None:
        """Form a batch and time it; without work the server idles."""
        self.now_s = now_s
        self.batch = self.schedule()
        if not self.batch:
            return
        # A single token whose prompt lies behind it is a decode; all else counts as prompt.
        decodes = [r for r, n in self.batch if n == 1 and r.computed >= r.prompt]
        prompts = [(r.computed, n) for r, n in self.batch if n > 1 or r.computed < r.prompt]
        prefill_s = self.cost.prefill_s
        self.end_s = now_s + iteration_s(
            self.cost,
            sum(n for _, n in self.batch),
            len(decodes),
            sum(r.computed + 1 for r in decodes),
            float(sum(prefill_s[done + n] - prefill_s[done] for done, n in prompts)),
            sum(r.computed + n == r.tokens for r, n in self.batch),
            bool(prompts),
        )
        for request, tokens in self.batch:
            request.computed += tokens

    def stop(self) -> list[Request]:
        """End the batch: emit tokens where all known tokens are computed; who has finished."""
        done = []
        for request, _ in self.batch:
            if request.computed < request.tokens:
                continue
            request.generated += 1
            request.first_s = min(request.first_s, self.end_s)
            if request.generated == request.output:
                request.finish_s = self.end_s
                self.running.remove(request)
                self.release(request)
                done.append(request)
        self.batch = []
        return done


def naive_run(what: Workload, replicas: int, under: Limits, cost: IterationCost) -> list[Request]:
    """All requests after a run; the lower replica acts first where events coincide."""
    lengths = zip(what.prompt_tokens.tolist(), what.output_tokens.tolist(), strict=True)
    requests = [Request(prompt, output) for prompt, output in lengths]
    servers = [Server(under, cost, under.num_blocks) for _ in range(replicas)]
    unsent = list(enumerate(requests))

    def send(at_s: float) -> None:
        if unsent:
            i, request = unsent.pop(0)
            request.sent_s = at_s
            servers[i % replicas].waiting.append(request)

    for arrival_s in what.arrival_s[: what.known_arrivals].tolist():
        send(arrival_s)
    while any(request.finish_s == np.inf for request in requests):
        server = min(servers, key=Server.next_event_s)  # the first of equals
        now_s = server.next_event_s()
        for _ in server.stop():
            if what.concurrency:
                send(now_s)
        server.start(now_s)
    return requests


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_the_naive_engine_gives_the_same_times(case: Case) -> None:
    """Send, first token, finish and preemption count of every request agree with the naive run."""
    run = Run(case.workload, case.replicas, case.limits, case.cost)
    result = run.finish()
    naive = naive_run(case.workload, case.replicas, case.limits, case.cost)
    event(f"preemptions: {min(result.preemptions, 3)}")
    got = np.column_stack([result.arrival_s, result.first_token_s, result.finish_s])
    expected = np.array([[one.sent_s, one.first_s, one.finish_s] for one in naive])
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert result.preemptions == sum(one.preemptions for one in naive)
