"""Where the chosen plan's kernel times come from: labels, shares of time, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.cost import Load
from simulator.interpolate import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.problem import Problem
    from simulator.plan import Plan
    from simulator.run import RunResult


def operator_labels(problem: Problem, plan: Plan, result: RunResult) -> dict[str, Provenance]:
    """Where the time of each operator comes from, at the run's largest batch."""
    usage = result.usage
    return problem.pool_of(plan.shape).compiler.provenance(
        plan.shape,
        tokens=usage.tokens,
        sequences=usage.seats,
        context=max(1, problem.tokens_held(plan.shape, usage.blocks) // usage.seats),
        longest=int(problem.workload.prompt_tokens.max()),
    )


def provenance_of(
    problem: Problem, plan: Plan, result: RunResult, labels: Mapping[str, Provenance]
) -> dict[str, object]:
    """The problem's digests, each operator's label, and the share of time that a label holds."""
    compiler = problem.pool_of(plan.shape).compiler
    seconds = compiler.time_by_label(plan.shape, load_of(problem, result))
    total = sum(seconds.values())
    return {
        **problem.provenance,
        "operators": {name: label.name.lower() for name, label in labels.items()},
        "kernel_time_share": {
            label.name.lower(): share / total for label, share in seconds.items()
        },
    }


def load_of(problem: Problem, result: RunResult) -> Load:
    """The run's mean iteration; what preempted requests compute again is left out."""
    work = problem.workload
    prompts, outputs = work.prompt_tokens, work.output_tokens
    # The iteration that ends a prompt emits its first token; each later one is a decode.
    decodes = int(outputs.sum()) - len(outputs)
    held = float((outputs * (prompts + outputs / 2)).sum() / outputs.sum())
    return Load(
        iterations=result.iterations,
        tokens=(int(prompts.sum()) + decodes) / result.iterations,
        prompt_tokens=int(prompts.sum()) / result.iterations,
        decodes=decodes / result.iterations,
        context=held,
        sampled=int(outputs.sum()) / result.iterations,
        prompts=prompts,
    )


def warnings_of(problem: Problem, plan: Plan, labels: Mapping[str, Provenance]) -> tuple[str, ...]:
    """The problem's warnings, and operators of ``plan`` that no measurement covers.

    Of a device whose times are all scaled from another's a warning has said so already.
    """
    is_estimated = problem.pool_of(plan.shape).compiler.is_estimated
    least = Provenance.ROOFLINE if is_estimated else Provenance.EXTRAPOLATED
    weak = [f"{name} ({label.name.lower()})" for name, label in labels.items() if label >= least]
    if not weak:
        return problem.warnings
    return (*problem.warnings, f"outside the measured kernel tables: {', '.join(weak)}")
