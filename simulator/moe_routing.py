"""What the tokens of a mixture-of-experts layer ask of the most loaded expert-parallel rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from simulator.interpolate import FloatArray

QUANTILES: Final = (np.arange(64) + 0.5) / 64
"""Where the distribution of load over experts is sampled; 4,096 points move no result by 0.7 %."""
FEW_COPIES_RANGE: Final = (0.01, 2.0)
"""Range of the power law while there are fewer copies of tokens than experts."""
MANY_COPIES_LOW: Final = 1.0
MANY_COPIES_TOKEN_SHARE: Final = 0.8
"""Range of the power law with more copies than experts: from 1 to this share of the tokens."""


def most_loaded_rank(
    top_k: FloatArray, num_experts: FloatArray, moe_ep: FloatArray, skew: float, tokens: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Experts that get any token, and copies of tokens to compute, on the most loaded rank.

    The measured tables route as AIConfigurator's collector does (``collector/helper.py`` of
    ai-dynamo/aiconfigurator, ``balanced_logits`` and ``_generate_power_law_distribution``), and
    time the rank that holds the most copies; so does this. Balanced: copies go round the experts,
    so that ``tokens * top_k`` distinct experts are hit until all are. Power law: an expert's share
    is drawn from a truncated power law, whose range depends on whether there are more copies than
    experts; an expert is hit once its share is a whole copy. Shares are taken at fixed quantiles
    instead of at random, and the largest of ``moe_ep`` sums of shares from the normal law.

    Parameters
    ----------
    top_k, num_experts, moe_ep, tokens
        Experts per token, experts of the layer, expert-parallel ranks, tokens before routing (of
        all ranks); arrays that broadcast against each other.
    skew
        Exponent of the power law, 0 for balanced.

    Returns
    -------
    active_experts, copies
        Of the broadcast shape, non-decreasing in ``tokens`` but for the power law's change of
        range.

    """
    top_k, num_experts, moe_ep, tokens = np.broadcast_arrays(top_k, num_experts, moe_ep, tokens)
    local_experts = num_experts / moe_ep
    mean_copies = tokens * top_k / moe_ep
    if skew == 0:
        active = np.clip(mean_copies, 1.0, local_experts)
        return active, np.maximum(mean_copies, active)
    load = tokens * top_k / num_experts
    share = _shares(skew, load, tokens)
    copies = np.minimum(share * load[..., None], tokens[..., None])
    copies *= (load / copies.mean(axis=-1))[..., None]
    active = np.clip(local_experts * np.minimum(copies, 1.0).mean(axis=-1), 1.0, local_experts)
    # Expected largest of n normal variates: sqrt(2 ln n); the ranks' sums are fixed in total.
    spread = np.sqrt(2 * np.log(moe_ep) * (1 - 1 / moe_ep) * local_experts) * copies.std(axis=-1)
    heaviest = np.minimum(local_experts * load + spread, tokens * np.minimum(top_k, local_experts))
    return active, np.maximum(heaviest, active)


def _shares(skew: float, load: FloatArray, tokens: FloatArray) -> FloatArray:
    """Experts' loads over their mean at `QUANTILES` of the power law, shape (..., Q).

    Tables change the law's range at a load of one copy per expert; here it changes over the octave
    above that, so that nothing jumps.
    """
    many = np.clip(np.log2(np.maximum(load, 1.0)), 0.0, 1.0)
    few_low, few_high = FEW_COPIES_RANGE
    top = np.maximum(MANY_COPIES_TOKEN_SHARE * tokens, MANY_COPIES_LOW)
    low = few_low ** (1 - many) * MANY_COPIES_LOW**many
    high = few_high ** (1 - many) * top**many
    power = 1 - skew
    low, high = low[..., None], np.maximum(high, low * (1 + 1e-9))[..., None]
    if power == 0:
        drawn = low * (high / low) ** QUANTILES
    else:
        drawn = ((high**power - low**power) * QUANTILES + low**power) ** (1 / power)
    share: FloatArray = drawn / drawn.mean(axis=-1, keepdims=True)
    return share
