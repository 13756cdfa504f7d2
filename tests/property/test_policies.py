"""What holds under every batching policy: conservation, and how runs change with their input."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from simulator.rules import (
    ROUND_ROBIN,
    SARATHI,
    SGLANG,
    STATIC,
    TRTLLM,
    VLLM_V0,
    VLLM_V1,
)
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    EMITTED,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    FREE_BLOCKS,
    GENERATED,
    HELD_BLOCKS,
    IN_FLIGHT,
    LAST_TOKEN,
    LEAVING_BLOCKS,
    LEAVING_SEATS,
    NEVER_PS,
    NEXT_REPLICA,
    OUTSTANDING,
    OUTSTANDING_TOKENS,
    PENDING,
    PREEMPTIONS,
    REPLICA,
    RUNNING,
    STACKED,
    initial_state,
)
from simulator.timing import in_s
from tests.builders import TICK_S, linear_cost
from tests.policies import each_policy
from tests.policy_cases import MAX_TOKENS, pipelines, policy_cases
from tests.schedules import watch

if TYPE_CHECKING:
    from simulator.policies.batch import Batch
    from simulator.run import Run, RunResult
    from simulator.timing import IterationCost
    from simulator.workload import Workload
    from tests.builders import Case

EXAMPLES = settings(max_examples=60, deadline=None)
STEPWISE = settings(max_examples=20, deadline=None)


def finished(case: Case, *, plain: bool = True) -> Run:
    """The case, run to its end."""
    run = case.start(plain=plain)
    run.finish()
    return run


def part_of(what: Workload, keep: slice | np.ndarray, shift_s: float = 0.0) -> Workload:
    """Some of the requests of an open loop, with their arrivals shifted."""
    return replace(
        what,
        arrival_s=what.arrival_s[keep] + shift_s,
        prompt_tokens=what.prompt_tokens[keep],
        output_tokens=what.output_tokens[keep],
    )


@each_policy
@EXAMPLES
@given(data=st.data())
def test_every_request_finishes_once_and_leaves_nothing(policy: int, data: st.DataObject) -> None:
    """All tokens are emitted, all blocks, seats and sends given back, times are in order."""
    case = data.draw(policy_cases(policy))
    run = finished(case)
    state, what = run.state, case.workload
    event(f"preemptions: {min(int(state.request[:, PREEMPTIONS].sum()), 3)}")
    assert state.counters[FINISHED] == what.num_requests
    assert state.counters[PENDING] == 0
    assert np.array_equal(state.request[:, GENERATED], what.output_tokens)
    # The last token is never computed: it is returned and nothing attends to it.
    known = what.prompt_tokens + what.output_tokens
    assert np.array_equal(state.request[:, COMPUTED], known - 1)
    assert (state.request[:, HELD_BLOCKS] == 0).all()
    assert (state.replica[:, FREE_BLOCKS] == case.limits.num_blocks).all()
    empty = [RUNNING, STACKED, IN_FLIGHT, OUTSTANDING, OUTSTANDING_TOKENS]
    assert (state.replica[:, [*empty, LEAVING_SEATS, LEAVING_BLOCKS]] == 0).all()
    assert (state.event_ps == NEVER_PS).all()
    time_ps = state.time_ps
    least_ps = case.limits.ingress_ps + sum(case.cost.host_ps[kind] for kind in case.cost.stages)
    assert (time_ps[:, FIRST_TOKEN] - time_ps[:, ARRIVAL] >= least_ps).all()
    several = what.output_tokens > 1
    assert np.array_equal(time_ps[:, FIRST_TOKEN] < time_ps[:, LAST_TOKEN], several)
    assert np.array_equal(time_ps[:, LAST_TOKEN], time_ps[:, FINISH])


@each_policy
@STEPWISE
@given(data=st.data())
def test_every_batch_keeps_the_books(policy: int, data: st.DataObject) -> None:
    """Batch by batch, blocks and tokens add up; the loop is the same compiled and as Python."""
    case = data.draw(policy_cases(policy))
    whole = finished(case)
    state = initial_state(case.workload, case.replicas, case.limits, case.rules, case.cost)
    computed = state.request[:, COMPUTED].copy()
    done = dropped = 0

    def check(batch: Batch, r: int, slot: int) -> None:
        nonlocal computed, done, dropped
        n = int(state.replica[r, RUNNING])
        running, new = state.running[r, :n], state.scheduled[r, :n]
        held = state.request[state.request[:, REPLICA] == r, HELD_BLOCKS].sum()
        assert held + state.replica[r, FREE_BLOCKS] == case.limits.num_blocks
        assert len(set(running.tolist())) == n
        assert (new >= 0).all()
        emitted = state.slot[r, slot, EMITTED]
        if policy == STATIC:  # finished sequences are computed on
            assert batch.tokens >= new.sum()
            assert batch.sampled >= emitted
        else:
            assert batch.tokens == new.sum()
            assert batch.sampled == emitted
        most = case.rules.prompts_per_step
        first = (computed[running] == 0) & (new > 0)
        assert most == 0 or first.sum() <= most
        fresh = np.zeros(len(computed), np.int64)
        fresh[running] = new
        done += int(new.sum())
        dropped += int((computed + fresh - state.request[:, COMPUTED]).sum())
        computed = state.request[:, COMPUTED].copy()

    watch(state, case.limits, case.rules, case.cost, check)
    once = case.workload.prompt_tokens + case.workload.output_tokens - 1
    assert done - dropped == once.sum()
    assert np.array_equal(state.time_ps, whole.state.time_ps)
    assert np.array_equal(state.request, whole.state.request)


@each_policy
@EXAMPLES
@given(data=st.data())
def test_the_jump_engine_gives_the_same_run(policy: int, data: st.DataObject) -> None:
    """Times, preemptions, routes and what was used of the limits agree with the plain loop's."""
    case = data.draw(policy_cases(policy))
    plain, jump = finished(case), finished(case, plain=False)
    assert np.array_equal(jump.state.time_ps, plain.state.time_ps)
    columns = [GENERATED, PREEMPTIONS, REPLICA]
    assert np.array_equal(jump.state.request[:, columns], plain.state.request[:, columns])
    assert jump.iterations == plain.iterations
    assert jump.usage() == plain.usage()


