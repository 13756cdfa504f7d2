"""Checking a certificate: what it claims is recomputed, and the first thing that is wrong is named.

Neither the search nor the solver is imported here, nor the code that finds bounds. The scenario in
the certificate is resolved anew; then

1. digests, objective and order of ties must be those of the scenario and of the data at hand;
2. the space is counted again, rule by rule, with the bytes behind every memory rule;
3. every support must lie below the compiled cost at every batch size;
4. every bound is evaluated again from its support and must come to the same value;
5. incumbent, aborted runs and a sample of the finished ones are simulated again, with the plain
   loop, which steps through every iteration;
6. every plan but the incumbent must break a constraint or come after it in the order.

The master's part, that the solver too finds nothing below the incumbent, is
:mod:`planner.verify_master`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from planner.candidates import Trace
from planner.certificate import (
    Kind,
    data_digest,
    excluded_groups,
    facts,
    seal,
)
from planner.errors import InputError
from planner.objective import ITL, Outcome
from planner.resolve import resolve
from planner.scenario import Scenario
from planner.space import enumerate_space
from planner.verify_bounds import Floors, cacheable, floors_of, lower_outcome
from planner.verify_document import Document, RejectedError, Verified, difference
from planner.verify_support import budgets_of, lowest_cost, widest_limits, wrong_claim
from simulator.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from planner.problem import Problem
    from simulator.plan import BatchingLimits, Shape
    from simulator.run import Run, RunResult

SAMPLE: Final = 16
"""Finished runs that are simulated again where no other number is asked for."""

_BEYOND: Final = 64
"""Iterations after the recorded stop within which the plain loop must have seen the bound too: the
jump engine looks between two of its events, which may lie after several of the plain loop's."""


def verify(
    text: str,
    *,
    source: str,
    base_dir: Path | None = None,
    sample: int | None = SAMPLE,
) -> tuple[Verified, Problem]:
    """Check a certificate.

    Parameters
    ----------
    text, source
        The certificate, and what messages call it.
    base_dir
        Folder of the files that its scenario names.
    sample
        Finished runs to simulate again beside the incumbent's; ``None`` for all.

    Raises
    ------
    RejectedError
        When something in it is wrong.
    InputError
        When it is no certificate, or its scenario names files that are not there.
    """
    document = Document.read(text, source)
    try:
        return _Verifier.of(document, text, source, base_dir).run(sample)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        what = f"is not of a certificate's form: {type(error).__name__}: {error}"
        raise RejectedError(1, what) from None


