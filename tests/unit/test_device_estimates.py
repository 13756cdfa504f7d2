"""Cross-prediction of measured devices: errors as by hand, and the figures of the docs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import device_estimates
from bench.device_estimates import A100, H100, H200, L40S, RTX_PRO, Relative, judge, pcie_box
from bench.figures import flatten
from planner.io.devices import load_device
from simulator.device import Device
from simulator.table import AttentionSeries, GemmGrid, KernelTable, MessageSeries, MoeGrid

DOC = Path(__file__).parents[2] / "docs" / "add-a-device.md"
US = 1e-6
NAN = float("nan")


def device(name: str, *, flops: float, sm_hz: float, link: float) -> Device:
    """A pair of devices joined by NVLink, of endless memory bandwidth: only arithmetic counts."""
    return Device(
        name, 1, np.inf, flops, 0.0, link, 2, US, 1e12, None, nvlink_domain=2, sm_hz=sm_hz
    )


def ints(*numbers: int) -> np.ndarray:
    """An axis."""
    return np.array(numbers, np.int32)


def us(*times: float) -> np.ndarray:
    """Seconds of microseconds."""
    return US * np.array(times)


def table(
    name: str, gemm: GemmGrid, moe: MoeGrid, nccl: MessageSeries, context: AttentionSeries
) -> KernelTable:
    """A table of four families; fp8 products are those at bf16, on devices that cannot run it."""
    return KernelTable(
        device=name,
        engine="vllm",
        engine_version="1.0.0",
        gemm={"bf16": gemm, "fp8": gemm},
        context=(context,),
        generation=(),
        all_reduce={},
        nccl={("all_reduce", 2): nccl},
        moe={"bf16": moe},
    )


def attention(heads: int) -> AttentionSeries:
    """One prompt on a rank of so many heads."""
    return AttentionSeries(64, 0, "bf16", heads, 1, ints(1), ints(64), us(3).reshape(1, 1))


def experts(layouts: list[tuple[float, ...]], times: list[list[float]], *tokens: int) -> MoeGrid:
    """Layouts as (skew, experts)."""
    rows = [(250, 125, 1, int(number), 1, 1, 0) for _, number in layouts]
    skew = np.array([one for one, _ in layouts])
    return MoeGrid(np.array(rows, np.int32), skew, ints(*tokens), US * np.array(times))


# Products: 10 tokens are 2 * 10 * 100 * 500 = 1e6 operations, 1 us on the source and 0.5 us on the
# target. Experts: 8 tokens are 2 * 8 * (2 * 250 * 125) = 1e6 too.
SOURCE = Relative(
    device("source", flops=1e12, sm_hz=1e9, link=1e10),
    table(
        "source",
        GemmGrid(ints(1, 5, 10), ints(100), ints(500), us(2, NAN, 5).reshape(3, 1, 1)),
        experts([(0.0, 4), (1.2, 4)], [[2, 9], [3, 6]], 4, 8),
        MessageSeries(ints(1, 8), us(4, 14)),
        attention(8),
    ),
)
TARGET = Relative(
    device("target", flops=2e12, sm_hz=4e9, link=2e10),
    table(
        "target",
        GemmGrid(ints(1, 5, 10, 20), ints(50, 100), ints(500), np.full((4, 2, 1), NAN)),
        experts([(0.0, 8), (1.2, 4)], [[7], [5]], 8),
        MessageSeries(ints(1, 8), us(4, 10)),
        attention(4),
    ),
)
TARGET.table.gemm["bf16"].time_s[:, 1, 0] = us(2.5, 3, 4, 9)


def test_the_errors_are_those_by_hand() -> None:
    """Only shared cells count, wherever each table holds them; each figure is computed by hand."""
    found = judge(SOURCE, TARGET)
    # No fp8 (neither device runs it), and no attention: no rank has as many heads.
    assert set(found) == {("GEMM", "bf16"), ("MoE", "bf16"), ("NCCL", "2 devices")}
    # 2 us stays against 2.5: 20 %. 5 us = 2 floor + 1 ideal / 2 + 2 rest / 4 = 3 against 4: 25 %.
    # As they are: 2 / 2.5 and 5 / 4; halved: 1 / 2.5 and 2.5 / 4.
    assert found["GEMM", "bf16"] == pytest.approx((2, 22.5, 24.5, 22.5, (60 + 37.5) / 2))
    # 6 us = 2 floor + 1 ideal / 2 + 3 rest / 4 = 3.25 against 5; as it is 6, halved 3.
    assert found["MoE", "bf16"] == pytest.approx((1, 35, 35, 20, 40))
    # 4 us stays, 14 us = 4 latency + 10 / 2 = 9 against 10; as it is 14; no ideal time.
    assert found["NCCL", "2 devices"][:4] == pytest.approx((2, 5, 9, 20))
    assert found["NCCL", "2 devices"].ratio_pct is None


@pytest.mark.parametrize("name", [A100, L40S])
def test_a_device_predicts_itself(name: str) -> None:
    """Every measured cell is compared with itself, over NVLink as over PCIe, and none is off."""
    own = device_estimates.measured(name, "vllm")
    found = judge(own, own, pcie_box(name, name, "vllm"))
    cells = dict.fromkeys(found, 0)
    for _, kernel in device_estimates.kernels(own.table):
        cells[kernel.name] += int((~np.isnan(kernel.time_s)).sum())
    assert {key: figures.n for key, figures in found.items()} == cells
    assert len(found) > 10
    for figures in found.values():
        assert figures.p90_abs_pct < 1e-10
        assert figures.same_times_pct == 0


def test_collectives_over_pcie_come_from_a_box() -> None:
    """The source where it is one, else another than the target; none where NVLink joins all."""
    boxes = {pair: pcie_box(*pair, "vllm") for pair in device_estimates.PAIRS}
    names = {pair: box and box.device.name for pair, box in boxes.items()}
    assert names[RTX_PRO, L40S] == names[A100, L40S] == RTX_PRO
    assert names[L40S, RTX_PRO] == L40S
    assert names[H100, H200] is None
    assert load_device(H200).nvlink_domain > 1


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command."""
    monkeypatch.setattr(sys, "argv", ["device_estimates", *arguments])
    device_estimates.main()


