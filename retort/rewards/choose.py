"""Chooses the grader of a task: one that ships with Retort, by name, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

from retort.core.rollouts import Prompt
from retort.errors import UserError, did_you_mean
from retort.rewards.base import ByText, Grader, Verifier
from retort.rewards.user import imported, is_user_defined, user_grader
from retort.rewards.verify import NEED_ANSWER, VERIFIERS, MathVerifier, check_gradable, reference_answer


def grader_for(task: str | None, prompts: Sequence[Prompt]) -> Grader | None:
    """The grader of a task: its verifier for one completion after another, or an object of the user's own.

    Args:
        task: As for `verifier_for`; `module:name` may also name an object with a method `grade(group)`.
        prompts: As for `verifier_for`.

    Returns:
        The grader, or None if completions get no reward.

    Raises:
        UserError: As `verifier_for`.
    """
    if is_user_defined(task):
        return user_grader(imported(str(task)), str(task), prompts[0])
    verifier = verifier_for(task, prompts)
    return None if verifier is None else ByText(verifier)


def verifier_for(task: str | None, prompts: Sequence[Prompt]) -> Verifier | None:
    """The verifier of a task.

    Args:
        task: `countdown`, `ranking`, `coached`, `bait`, `shapes`, `math`, `exact`, or `module:function`; None means
            `math` if every prompt has an answer, else no verifier.
        prompts: The prompts whose completions are graded; `math` and `exact` need an answer in each.

    Returns:
        The verifier, or None if responses get no reward.

    Raises:
        UserError: The task is unknown, its function does not work, a prompt has no answer or one that cannot be graded,
            or math-verify is not installed.
    """
    if task is None:
        if not prompts or any(prompt.answer is None for prompt in prompts):
            return None
        task = MathVerifier.name
    if is_user_defined(task):
        own = user_grader(imported(task), task, prompts[0])
        if not isinstance(own, ByText):
            raise UserError(f"task = {task}: that grades groups, not single completions; `grader_for` takes it")
        return own.verifier
    if task not in VERIFIERS:
        raise UserError(f"task: there is no verifier '{task}'; {did_you_mean(task, VERIFIERS)}")
    if task in NEED_ANSWER:
        for prompt in prompts:
            reference_answer(prompt, task)
    if task == MathVerifier.name:
        check_gradable(prompts)
    return VERIFIERS[task]()
