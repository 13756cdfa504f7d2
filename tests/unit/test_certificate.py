"""Certificates: accepted as written, rejected at the right line after any change."""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

import planner.search
from planner.api import solve
from planner.certificate import PARTS, seal
from planner.verify import verify
from planner.verify_document import RejectedError, Verified
from planner.verify_master import master_disagrees
from tests.problems import goal, pool, scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.problem import Problem
    from planner.scenario import Scenario

TAMPERED = 200
WORKLOAD = {
    "input_tokens": {"min": 20, "max": 150},
    "output_tokens": {"min": 1, "max": 30},
    "num_requests": 120,
    "arrival": "poisson",
    "request_rate": 40,
}


def busy(**sections: Any) -> Scenario:
    """A small scenario whose certificate has every kind of entry."""
    space = {
        "tp": [1, 2],
        "pp": [1, 2],
        "max_num_seqs": [2, 8, 64],
        "max_num_batched_tokens": [64, 512, 2048],
    }
    return scenario(
        **{
            "workload": WORKLOAD,
            "cluster": pool(4),
            "objective": goal("mean_e2e"),
            "search": {"space": space},
            **sections,
        }
    )


def certified(asked: Scenario) -> str:
    """The certificate of a solve."""
    texts: list[str] = []
    solve(asked, on_certificate=texts.append)
    (text,) = texts
    return text


@pytest.fixture(scope="module")
def certificate() -> str:
    """A certificate with bounded, aborted, exact and identical plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner.search, "_CHECK_EVERY", 500)
        return certified(busy())


def check(text: str, sample: int | None = None) -> tuple[Verified, Problem]:
    """Verify as the command does, all finished runs included."""
    return verify(text, source="c.json", sample=sample)


def resealed(data: dict[str, Any]) -> str:
    """The document of ``data`` with a digest that fits: the work of a careful forger."""
    lines = ["{", f'"header": {json.dumps(data["header"], sort_keys=True)},']
    for part in PARTS:
        rows = [json.dumps(row, sort_keys=True) for row in data[part]]
        lines += [f'"{part}": [', *(f"{row}," for row in rows[:-1]), *rows[-1:], "],"]
    sealed = "\n".join(lines) + "\n"
    return f'{sealed}"digest": "{seal(sealed)}"\n}}\n'


def test_every_kind_is_in_the_certificate_and_accepted(certificate: str) -> None:
    """What the search wrote passes, and the solver agrees."""
    counts = json.loads(certificate)["header"]["counts"]
    assert min(counts[k] for k in ("bounded", "aborted", "exact", "identical")) > 0
    verified, problem = check(certificate)
    assert (verified.status, verified.simulated) == ("optimal", verified.exact)
    assert verified.aborted == counts["aborted"]
    assert master_disagrees(problem, certificate) is None
    assert resealed(json.loads(certificate)) == certificate


def test_a_certificate_is_the_same_bytes_each_time() -> None:
    """Two solves write equal bytes."""
    assert certified(busy()) == certified(busy())


@pytest.mark.parametrize("objective", ["p99_ttft", "throughput", "devices", "mean_tpot"])
def test_certificates_of_other_objectives(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentiles, makespan and counts are proved alike, with SLOs too."""
    monkeypatch.setattr(planner.search, "_CHECK_EVERY", 500)
    for slo in (None, {"ttft_ms": {"p99": 400}}, {"ttft_ms": {"p99": 0.001}}):
        text = certified(busy(objective=goal(objective), slo=slo))
        _, problem = check(text)
        assert master_disagrees(problem, text) is None


def _change_value(data: dict[str, Any], rng: random.Random) -> str:
    entry = rng.choice([e for e in data["entries"] if "score" in e])
    entry["score"][0] += rng.choice([-1, 1]) * rng.choice([1, 1000, 10**7])
    return "entries"


def _drop_plan(data: dict[str, Any], rng: random.Random) -> str:
    data["entries"].pop(rng.randrange(len(data["entries"])))
    return "entries"


def _forge_bound(data: dict[str, Any], rng: random.Random) -> str:
    entry = rng.choice([e for e in data["entries"] if e["by"] in ("exact", "identical")])
    entry.pop("trajectory", None)
    entry.pop("twin", None)
    entry["by"] = "bounded"
    return "entries"


