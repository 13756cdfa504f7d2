"""The compiled engine against a naive one with pipelines, late results, routers and sessions.

The naive engine follows the description of vLLM's V1 scheduler step by step, as the smaller one of
``test_reference_engine`` does, and shares nothing with the compiled one but the cost of an
iteration on a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import event, given, settings

from simulator.rules import LEAST_LOADED, ROUND_ROBIN, VLLM_V1
from simulator.state import ARRIVAL, FINISH, FIRST_TOKEN
from simulator.timing import iteration_ps
from tests.policy_cases import policy_cases

if TYPE_CHECKING:
    from simulator.rules import Rules
    from simulator.state import Limits
    from simulator.timing import IterationCost
    from tests.builders import Case

NEVER_PS = 2**63 - 1
EVERYTHING = 2**63 - 1


@dataclass(eq=False)
class Request:
    """A request and what has become of it."""

    prompt: int
    output: int
    sent_ps: int = NEVER_PS
    place: int = -1  # in its server's queue, counted from the first one ever
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


@dataclass
class Flight:
    """A batch under way: who emits a token when it ends, and how often each had been preempted."""

    end_ps: int
    emitting: list[tuple[Request, int]]
    queued: int  # requests that had ever been queued when it was formed


@dataclass(eq=False)
class Server:
    """One replica: its queues, its free blocks and the batches that it computes."""

    under: Limits
    rules: Rules
    cost: IterationCost
    free: int
    stage_free_ps: list[int]
    preempted: list[Request] = field(default_factory=list)  # the first to come back at the end
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    leaving: list[Request] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    event_ps: int = NEVER_PS
    queued: int = 0
    unfinished: list[Request] = field(default_factory=list)

    def take(self, request: Request, at_ps: int) -> None:
        """Queue a request; an idle place in the pipeline takes it up at once."""
        request.place = self.queued
        self.queued += 1
        self.waiting.append(request)
        self.unfinished.append(request)
        if len(self.flights) < self.rules.batches_in_flight:
            self.event_ps = min(self.event_ps, at_ps)

    def lacks(self, request: Request, tokens: int) -> int:
        """Blocks missing to hold the first ``tokens`` tokens."""
        return -(-tokens // self.under.block_tokens) - request.blocks

    def allocate(self, request: Request, tokens: int) -> None:
        """Take the blocks that ``tokens`` more need."""
        missing = self.lacks(request, request.computed + tokens)
        assert missing <= self.free
        request.blocks += max(0, missing)
        self.free -= max(0, missing)

    def release(self, request: Request) -> None:
        """Give all blocks of a request back."""
        self.free += request.blocks
        request.blocks = 0

    def schedule(self, visible: int) -> list[tuple[Request, int]]:
        """Running requests in order, then the queue up to ``visible``, under one token budget."""
        budget, chosen, preempted = self.under.max_num_batched_tokens, [], False
        for request in list(self.running):
            tokens = min(request.tokens - request.computed, budget)
            if request not in self.running or tokens == 0:  # a victim, in flight, or out of budget
                continue
            while self.lacks(request, request.computed + tokens) > self.free:
                victim = self.running.pop()
                self.release(victim)
                victim.computed = 0
                victim.preemptions += 1
                self.preempted.append(victim)
                preempted = True
                if victim is request:
                    break
            if request in self.running:
                self.allocate(request, tokens)
                chosen.append((request, tokens))
                budget -= tokens
        seats = self.under.max_num_seqs - len(self.leaving)
        admitted, most = 0, self.rules.prompts_per_step or EVERYTHING
        while not preempted and budget > 0 and len(self.running) < seats and admitted < most:
            queue = self.preempted[::-1] + [one for one in self.waiting if one.place < visible]
            if not queue:
                break
            head = queue[0]
            tokens = min(head.tokens, budget)
            if tokens < head.tokens and not self.rules.chunked:
                break
            must_fit = head.tokens if self.rules.reserve_full_prompt else tokens
            if self.lacks(head, must_fit) > self.free:
                break
            (self.preempted if self.preempted else self.waiting).remove(head)
            self.running.append(head)
            self.allocate(head, tokens)
            chosen.append((head, tokens))
            budget -= tokens
            admitted += 1
        return chosen

    def start(self, chosen: list[tuple[Request, int]], now_ps: int) -> None:
        """Send a batch through the stages, each of which takes one batch at a time."""
        # A single token whose prompt lies behind it is a decode; all else counts as prompt.
        decodes = [r for r, n in chosen if n == 1 and r.computed >= r.prompt]
        prompts = [(r.computed, n) for r, n in chosen if n > 1 or r.computed < r.prompt]
        tokens = sum(n for _, n in chosen)
        emitting = [(r, r.preemptions) for r, n in chosen if r.computed + n == r.tokens]
        at_ps = now_ps
        for place, kind in enumerate(self.cost.stages.tolist()):
            prefill_ps = self.cost.prefill_ps[kind]
            took_ps = iteration_ps(
                self.cost,
                kind,
                tokens,
                len(decodes),
                sum(r.computed + 1 for r in decodes),
                int(sum(prefill_ps[done + n] - prefill_ps[done] for done, n in prompts)),
                len(emitting),
                bool(prompts),
            )
            if place > 0:
                at_ps += int(self.cost.send_ps[tokens])
            at_ps = max(at_ps, self.stage_free_ps[place]) + took_ps
            self.stage_free_ps[place] = at_ps
        for request, n in chosen:
            request.computed += n
        self.flights.append(Flight(at_ps, emitting, self.queued))

    def stop(self) -> list[Request]:
        """End the oldest batch: who emits a token, and who has finished."""
        flight, done = self.flights.pop(0), []
        for request, preemptions in flight.emitting:
            if request.preemptions > preemptions:
                continue  # preempted since: it computes this token again
            request.generated += 1
            request.first_ps = min(request.first_ps, flight.end_ps)
            if request.generated == request.output:
                request.finish_ps = flight.end_ps
                self.running.remove(request)
                self.unfinished.remove(request)
                done.append(request)
        self.leaving += done
        if not self.rules.late_results:
            self.leave()
        return done

    def leave(self) -> None:
        """Give the blocks and seats of finished requests back."""
        for request in self.leaving:
            self.release(request)
        self.leaving = []

    def fill(self, visible: int, now_ps: int) -> None:
        """Form batches until the pipeline is full or there is nothing to do.

        With late results the scheduler sees what was there when the last batch was formed, unless
        that leaves it idle.
        """
        while len(self.flights) < self.rules.batches_in_flight:
            chosen = self.schedule(visible)
            late = bool(self.leaving) or visible < EVERYTHING
            self.leave()
            if chosen:
                self.start(chosen, now_ps)
            elif late:
                visible = EVERYTHING
            else:
                break
        self.event_ps = self.flights[0].end_ps if self.flights else NEVER_PS


@dataclass
class Network:
    """Sends under way, and the router that hands them to the servers."""

    router: int
    servers: list[Server]
    requests: list[Request]
    ingress_ps: int
    turn: int = 0
    # When each reaches a scheduler, whether it was known beforehand, which request.
    under_way: list[tuple[int, bool, int]] = field(default_factory=list)

    def send(self, i: int, at_ps: int, *, beforehand: bool = False) -> None:
        """Send request ``i``."""
        self.requests[i].sent_ps = at_ps
        self.under_way.append((at_ps + self.ingress_ps, beforehand, i))
        self.under_way.sort()

    def route(self, until_ps: int) -> None:
        """Queue what reaches the schedulers by ``until_ps``."""
        while self.under_way and self.under_way[0][0] <= until_ps:
            at_ps, _, i = self.under_way.pop(0)
            self.choose().take(self.requests[i], at_ps)

    def choose(self) -> Server:
        """The server of the next request, of equals the first."""
        if self.router == ROUND_ROBIN:
            self.turn += 1
            return self.servers[(self.turn - 1) % len(self.servers)]
        if self.router == LEAST_LOADED:
            return min(self.servers, key=lambda s: sum(one.prompt for one in s.unfinished))
        return min(self.servers, key=lambda s: len(s.unfinished))


def naive_run(case: Case) -> list[Request]:
    """All requests after a run; sends before batches, the lower replica first, at equal times."""
    what, rules = case.workload, case.rules
    lengths = zip(what.prompt_tokens.tolist(), what.output_tokens.tolist(), strict=True)
    requests = [Request(prompt, output) for prompt, output in lengths]
    servers = [
        Server(case.limits, rules, case.cost, case.limits.num_blocks, [0] * len(case.cost.stages))
        for _ in range(case.replicas)
    ]
    network = Network(rules.router, servers, requests, case.limits.ingress_ps)
    n = len(requests)
    follower = {first: i for i, first in enumerate(what.after.tolist()) if first >= 0}
    known = [i for i in range(n) if i not in follower.values()][: what.concurrency or n]
    unsent = [i for i in range(n) if i not in known and i not in follower.values()]
    for i in known:
        network.send(i, round(what.arrival_s[i] * 1e12), beforehand=True)
    while any(request.finish_ps == NEVER_PS for request in requests):
        server = min(servers, key=lambda s: s.event_ps)  # the first of equals
        now_ps = server.event_ps
        if network.under_way and network.under_way[0][0] <= now_ps:
            network.route(network.under_way[0][0])
            continue
        visible = EVERYTHING
        if server.flights and server.flights[0].end_ps == now_ps:
            if rules.late_results:
                visible = server.flights[0].queued
            for done in server.stop():
                i = requests.index(done)
                if i in follower:
                    network.send(follower[i], now_ps + round(what.think_s[follower[i]] * 1e12))
                elif what.concurrency and unsent:
                    network.send(unsent.pop(0), now_ps)
        network.route(now_ps)
        server.fill(visible, now_ps)
    return requests


@settings(max_examples=600, deadline=None)
@given(case=policy_cases(VLLM_V1))
def test_the_naive_engine_gives_the_same_times(case: Case) -> None:
    """Send, first token, finish and preemption count of every request agree with the naive run."""
    run = case.start(plain=True)
    result = run.finish()
    naive = naive_run(case)
    event(f"preemptions: {min(result.preemptions, 3)}")
    event(f"stages: {len(case.cost.stages)}, in flight: {case.rules.batches_in_flight}")
    got = run.state.time_ps[:, [ARRIVAL, FIRST_TOKEN, FINISH]]
    expected = [[one.sent_ps, one.first_ps, one.finish_ps] for one in naive]
    assert got.tolist() == expected
    assert result.preempted.tolist() == [one.preemptions for one in naive]
