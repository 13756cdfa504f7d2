"""The compiled V0, Sarathi and static policies against naive ones of objects and lists.

The naive schedulers follow the engines' own lists: a running list that is emptied from the front
and robbed from the back, a waiting list with an open front. Only the cost of an iteration and the
loop around the schedulers are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from simulator.kvcache import blocks_for
from simulator.rules import SARATHI, STATIC, VLLM_V0, Rules
from simulator.run import Run
from simulator.state import ARRIVAL, FINISH, FIRST_TOKEN
from simulator.timing import iteration_ps
from tests.builders import Case, cases
from tests.property import test_reference_engine as reference
from tests.property.test_reference_engine import Request, Server


class WholePromptServer(Server):
    """What vLLM's V0 scheduler and Sarathi's share."""

    def preempt(self, victim: Request) -> None:
        """Take everything from a request."""
        self.release(victim)
        victim.computed = 0
        victim.preemptions += 1

    def admit(self, budget: int) -> list[tuple[Request, int]]:
        """Move requests from waiting to running; they get the blocks of all they know."""
        chosen = []
        watermark = int(self.rules.watermark * self.under.num_blocks)
        while self.waiting and self.waiting[0].sent_ps + self.under.ingress_ps <= self.now_ps:
            head = self.waiting[0]
            tokens = min(head.tokens, budget) if self.rules.chunked else head.tokens
            if self.lacks(head, head.tokens) + watermark > self.free:
                break
            if tokens == 0 or tokens > budget or len(self.running) == self.under.max_num_seqs:
                break
            self.running.append(self.waiting.pop(0))
            self.allocate(head, head.tokens)
            chosen.append((head, tokens))
            budget -= tokens
        return chosen


class V0Server(WholePromptServer):
    """vLLM 0.6.0."""

    def schedule(self) -> list[tuple[Request, int]]:
        """Prompts alone or else decodes; with chunks running requests and then prompts."""
        budget = self.under.max_num_batched_tokens
        if self.rules.chunked:
            chosen, preempted = self.run_on(budget)
            chosen += self.admit(budget - sum(n for _, n in chosen))
        else:
            chosen, preempted = self.admit(budget), []
            if not chosen:
                chosen, preempted = self.run_on(len(self.running))
        self.waiting[:0] = reversed(preempted)
        return chosen

    def run_on(self, budget: int) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Schedule running requests from the front; who was robbed, first robbed first."""
        queue, self.running = self.running, []
        chosen, preempted = [], []
        while queue and budget > 0:
            request = queue.pop(0)
            tokens = min(request.tokens - request.computed, budget)
            while self.free == 0 and (queue or self.running):
                victim = queue.pop() if queue else request
                self.preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            else:
                if self.lacks(request, request.computed + tokens) > 0:
                    self.allocate(request, tokens)
                self.running.append(request)
                chosen.append((request, tokens))
                budget -= tokens
        assert not queue  # seats do not exceed the budget
        return chosen, preempted


class SarathiServer(WholePromptServer):
    """Sarathi-Serve."""

    def schedule(self) -> list[tuple[Request, int]]:
        """Decodes, running prompts, waiting prompts."""
        queue = sorted(self.running, key=lambda r: r.sent_ps)
        decoding: list[Request] = []
        prompts: list[Request] = []
        while queue:
            request = queue.pop(0)
            if request.computed < request.prompt or request.computed + 1 < request.tokens:
                prompts.append(request)
                continue
            while self.free == 0 and (queue or decoding or prompts):
                victim = queue.pop() if queue else request
                self.preempt(victim)
                self.waiting.insert(0, victim)
                if victim is request:
                    break
            else:
                if self.lacks(request, request.tokens) > 0:
                    self.allocate(request, 1)
                decoding.append(request)
        self.running = decoding + prompts
        chosen = [(request, 1) for request in decoding]
        budget = self.under.max_num_batched_tokens - len(decoding)
        for request in prompts:
            tokens = min(request.tokens - request.computed, budget)
            if tokens > 0:
                chosen.append((request, tokens))
                budget -= tokens
        return chosen + self.admit(budget)