@each_policy
@EXAMPLES
@given(data=st.data(), factor=st.sampled_from([2, 3, 7]))
def test_scaling_all_times_scales_all_latencies(
    policy: int, data: st.DataObject, factor: int
) -> None:
    """Every time that goes in times c makes every time that comes out times c, exactly."""
    case = data.draw(policy_cases(policy))
    cost, what = case.cost, case.workload
    times = {name: getattr(cost, name) for name in cost._fields if name.endswith("_ps")}
    slower = replace(
        case,
        workload=replace(what, arrival_s=factor * what.arrival_s, think_s=factor * what.think_s),
        limits=case.limits._replace(ingress_ps=factor * case.limits.ingress_ps),
        cost=cost._replace(**{name: factor * time_ps for name, time_ps in times.items()}),
    )
    one, other = finished(case).state, finished(slower).state
    assert np.array_equal(other.time_ps, factor * one.time_ps)
    assert np.array_equal(other.request, one.request)


@each_policy
@EXAMPLES
@given(data=st.data())
def test_an_idle_gap_splits_a_trace(policy: int, data: st.DataObject) -> None:
    """What comes after the servers have idled runs as if nothing had been before."""
    case = data.draw(policy_cases(policy, open_loop=True))
    what = case.workload
    n = what.num_requests
    assume(n > 1)
    cut = data.draw(st.integers(1, n - 1))
    if case.rules.router == ROUND_ROBIN and cut % case.replicas:
        case = replace(case, replicas=1)  # the router would go on at another replica
    first = part_of(what, slice(cut))
    second = part_of(what, slice(cut, n), -what.arrival_s[cut])
    early = finished(replace(case, workload=first)).state.time_ps
    far_s = (np.ceil(in_s(early[:, FINISH].max()) / TICK_S) + 1) * TICK_S
    late = finished(replace(case, workload=second)).state.time_ps
    arrival_s = np.concatenate([first.arrival_s, second.arrival_s + far_s])
    both = finished(replace(case, workload=replace(what, arrival_s=arrival_s))).state.time_ps
    assert np.array_equal(both[:cut], early)
    assert np.array_equal(both[cut:] - both[cut, ARRIVAL], late - late[0, ARRIVAL])


@each_policy
@EXAMPLES
@given(data=st.data())
def test_replicas_are_alike_and_do_not_meet(policy: int, data: st.DataObject) -> None:
    """Each replica serves what the router gives it as it would alone; numbers are only names."""
    case = data.draw(policy_cases(policy, open_loop=True))
    state = finished(case).state
    for r in range(case.replicas):
        mine = np.flatnonzero(state.request[:, REPLICA] == r)
        if len(mine):
            alone = replace(case, workload=part_of(case.workload, mine), replicas=1)
            assert np.array_equal(finished(alone).state.time_ps, state.time_ps[mine])
    if case.rules.router == ROUND_ROBIN:
        swapped = case.start(plain=True)
        swapped.state.counters[NEXT_REPLICA] = 1 % case.replicas
        swapped.finish()
        assert np.array_equal(swapped.state.time_ps, state.time_ps)
        turned = (state.request[:, REPLICA] + 1) % case.replicas
        assert np.array_equal(swapped.state.request[:, REPLICA], turned)


