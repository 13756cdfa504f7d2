"""The compiled engine against a naive one of objects and lists.

The naive engine follows the description of vLLM's V1 scheduler step by step and shares nothing
with the compiled one but the cost of an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import event, given, settings

from simulator.state import ARRIVAL, FINISH, FIRST_TOKEN
from simulator.timing import iteration_ps
from tests.builders import cases

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits
    from simulator.timing import IterationCost
    from tests.builders import Case

NEVER_PS = 2**63 - 1


@dataclass(eq=False)
class Request:
    """A request and what has become of it."""

    prompt: int
    output: int
    sent_ps: int = NEVER_PS
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    preemptions: int = 0
    first_ps: int = NEVER_PS
    finish_ps: int = NEVER_PS

    @property
    def tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""
        return self.prompt + self.generated


@dataclass(eq=False)
class Server:
    """One replica: its queues, its free blocks and the batch that it computes."""

    under: Limits
    rules: Rules
    cost: IterationCost
    free: int
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    batch: list[tuple[Request, int]] = field(default_factory=list)
    now_ps: int = 0
    end_ps: int = NEVER_PS

    def next_event_ps(self) -> int:
        """End of the batch, or the moment at which the head of the queue gets in."""
        if self.batch:
            return self.end_ps
        return self.waiting[0].sent_ps + self.under.ingress_ps if self.waiting else NEVER_PS

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
            if not self.waiting or self.waiting[0].sent_ps + self.under.ingress_ps > self.now_ps:
                break
            head = self.waiting[0]
            tokens = min(head.tokens, budget)
            must_fit = head.tokens if self.rules.reserve_full_prompt else tokens
            if self.lacks(head, must_fit) > self.free:
                break
            self.running.append(self.waiting.pop(0))
            self.allocate(head, tokens)
            chosen.append((head, tokens))
            budget -= tokens
        return chosen

    def start(self, now_ps: int) -> None:
        """Form a batch and time it; without work the server idles."""
        self.now_ps = now_ps
        self.batch = self.schedule()
        if not self.batch:
            return
        # A single token whose prompt lies behind it is a decode; all else counts as prompt.
        decodes = [r for r, n in self.batch if n == 1 and r.computed >= r.prompt]
        prompts = [(r.computed, n) for r, n in self.batch if n > 1 or r.computed < r.prompt]
        prefill_ps = self.cost.prefill_ps[0]
        self.end_ps = now_ps + iteration_ps(
            self.cost,
            0,
            sum(n for _, n in self.batch),
            len(decodes),
            sum(r.computed + 1 for r in decodes),
            int(sum(prefill_ps[done + n] - prefill_ps[done] for done, n in prompts)),
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
            request.first_ps = min(request.first_ps, self.end_ps)
            if request.generated == request.output:
                request.finish_ps = self.end_ps
                self.running.remove(request)
                self.release(request)
                done.append(request)
        self.batch = []
        return done


def naive_run(case: Case) -> list[Request]:
    """All requests after a run; the lower replica acts first where events coincide."""
    what, replicas = case.workload, case.replicas
    lengths = zip(what.prompt_tokens.tolist(), what.output_tokens.tolist(), strict=True)
    requests = [Request(prompt, output) for prompt, output in lengths]
    blocks = case.limits.num_blocks
    servers = [Server(case.limits, case.rules, case.cost, blocks) for _ in range(replicas)]
    unsent = list(enumerate(requests))

    def send(at_ps: int) -> None:
        if unsent:
            i, request = unsent.pop(0)
            request.sent_ps = at_ps
            servers[i % replicas].waiting.append(request)

    for arrival_s in what.arrival_s[: what.concurrency or None].tolist():
        send(round(arrival_s * 1e12))
    while any(request.finish_ps == NEVER_PS for request in requests):
        server = min(servers, key=Server.next_event_ps)  # the first of equals
        now_ps = server.next_event_ps()
        for _ in server.stop():
            if what.concurrency:
                send(now_ps)
        server.start(now_ps)
    return requests


@settings(max_examples=400, deadline=None)
@given(case=cases())
def test_the_naive_engine_gives_the_same_times(case: Case) -> None:
    """Send, first token, finish and preemption count of every request agree with the naive run."""
    run = case.start()
    result = run.finish()
    naive = naive_run(case)
    event(f"preemptions: {min(result.preemptions, 3)}")
    got = run.state.time_ps[:, [ARRIVAL, FIRST_TOKEN, FINISH]]
    expected = [[one.sent_ps, one.first_ps, one.finish_ps] for one in naive]
    assert got.tolist() == expected
    assert result.preemptions == sum(one.preemptions for one in naive)