def test_the_command_gives_the_figures_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows of the table in the docs, whole; and ``bench.figures`` can record the output."""
    out = tmp_path / "out.json"
    run(monkeypatch, "--pairs", f"{H100}:{A100}", f"{A100}:{L40S}", "--json", str(out))
    assert f"{A100} (vllm 0.14.0) from {H100} (0.24.0)" in capsys.readouterr().out
    pairs = json.loads(out.read_text(encoding="utf-8"))["vllm"]
    rows = [line.strip("|").split("|") for line in DOC.read_text("utf-8").splitlines()]
    head = next(row for row in rows if row[0].strip() == "predicted")
    for target, source, pair in (
        ("A100", "H100", f"{A100} from {H100}"),
        ("L40S", "A100", f"{L40S} from {A100}"),
    ):
        (row,) = (row for row in rows if [one.strip() for one in row[:2]] == [target, source])
        for column, cell in zip(head[2:], row[2:], strict=True):
            family, _, kind = column.strip().partition(" ")
            if family in ("GEMM", "MoE"):
                figures = pairs[pair].get(family, {}).get(kind)
            else:
                figures = pairs[pair].get(column.strip(), {}).get("all")
            printed = (
                figures and f"{figures['median_abs_pct']:.0f} % ({figures['p90_abs_pct']:.0f})"
            )
            assert cell.strip() == (printed or ""), (pair, column)
    path = f"vllm.{A100} from {H100}.GEMM.bf16"
    flat = flatten({"vllm": pairs})
    assert 0 < flat[f"{path}.median_abs_pct"] < flat[f"{path}.p90_abs_pct"]
    assert f"{path}.same_times_pct" not in flat


@pytest.mark.parametrize("pair", ["H100", "L40S:B300-SXM", "L4:L40S"])
def test_a_pair_that_cannot_be_judged_is_refused(
    pair: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No pair; a device whose multiprocessors are not known; one that nobody measured."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--pairs", pair)
    assert f"--pairs '{pair}' must be MEASURED:PREDICTED, two of: A100" in capsys.readouterr().err
