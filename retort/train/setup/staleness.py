"""Whether a run's batches may be written ahead (`rollout.staleness`): checks before anything is loaded."""

from __future__ import annotations

from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.methods._engine import on_policy_only, uncorrected


def generates_older_tokens(config: Config) -> bool:
    """Whether a batch may hold tokens that an older student generated."""
    return config.rollout.staleness > 0 or config.rollout.partial == "resume"


def refusal(config: Config, method: Method) -> str | None:
    """Why the estimator of a method forbids tokens of an older student; None where it does not.

    Args:
        config: The resolved configuration.
        method: The method, without what comes before it.
    """
    reason = on_policy_only(method)
    if reason is None and config.rollout.correction == "none":
        term = uncorrected(method)
        reason = term and f"its term '{term}' is a policy gradient, and rollout.correction=none does not weigh it"
    return reason


def check_staleness(config: Config, method: Method) -> None:
    """Refuses to write ahead what cannot be: a method's estimator, a plan, or an engine forbids it.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.

    Raises:
        UserError: What forbids it, in one line.
    """
    staleness = config.rollout.staleness
    if not staleness:
        return
    engine = config.rollout.engine
    if engine != "vllm" and not config.rollout.workers:
        raise UserError(
            f"rollout.staleness={staleness} needs an engine with weights of its own, and rollout.engine={engine} "
            "writes with the model that learns; set rollout.workers=1 or rollout.engine=vllm (docs/overlap.md), or "
            "rollout.staleness=0"
        )
    for phase in [method] if method.before is None else [method.before[1], method]:
        reason = refusal(config, phase) or _unordered(phase, first=method.before is None)
        if reason is not None:
            raise UserError(
                f"method '{phase.name}' cannot learn from batches that were written ahead "
                f"(rollout.staleness={staleness}): {reason}; set rollout.staleness=0"
            )


def _unordered(method: Method, *, first: bool) -> str | None:
    """What of a method's plan works only while the student is at rest; None for nothing.

    Args:
        method: The method.
        first: Whether the run begins with it.
    """
    plan = method.rollout
    if "teacher" in plan.sources:
        return "the teacher writes some of its completions, in the process that has it score others meanwhile"
    if method.grading is not None:
        return "a judge grades its rollouts by answers that models of this process write"
    asks = next((own.name for own in method.controllers if own.probe is not None and own.probe.source == "student"), "")
    if asks:
        return f"the probe of its controller '{asks}' has the student write between two batches"
    if plan.order is not None and not first:
        return "it orders prompts by how hard they are, which is measured when a cold start is over"
    if plan.controller_outputs and not first:
        return f"its plan follows {plan.controller_outputs[0]}, which is not known during a cold start"
    return None