@dataclass
class _Verifier:
    document: Document
    text: str
    problem: Problem
    plans: dict[str, Plan]
    cached: npt.NDArray[np.int64]
    families: dict[Shape, Floors] = field(default_factory=dict)
    classes: dict[tuple[Shape, BatchingLimits], Floors] = field(default_factory=dict)
    outcomes: dict[tuple[Shape, int], Outcome] = field(default_factory=dict)
    results: dict[str, RunResult] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Document, text: str, source: str, base_dir: Path | None) -> _Verifier:
        header = document.data["header"]
        scenario = Scenario.model_validate(header["scenario"], base_dir=base_dir, source=source)
        try:
            problem = resolve(scenario)
        except InputError as error:
            if error.field.startswith("workload"):
                raise  # the trace is not there: nothing can be said
            raise document.reject("header", 0, str(error)) from None
        mine = json.loads(json.dumps(facts(scenario, problem)))
        for name, value in mine.items():
            if header[name] != value:
                where = difference(name, header[name], value)
                raise document.reject("header", 0, f"{where} is not that of the data at hand")
        space = enumerate_space(problem)
        plans = {problem.plan_text(p): p for p in space.plans}
        return cls(document, text, problem, plans, cacheable(problem.workload, problem.rules))

    @property
    def entries(self) -> list[dict[str, Any]]:
        return list(self.document.data["entries"])

    def run(self, sample: int | None) -> tuple[Verified, Problem]:
        self._check_space()
        supports = self._check_supports()
        by_kind: dict[str, list[int]] = {kind.value: [] for kind in Kind}
        for i, entry in enumerate(self.entries):
            if entry["by"] not in by_kind:
                raise self._wrong(i, f"{entry['by']!r} settles nothing")
            by_kind[entry["by"]].append(i)
        for i in by_kind["bounded"]:
            self._check_bounded(i)
        exact = by_kind["exact"]
        again = exact if sample is None else self._sample(exact, sample)
        for i in again:
            self._check_exact(i)
        for i in by_kind["identical"]:
            self._check_identical(i, simulate=sample is None)
        for i in by_kind["aborted"]:
            self._check_aborted(i)
        self._check_order()
        self._check_counts(by_kind)
        self._check_seal()
        incumbent = self.document.data["header"]["incumbent"]
        verified = Verified(
            status=self.document.data["header"]["status"],
            plan=incumbent["plan"] if incumbent else None,
            excluded=sum(len(g["replicas"]) for g in self.document.data["excluded"]),
            bounded=len(by_kind["bounded"]),
            supports=supports,
            simulated=len(again),
            exact=len(exact),
            aborted=len(by_kind["aborted"]),
        )
        return verified, self.problem

    # -- space and classes

    def _check_space(self) -> None:
        mine = list(excluded_groups(self.problem))
        theirs = self.document.data["excluded"]
        for i, (their, own) in enumerate(zip(theirs, mine, strict=False)):
            if their != own:
                where = difference(own["class"], their, own)
                raise self.document.reject("excluded", i, f"{where} is wrong")
        if len(mine) != len(theirs):
            raise self.document.reject(
                "excluded", min(len(mine), len(theirs)), f"{len(theirs)} groups, not {len(mine)}"
            )
        for i, (entry, plan) in enumerate(zip(self.entries, self.plans, strict=False)):
            if entry["plan"] != plan:
                raise self._wrong(i, f"plan {plan} of the space is missing before this entry")
        if len(self.entries) != len(self.plans):
            missing = len(self.plans) - len(self.entries)
            raise self._wrong(len(self.entries) - 1, f"{missing} plans of the space are missing")

    def _check_supports(self) -> int:
        """Judge every support; afterwards bounds may rest on them."""
        members: dict[Shape, list[BatchingLimits]] = {}
        for plan in self.plans.values():
            members.setdefault(plan.shape, []).append(plan.limits)
        families = self.document.data["families"]
        if len(families) != len(members):
            raise self.document.reject("families", 0, f"{len(families)}, not {len(members)}")
        for i, (row, (shape, each)) in enumerate(zip(families, members.items(), strict=True)):
            distinct = list(dict.fromkeys(each))
            self.families[shape] = self._judge("families", i, row, shape, distinct)
        names = {
            self.problem.plan_text(Plan(1, p.shape, p.limits)): (p.shape, p.limits)
            for p in self.plans.values()
        }
        classes = self.document.data["classes"]
        for i, row in enumerate(classes):
            if row["class"] not in names:
                raise self.document.reject("classes", i, f"{row['class']} is no replica that runs")
            shape, limits = names[row["class"]]
            self.classes[shape, limits] = self._judge("classes", i, row, shape, [limits])
        return len(families) + len(classes)

    def _judge(
        self, part: str, i: int, row: dict[str, Any], shape: Shape, members: list[BatchingLimits]
    ) -> Floors:
        """Check one support against the costs of all its members."""
        problem = self.problem
        name = shape.text if part == "families" else problem.plan_text(Plan(1, shape, members[0]))
        if row["class"] != name:
            raise self.document.reject(part, i, f"{name} is missing")
        costs = [problem.compile(shape, limits) for limits in members]
        cost = costs[0] if len(costs) == 1 else lowest_cost(costs)
        limits = widest_limits([problem.replica_limits(Plan(1, shape, each)) for each in members])
        if row["data"] != data_digest(cost, limits):
            raise self.document.reject(part, i, f"{name}: cost or limits are other ones")
        budgets = budgets_of(problem, members)
        wrong = wrong_claim(row["support"], cost, limits, problem.rules, budgets)
        if wrong is not None:
            raise self.document.reject(part, i, f"{name}: {wrong}")
        return floors_of(row["support"], cost, limits, problem.workload, self.cached)

    # -- entries

    def _check_bounded(self, i: int) -> None:
        entry = self.entries[i]
        plan = self.plans[entry["plan"]]
        if entry.get("own", False):
            self._check_values(i, self._lower(self._start(plan), plan, self._floors(i, plan)))
            return
        key = plan.shape, plan.replicas
        if key not in self.outcomes:
            known = self.families[plan.shape]
            self.outcomes[key] = self._lower(self._start(plan), plan, known)
        self._check_values(i, self.outcomes[key])

    def _check_aborted(self, i: int) -> None:
        entry = self.entries[i]
        plan, ran = self.plans[entry["plan"]], self.plans[entry["run"]]
        run, stop, known = self._start(ran), entry["iterations"], self._floors(i, plan)
        if not isinstance(stop, int) or stop < 1:
            raise self._wrong(i, f"stopped after {stop!r} iterations")
        done = run.advance(stop)
        for _ in range(_BEYOND):
            if ran != plan and not self._runs_alike(run, ran, plan):
                raise self._wrong(i, f"does not run as {entry['run']} so far")
            outcome = self._lower(run, plan, known)
            if self._matches(entry, outcome):
                return
            if done:
                break
            done = run.advance(1)
        raise self._wrong(i, f"after {stop} iterations the bound is not what is claimed")

    def _check_exact(self, i: int) -> None:
        entry = self.entries[i]
        plan = self.plans[entry["plan"]]
        result = self._result(entry["plan"])
        if result.trajectory_hash() != entry["trajectory"]:
            raise self._wrong(i, "runs through other states")
        self._check_values(i, self.problem.outcome(plan, result))

    def _check_identical(self, i: int, *, simulate: bool) -> None:
        entry = self.entries[i]
        twin = next((e for e in self.entries if e["plan"] == entry["twin"]), None)
        if twin is None or twin["by"] != Kind.EXACT.value:
            raise self._wrong(i, f"its twin {entry['twin']} was not simulated")
        same = [(e.get("score"), e.get("breaks")) for e in (entry, twin)]
        if same[0] != same[1]:
            raise self._wrong(i, f"has other values than its twin {entry['twin']}")
        if not simulate and entry["twin"] not in self.results:
            return
        plan, ran = self.plans[entry["plan"]], self.plans[entry["twin"]]
        run = self._start(ran)
        run.finish()
        if not self._runs_alike(run, ran, plan):
            raise self._wrong(i, f"does not run as {entry['twin']}")

    def _check_order(self) -> None:
        """Nothing may be better than the incumbent, or than the bound of a stopped search."""
        header = self.document.data["header"]
        incumbent, status, bound = header["incumbent"], header["status"], header["bound"]
        if status not in ("optimal", "feasible", "infeasible"):
            raise self.document.reject("header", 0, f"status {status!r} is none")
        if (incumbent is None) != (status == "infeasible"):
            raise self.document.reject("header", 0, f"{status} with incumbent {incumbent}")
        best = None if incumbent is None else self._check_incumbent(incumbent)
        left = {i: e["score"] for i, e in enumerate(self.entries) if not e.get("breaks")}
        if bound != min((score[0] for score in left.values()), default=None):
            raise self.document.reject("header", 0, f"bound {bound} is not what the entries show")
        for i, score in left.items():
            if status != "feasible" and (best is None or (score, i) < best):
                raise self._wrong(i, f"may be better than the claim, with {score}")

    def _check_incumbent(self, incumbent: dict[str, Any]) -> tuple[list[int], int]:
        """Simulate the incumbent; its place in the order of plans."""
        names = [entry["plan"] for entry in self.entries]
        if incumbent["plan"] not in names:
            raise self.document.reject("header", 0, "the incumbent is no plan of the space")
        rank = names.index(incumbent["plan"])
        entry, plan = self.entries[rank], self.plans[incumbent["plan"]]
        if entry.get("breaks") or entry["by"] not in ("exact", "identical"):
            raise self._wrong(rank, "is the incumbent, but was not simulated or breaks a limit")
        if entry["score"] != incumbent["score"]:
            raise self.document.reject("header", 0, "the incumbent's score is not its entry's")
        result = self._result(incumbent["plan"])
        if result.trajectory_hash() != incumbent["trajectory"]:
            raise self.document.reject("header", 0, "the incumbent runs through other states")
        self._check_values(rank, self.problem.outcome(plan, result))
        return incumbent["score"], rank

    def _check_counts(self, by_kind: dict[str, list[int]]) -> None:
        space = enumerate_space(self.problem)
        counts = {
            "space": space.size,
            "excluded": dict(space.excluded),
            **{kind: len(rows) for kind, rows in by_kind.items()},
        }
        if self.document.data["header"]["counts"] != counts:
            where = difference("counts", self.document.data["header"]["counts"], counts)
            raise self.document.reject("header", 0, f"{where} is wrong")

    def _check_seal(self) -> None:
        sealed = "".join(self.text.splitlines(keepends=True)[:-2])
        if self.document.data["digest"] != seal(sealed):
            line = len(self.text.splitlines()) - 1
            raise RejectedError(line, "digest: the file was changed after it was written")

    # -- helpers

    def _wrong(self, i: int, what: str) -> RejectedError:
        return self.document.reject("entries", i, f"{self.entries[i]['plan']}: {what}")

    def _floors(self, i: int, plan: Plan) -> Floors:
        """Floors of an entry's own class."""
        if (plan.shape, plan.limits) not in self.classes:
            raise self._wrong(i, "its bound rests on a class that is missing")
        return self.classes[plan.shape, plan.limits]

    def _start(self, plan: Plan) -> Run:
        return self.problem.start(plan, record_gaps=self._records_gaps, plain=True)

    @property
    def _records_gaps(self) -> bool:
        constraints = self.problem.constraints
        return self.problem.objective.needs_gaps or any(c.metric == ITL for c in constraints)

    def _lower(self, run: Run, plan: Plan, known: Floors) -> Outcome:
        price = self.problem.micros_per_hour(plan)
        return lower_outcome(run, plan, known, price, with_gaps=self._records_gaps)

    def _result(self, name: str) -> RunResult:
        if name not in self.results:
            self.results[name] = self._start(self.plans[name]).finish()
        return self.results[name]

    def _runs_alike(self, run: Run, ran: Plan, plan: Plan) -> bool:
        trace = Trace(ran, run.limits, run.cost, run.usage())
        cost = self.problem.compile(plan.shape, plan.limits)
        return bool(trace.same_for(plan, self.problem.replica_limits(plan), cost))

    def _matches(self, entry: dict[str, Any], outcome: Outcome) -> bool:
        """Whether what an entry claims is what ``outcome`` shows."""
        broken = [c.name for c in self.problem.constraints if c.is_broken(outcome)]
        score = list(self.problem.objective.score(outcome))
        if "score" not in entry and not broken:
            return False
        return bool(entry.get("breaks", []) == broken and entry.get("score", score) == score)

    def _check_values(self, i: int, outcome: Outcome) -> None:
        if not self._matches(self.entries[i], outcome):
            score = list(self.problem.objective.score(outcome))
            broken = [c.name for c in self.problem.constraints if c.is_broken(outcome)]
            raise self._wrong(i, f"has score {score} and breaks {broken}, not what is claimed")

    def _sample(self, rows: list[int], number: int) -> list[int]:
        """Which finished runs are simulated again: drawn by the file's own digest."""
        draw = random.Random(self.document.data["digest"])
        return sorted(draw.sample(rows, min(number, len(rows))))