def _change_coefficient(data: dict[str, Any], rng: random.Random) -> str:
    part = rng.choice(["families", "classes"])
    support = rng.choice(data[part])["support"]
    stage = support["kinds"][0]
    kind = rng.randrange(6)
    if kind == 0:
        support["contexts"].pop(0)
    elif kind == 1:
        stage[rng.choice(["work_ps", "each_ps", "first_token_ps", "pass_ps"])] += 10**9
    elif kind == 2:
        at = rng.randrange(len(support["decode_ps"]))
        support["decode_ps"][at] += 10**9
    elif kind == 3:
        support["budget_tokens"] += 1
    elif kind == 4:
        support["full_tokens"][-1] += 1
    else:
        rng.choice(stage["shares"])[rng.randrange(2)] += 10**9
    return part


def _swap_trace(data: dict[str, Any], rng: random.Random) -> str:
    data["header"]["provenance"]["workload"] = f"{rng.getrandbits(256):064x}"
    return "header"


def _change_requests(data: dict[str, Any], rng: random.Random) -> str:
    data["header"]["scenario"]["workload"]["num_requests"] = rng.randrange(100, 119)
    return "header"


def _change_table(data: dict[str, Any], rng: random.Random) -> str:
    if rng.random() < 0.5:
        data["header"]["provenance"]["kernel_table"]["sha256"] = f"{rng.getrandbits(256):064x}"
        return "header"
    part = rng.choice(["families", "classes"])
    rng.choice(data[part])["data"] = f"{rng.getrandbits(128):032x}"
    return part


def _change_engine(data: dict[str, Any], rng: random.Random) -> str:
    version = rng.choice(["0.10.2", "0.22.0", "0.21.9"])
    if rng.random() < 0.5:
        data["header"]["scenario"]["engine"]["version"] = version
    else:
        data["header"]["provenance"]["engine"]["version"] = version
    return "header"


def _name_another(data: dict[str, Any], rng: random.Random) -> str:
    other = rng.choice([e for e in data["entries"] if "score" in e])
    if other["plan"] == data["header"]["incumbent"]["plan"]:
        other = data["entries"][0]
    data["header"]["incumbent"]["plan"] = other["plan"]
    return ""


def _change_memory(data: dict[str, Any], rng: random.Random) -> str:
    group = rng.choice(data["excluded"])
    group["replicas"] = group["replicas"][1:] or [99]
    return "excluded"


def _change_stop(data: dict[str, Any], rng: random.Random) -> str:
    entry = rng.choice([e for e in data["entries"] if e["by"] == "aborted"])
    entry["score"][0] += 1
    return "entries"


CHANGES: tuple[Callable[[dict[str, Any], random.Random], str], ...] = (
    _change_value,
    _drop_plan,
    _forge_bound,
    _change_coefficient,
    _swap_trace,
    _change_requests,
    _change_table,
    _change_engine,
    _name_another,
    _change_memory,
    _change_stop,
)


@pytest.mark.parametrize("change", CHANGES)
def test_tampered_certificates_are_rejected(
    change: Callable[[dict[str, Any], random.Random], str], certificate: str
) -> None:
    """Each kind of change is found by what it claims, its digest having been mended."""
    original = json.loads(certificate)
    wanted, rejected = -(-TAMPERED // len(CHANGES)), 0
    for seed in range(2 * wanted):  # a draw may put back the value that it replaces
        data = copy.deepcopy(original)
        part = change(data, random.Random(seed))
        if data == original or rejected == wanted:
            continue
        text = resealed(data)
        with pytest.raises(RejectedError) as caught:
            check(text)
        assert part in str(caught.value), str(caught.value)
        line = text.splitlines()[caught.value.line - 1]
        assert line.startswith(('{"', '"header"')), line
        rejected += 1
    assert rejected == wanted


def test_a_damaged_file_is_rejected(certificate: str) -> None:
    """A change of white space alone, which claims nothing else, breaks the digest."""
    with pytest.raises(RejectedError, match="digest"):
        check(certificate.replace('", "', '",  "', 1))