def with_and_without_the_last(case: Case) -> tuple[Run, Run]:
    """The run without its last request, and with it."""
    fewer = part_of(case.workload, slice(case.workload.num_requests - 1))
    return finished(replace(case, workload=fewer)), finished(case)


@each_policy
@EXAMPLES
@given(data=st.data())
def test_no_request_changes_what_was_before_it(policy: int, data: st.DataObject) -> None:
    """What happens until a request reaches the scheduler does not depend on it."""
    case = data.draw(policy_cases(policy, open_loop=True))
    assume(case.workload.num_requests > 1 and case.rules.router == ROUND_ROBIN)
    without, with_it = with_and_without_the_last(case)
    visible_ps = with_it.state.time_ps[-1, ARRIVAL] + case.limits.ingress_ps
    before, after = (np.minimum(run.state.time_ps, visible_ps) for run in (without, with_it))
    assert np.array_equal(before, after[:-1])


def is_behind_all_others(case: Case, without: RunResult, with_it: RunResult) -> bool:
    """Whether the last arrival takes nothing from the others but what they leave over.

    It does take from them where prompts stop decodes (vLLM V0 and SGLang without chunks beside
    decodes), where it overtakes a preempted request (vLLM V0 and Sarathi let others in at once,
    SGLang sends it to the end of the queue), where its decodes shorten the chunks of a prompt that
    waits for whole blocks (TensorRT-LLM), where a static batch waits for its prompt, and where the
    blocks that it leaves come a step late for one that must give way without them.
    """
    rules = case.rules
    if rules.late_results and with_it.preemptions:
        return False
    if rules.policy == VLLM_V0:
        return rules.chunked and without.preemptions == 0
    if rules.policy == SARATHI:
        return without.preemptions == 0
    if rules.policy == TRTLLM:
        return rules.chunk_unit == 1
    if rules.policy == SGLANG:
        return rules.mixed and with_it.preemptions == 0
    if rules.policy == STATIC:
        budget = case.limits.max_num_batched_tokens
        return bool(case.workload.prompt_tokens.sum() <= budget)
    return rules.policy == VLLM_V1


@each_policy
@EXAMPLES
@given(data=st.data())
def test_the_last_arrival_changes_no_other_completion(policy: int, data: st.DataObject) -> None:
    """First come first served, while an iteration takes as long for one request as for many."""
    case = data.draw(policy_cases(policy, open_loop=True, single=True, pipeline=False))
    assume(case.workload.num_requests > 1)
    size = {"max_tokens": MAX_TOKENS, "max_seqs": 16, "max_context": 64}
    case = replace(case, cost=linear_cost(TICK_S, **size))
    without, with_it = with_and_without_the_last(case)
    if is_behind_all_others(case, without.result(), with_it.result()):
        event("the last arrival is behind all others")
        assert np.array_equal(with_it.state.time_ps[:-1], without.state.time_ps)


def as_one_stage(cost: IterationCost) -> IterationCost:
    """The sum of the stages' times and of the sends between them."""

    def total(name: str) -> np.ndarray:
        over_stages: np.ndarray = getattr(cost, name)[cost.stages].sum(axis=0, keepdims=True)
        return over_stages

    fields = {
        name: total(name) for name in cost._fields if name.endswith("_ps") and name != "send_ps"
    }
    sends_ps = (len(cost.stages) - 1) * cost.send_ps
    fields["decode_ps"] += sends_ps
    fields["mixed_ps"] += sends_ps
    fields["send_ps"] = np.zeros(1, np.int64)
    return cost._replace(**fields, stages=np.zeros(1, np.int64))


@each_policy
@EXAMPLES
@given(data=st.data())
def test_stages_without_overlap_are_one_stage(policy: int, data: st.DataObject) -> None:
    """With one batch in flight, stages take turns: their times and the sends add up."""
    case = data.draw(policy_cases(policy, pipeline=False))
    cost = data.draw(pipelines())
    staged, single = (finished(replace(case, cost=c)) for c in (cost, as_one_stage(cost)))
    assert np.array_equal(staged.state.time_ps, single.state.time_ps)
    assert np.array_equal(staged.state.request, single.state.request)
