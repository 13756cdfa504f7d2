"""Every policy as a test parameter.

Compiling the loops takes about half a minute for each policy. The everyday tests do so for vLLM's
V1 policy and play the hand-worked schedules of all others as plain Python; ``pytest -m compiles``
runs the rest.
"""

from __future__ import annotations

import pytest

from simulator.rules import POLICIES, VLLM_V1

each_policy = pytest.mark.parametrize(
    "policy",
    [
        pytest.param(n, id=name, marks=() if n == VLLM_V1 else pytest.mark.compiles)
        for n, name in enumerate(POLICIES)
    ],
)
