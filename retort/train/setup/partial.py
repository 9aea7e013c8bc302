"""What becomes of completions that do not end within a batch (`rollout.partial`): checks, and who sees to it."""

from __future__ import annotations

from collections.abc import Sequence

from retort.config import Config
from retort.config.rollouts import RolloutSection
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.train.setup.staleness import refusal
from retort.train.source.partial import Dropped, Partial, Resumed, Waited


def partial_of(config: Config) -> Partial:
    """What becomes of completions that do not end within the budget of a run.

    Args:
        config: The resolved configuration, which `check_partial` has checked.

    Raises:
        UserError: The longest completion was made to fit the student, and is within the budget now.
    """
    asked = config.rollout
    if asked.partial == "wait" or asked.segment_tokens is None:
        return Waited()
    _need_less(asked, asked.segment_tokens)
    return Dropped(tokens=asked.segment_tokens) if asked.partial == "drop" else Resumed(asked.segment_tokens)


def check_partial(config: Config, method: Method) -> None:
    """Refuses a budget of tokens that cannot be kept, before anything is loaded.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.

    Raises:
        UserError: The budget, the environment, the method's plan or its estimator forbids it, in one line.
    """
    asked = config.rollout
    budget = asked.segment_tokens
    if asked.partial == "wait":
        if budget is not None:
            raise UserError(
                f"rollout.segment_tokens={budget} belongs to rollout.partial=drop or resume, and it is wait; set one "
                "of them, or leave the tokens out"
            )
        return
    named = f"rollout.partial={asked.partial}"
    if budget is None:
        raise UserError(
            f"{named} needs rollout.segment_tokens, the most tokens that a completion gets in one batch "
            "(docs/overlap.md)"
        )
    _need_less(asked, budget)
    if config.environment is not None:
        raise UserError(
            f"{named} is for single completions, and environment '{config.environment}' replies to the student; set "
            "rollout.partial=wait"
        )
    if "student" not in method.rollout.sources:
        raise UserError(
            f"{named} is about completions of the student, which generates none for method '{method.name}'; set "
            "rollout.partial=wait"
        )
    if asked.partial == "resume":
        for phase in [method] if method.before is None else [method.before[1], method]:
            reason = refusal(config, phase) or (_plan(phase) if phase is method else _before(phase))
            if reason is not None:
                raise UserError(
                    f"method '{phase.name}' cannot learn from completions that go on with newer weights ({named}): "
                    f"{reason}; set rollout.partial=wait or drop"
                )


def refuse_images(config: Config, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts with images where completions go on: an open one cannot wait in a checkpoint.

    Raises:
        UserError: There is such a prompt.
    """
    shown = next((prompt for prompt in prompts if prompt.images), None)
    if config.rollout.partial == "resume" and shown is not None:
        raise UserError(
            f"prompt '{shown.id}' holds an image, and rollout.partial=resume is for text alone; set it to wait or drop"
        )


def _need_less(asked: RolloutSection, budget: int) -> None:
    """Refuses a budget that no completion would use up."""
    if budget >= asked.max_new_tokens:
        raise UserError(
            f"rollout.segment_tokens={budget} must be less than rollout.max_new_tokens={asked.max_new_tokens}, or it "
            f"stops no completion; lower it, or leave rollout.partial={asked.partial} out"
        )


def _plan(method: Method) -> str | None:
    """What of a method's plan needs whole completions, or chooses prompts without regard to open ones."""
    plan = method.rollout
    if plan.replay is not None:
        return "it replays earlier batches"
    if plan.order is not None:
        return "it orders prompts by how hard they are, whichever are open"
    if plan.prompt_view is not None:
        return f"its student reads the prompt of view '{plan.prompt_view}', which may change between two batches"
    if plan.horizon is not None and not isinstance(plan.horizon, int | float):
        return "its longest completion changes between two batches"
    return None


def _before(method: Method) -> str | None:
    """What forbids a method in front of another one, whose completions would go on in the latter's batches."""
    return "its student generates, before another method takes over" if "student" in method.rollout.sources else None