@dataclass(eq=False)
class StaticServer(Server):
    """A batch at a time."""

    size: int = 0

    def schedule(self) -> list[tuple[Request, int]]:
        """All prompts of the batch, then all that is left of it, token by token."""
        if not self.running:
            self.take()
        budget = self.under.max_num_batched_tokens
        prompts = [request for request in self.running if request.computed < request.prompt]
        if not prompts:
            return [(request, 1) for request in self.running]
        chosen = []
        for request in prompts:
            tokens = min(request.prompt - request.computed, budget)
            if tokens > 0:
                chosen.append((request, tokens))
                budget -= tokens
        return chosen

    def take(self) -> None:
        """Take a batch, with blocks for its output."""
        budget = self.under.max_num_batched_tokens
        while self.waiting and self.waiting[0].sent_ps + self.under.ingress_ps <= self.now_ps:
            head = self.waiting[0]
            full = len(self.running) == self.under.max_num_seqs
            if full or (head.prompt > budget and not self.rules.chunked):
                break
            if self.lacks(head, head.prompt + head.output) > self.free:
                break
            self.running.append(self.waiting.pop(0))
            self.allocate(head, head.prompt + head.output)
            budget -= head.prompt
        self.size = len(self.running)

    def start(self, now_ps: int) -> None:
        """Time decodes as what they are and padding for who has finished."""
        decoding = bool(self.running) and all(one.computed >= one.prompt for one in self.running)
        super().start(now_ps)
        if decoding:
            context = sum(request.computed for request, _ in self.batch)
            rows = self.size
            self.end_ps = now_ps + iteration_ps(
                self.cost, 0, rows, rows, context, 0, rows, has_prefill=False
            )


SERVERS: dict[int, type[Server]] = {
    VLLM_V0: V0Server,
    SARATHI: SarathiServer,
    STATIC: StaticServer,
}


@st.composite
def policy_cases(draw: st.DrawFn) -> Case:
    """Cases under one of the three policies that the engines would accept.

    A watermark leaves room for the longest request, and a budget that must hold whole prompts
    holds the longest request too, as vLLM wants of both.
    """
    case = draw(cases())
    policy = draw(st.sampled_from(list(SERVERS)))
    rules = Rules(
        policy=policy,
        chunked=policy == SARATHI or draw(st.booleans()),
        watermark=0.0 if policy == STATIC else draw(st.sampled_from([0.0, 0.1, 0.3])),
    )
    under, what = case.limits, case.workload
    longest = int((what.prompt_tokens + what.output_tokens).max())
    blocks, budget = under.num_blocks, under.max_num_batched_tokens
    while blocks - int(rules.watermark * blocks) < blocks_for(longest, under.block_tokens):
        blocks += 1
    if not rules.chunked:
        budget = max(budget, longest)
    under = under._replace(num_blocks=blocks, max_num_batched_tokens=budget)
    return replace(case, limits=under, rules=rules)


@pytest.mark.compiles
@settings(max_examples=400, deadline=None)
@given(case=policy_cases())
def test_the_naive_policies_give_the_same_times(case: Case) -> None:
    """Send, first token, finish and preemptions of every request agree with the naive run."""
    run = Run(case.workload, case.replicas, case.limits, case.cost, case.rules, plain=True)
    result = run.finish()
    with mock.patch.object(reference, "Server", SERVERS[case.rules.policy]):
        naive = reference.naive_run(case)
    event(f"policy {case.rules.policy}, preemptions {sum(one.preemptions > 0 for one in naive)}")
    got = run.state.time_ps[:, [ARRIVAL, FIRST_TOKEN, FINISH]]
    assert got.tolist() == [[one.sent_ps, one.first_ps, one.finish_ps] for one in naive]
    assert result.preempted.tolist() == [one.preemptions for one in naive]
