"""The time of an iteration of attention groups that run in lockstep.

A replica with attention data parallel (``Shape.dp`` above 1) has a scheduler, a queue and a KV
cache in each of its attention groups. In every layer the groups attend to their own sequences and
then compute the routed experts together, so an iteration lasts as long as the slowest group's own
work and the experts' work on all groups' tokens (vLLM v1/engine/core.py, ``DPEngineCoreProc``;
SGLang layers/dp_attention.py; TensorRT-LLM ``enable_attention_dp``). A group without requests runs
along, with a dummy token or none.

How many tokens that is depends on the engine: where the iteration replays a CUDA graph every group
is padded to the graph of the widest one, elsewhere as `simulator.engine_rules.Padding` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from simulator.compiled import compiled
from simulator.timing import decode_attention_ps, in_ps

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.engine_rules import LockstepRules
    from simulator.timing import IterationCost

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_NONE, _WIDEST, _WIDEST_IF_HALF = range(3)
_PADDINGS: Final = {"none": _NONE, "widest": _WIDEST, "widest_if_half": _WIDEST_IF_HALF}

# Columns of the batches of a replica's groups, (D, 6): all that the time of an iteration needs.
TOKENS, DECODES, CONTEXT, SAMPLED, PREFILL_PS, HAS_PREFILL = range(6)
BATCH_COLUMNS = 6


class Lockstep(NamedTuple):
    """How D attention groups run in lockstep, beside the ``IterationCost`` of one of them.

    That cost holds for whatever a group does alone (attention, sampling, host); of an iteration it
    is a lower bound, which counts no real token of another group. All arrays never fall.

    Attributes
    ----------
    own_decode_ps, own_mixed_ps
        (T + 1,) what each group computes for itself outside attention, by its tokens, of an
        iteration without prompt tokens in any group, and of one with; graphs are padded.
    shared_decode_ps, shared_mixed_ps
        (D * T + 1,) experts and what joins the groups, by the tokens of all, of both kinds.
    decode_sizes, mixed_sizes
        (T + 1,) size of the graph that such an iteration replays, by the tokens of the widest
        group; 0 where it replays none.
    groups, idle_tokens
        D, and the tokens that a group without work computes.
    padding, mixed_padding
        How tokens are laid out without a graph, by kind of iteration.
    hold_iterations, gather_iterations
        How long admission waits, see `simulator.engine_rules.LockstepRules`.

    """

    own_decode_ps: Ints
    own_mixed_ps: Ints
    shared_decode_ps: Ints
    shared_mixed_ps: Ints
    decode_sizes: Ints
    mixed_sizes: Ints
    groups: int
    idle_tokens: int
    padding: int
    mixed_padding: int
    hold_iterations: int
    gather_iterations: int


def lockstep_of(
    *,
    own_decode_s: Floats,
    own_mixed_s: Floats,
    shared_decode_s: Floats,
    shared_mixed_s: Floats,
    decode_sizes: Ints,
    mixed_sizes: Ints,
    groups: int,
    rules: LockstepRules,
) -> Lockstep:
    """The cost from times in seconds; attributes as of `Lockstep`."""
    return Lockstep(
        own_decode_ps=in_ps(own_decode_s),
        own_mixed_ps=in_ps(own_mixed_s),
        shared_decode_ps=in_ps(shared_decode_s),
        shared_mixed_ps=in_ps(shared_mixed_s),
        decode_sizes=np.asarray(decode_sizes, np.int64),
        mixed_sizes=np.asarray(mixed_sizes, np.int64),
        groups=groups,
        idle_tokens=rules.idle_tokens,
        padding=_PADDINGS[rules.padding],
        mixed_padding=_PADDINGS[rules.padding_with_prompts],
        hold_iterations=rules.hold_iterations,
        gather_iterations=rules.gather_iterations,
    )


def graph_sizes_by_tokens(captured: tuple[int, ...], tokens: int, *, padded: bool) -> Ints:
    """(T + 1,) size of the graph that a batch of 0 .. T tokens replays, 0 where it replays none."""
    out = np.zeros(tokens + 1, np.int64)
    sizes = np.array([size for size in captured if size <= tokens], np.int64)
    if padded and len(sizes):
        inside = np.arange(1, sizes[-1] + 1)
        out[inside] = sizes[np.searchsorted(sizes, inside)]
    out[sizes] = sizes
    return out


def least_cost(alone: IterationCost, together: Lockstep) -> IterationCost:
    """Cost of one group that is never above what :func:`lockstep_ps` comes to.

    Experts meet at least the group's own tokens and the others' dummies, be the iteration padded
    or not, with prompts elsewhere or without.

    Parameters
    ----------
    alone
        What the group does for itself.
    together
        What the groups do in lockstep.

    """
    own = np.arange(len(together.own_decode_ps))
    least = np.where(own > 0, own + (together.groups - 1) * together.idle_tokens, 0)
    return alone._replace(
        decode_ps=alone.decode_ps + together.shared_decode_ps[least],
        mixed_ps=alone.mixed_ps + together.shared_mixed_ps[least],
    )


@compiled
def lockstep_ps(cost: IterationCost, together: Lockstep, batches: Ints) -> int:
    """Time of one iteration of all groups, picoseconds.

    Parameters
    ----------
    cost
        What one group does alone.
    together
        What they do in lockstep.
    batches
        (D, 6) their batches, columns named above; a group that idles has no tokens.

    """
    widest, total, mixed = 0, 0, False
    for d in range(batches.shape[0]):
        tokens = max(batches[d, TOKENS], together.idle_tokens)
        widest = max(widest, tokens)
        total += tokens
        mixed = mixed or batches[d, HAS_PREFILL] > 0
    own_ps = together.own_mixed_ps if mixed else together.own_decode_ps
    shared_ps = together.shared_mixed_ps if mixed else together.shared_decode_ps
    size = together.mixed_sizes[widest] if mixed else together.decode_sizes[widest]
    padding = together.mixed_padding if mixed else together.padding
    padded = (
        size > 0
        or padding == _WIDEST
        or (padding == _WIDEST_IF_HALF and 2 * total >= widest * batches.shape[0])
    )
    if padded:
        total = max(size, widest) * batches.shape[0]
    slowest, sampled = 0, 0
    for d in range(batches.shape[0]):
        tokens = widest if padded else max(batches[d, TOKENS], together.idle_tokens)
        attention_ps = decode_attention_ps(cost, 0, batches[d, DECODES], batches[d, CONTEXT])
        slowest = max(slowest, own_ps[tokens] + attention_ps + batches[d, PREFILL_PS])
        sampled = max(sampled, batches[d, SAMPLED])
    floor_ps = cost.mixed_floor_ps[0] if mixed else cost.decode_floor_ps[0]
    device_ps = max(slowest + shared_ps[total], floor_ps)
    time_ps: int = device_ps + cost.host_ps[0] + cost.sampled_ps[0, sampled]
    return time_ps
