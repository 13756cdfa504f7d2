"""Known anomalies of continuous batching, smallest found: better hardware, worse figures.

They are why the search never rules a plan out because another has a faster device or more memory.
Both were found by random search over a few requests; times are worked by hand, in seconds.
"""

from __future__ import annotations

from simulator.metrics import statistic_s
from tests.builders import Case, limits, linear_cost, workload


def test_a_uniformly_faster_device_can_have_a_worse_p99_ttft() -> None:
    """Every iteration takes 3/4 of the time, and the second request just misses one.

    An iteration takes 1 s and 1/4 s per token; requests of one prompt token and two outputs are
    sent at 0 and 1. Slow: request 0's prompt ends at 1.25, so its decode and request 1's prompt run
    together, to 2.75. Fast: the prompt ends at 0.9375, before request 1 is there; the decode runs
    alone to 1.875, and only then the prompt, to 2.8125.
    """
    what = workload([1, 1], [2, 2], [0.0, 1.0])
    slow, fast = (
        Case(what, 1, limits(), linear_cost(share, token_s=share / 4)).start().finish()
        for share in (1.0, 0.75)
    )
    assert slow.values.ttft_s.tolist() == [1.25, 1.75]
    assert fast.values.ttft_s.tolist() == [0.9375, 1.8125]
    assert statistic_s(fast.values.ttft_s, "p99") > statistic_s(slow.values.ttft_s, "p99")


def test_more_blocks_can_have_a_worse_mean_e2e() -> None:
    """With room for it, the second prompt is let in early and stretches the first one's decode.

    An iteration takes 1 s and 1/2 s per token, of which it holds 5. Request 0 (5 tokens, 2
    outputs) is sent at 0, request 1 (6 tokens, 3 outputs) at 3. Request 0's prompt ends at 3.5.

    3 blocks of 4 tokens: request 0 holds 2, so request 1 waits for 2. Decode of 0 to 5.0; prompt of
    1 in chunks of 5 and 1 to 8.5 and 10.0; two decodes to 13.0. E2E 5 and 10.
    6 blocks: the decode of 0 shares its iteration with 4 tokens of prompt 1, to 7.0; 2 more to
    9.0; two decodes to 12.0. E2E 7 and 9.
    """
    what = workload([5, 6], [2, 3], [0.0, 3.0])
    few, many = (
        Case(what, 1, limits(tokens=5, blocks=blocks), linear_cost(1.0, token_s=0.5))
        .start()
        .finish()
        for blocks in (3, 6)
    )
    assert few.values.e2e_s.tolist() == [5.0, 10.0]
    assert many.values.e2e_s.tolist() == [7.0, 9.0]
    assert many.values.e2e_s.mean() > few.values.e2e_s.mean()
