"""The Python examples of docs/autoscaling.md run and print what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from planner.errors import InfeasibleError

if TYPE_CHECKING:
    import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "autoscaling.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The Python block after a mark."""
    found = re.search(rf"^<!-- {name} -->\n```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert found is not None
    return found[1]


def test_session_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The block prints what the page shows after it."""
    shown = re.search(r"^prints\n\n```\n(.*?)^```$", PAGE, re.M | re.S)
    assert shown is not None
    exec(block("session"), {})
    assert capsys.readouterr().out == shown[1]


class Message(SimpleNamespace):
    """A protobuf message with the fields that it was made with."""


def test_keda_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty lines at most; the metric is the number of replicas, the pool's where that is short."""
    assert 40 >= sum(bool(line.strip()) for line in block("keda").splitlines()) > 20
    stubs: Any = ModuleType("externalscaler_pb2")
    for name in ("IsActiveResponse", "MetricSpec", "GetMetricSpecResponse"):
        setattr(stubs, name, Message)
    stubs.MetricValue = stubs.GetMetricsResponse = Message
    services: Any = ModuleType("externalscaler_pb2_grpc")
    services.ExternalScalerServicer = object
    monkeypatch.setitem(sys.modules, "externalscaler_pb2", stubs)
    monkeypatch.setitem(sys.modules, "externalscaler_pb2_grpc", services)
    monkeypatch.setitem(sys.modules, "grpc", ModuleType("grpc"))
    monkeypatch.setenv("PLAN", "tp1")
    monkeypatch.setenv("MAX_REPLICAS", "8")

    class Stub:
        def replicas_for(self, plan: str, rate: float) -> int:
            assert plan == "tp1"
            if rate > 50:
                raise InfeasibleError("too much", "")
            return round(rate)

    names: dict[str, Any] = {}
    exec(block("keda"), names)
    for rate, replicas in ((3.0, 3), (90.0, 8)):
        scaler = names["Scaler"](Stub(), lambda rate=rate: rate)
        assert scaler.GetMetrics(None, None).metricValues[0].metricValue == replicas
    assert scaler.GetMetricSpec(None, None).metricSpecs[0].targetSize == 1
    assert scaler.IsActive(None, None).result
