"""Who grades training rollouts by a rubric, for methods that learn from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retort.chat.asking import Asking
from retort.config import Config
from retort.core.grading import RubricPlan
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.rewards.base import Grader
from retort.rewards.references import AskedReferences, References, StoredReferences
from retort.rewards.rubric_grader import RubricGrader
from retort.rewards.rubric_protocol import need_text
from retort.teachers.templates import templates

__all__ = ["need_rubricator", "rubric_grader"]


def need_rubricator(config: Config, method: Method) -> None:
    """Refuses a method that learns from a rubric where nobody is named who draws it, and a judge whom nobody asks.

    Raises:
        UserError: There is no judge, or one that the method does not ask; completions are turns in an environment.
    """
    judge = config.judge.model or config.judge.replay
    if method.grading is None:
        if judge is not None:
            named = "judge.model" if config.judge.model else "judge.replay"
            raise UserError(
                f"{named} = {judge} is given, but method '{method.name}' asks no judge; leave it out, or choose a "
                "method that learns from a rubric, such as ropd"
            )
        return
    if judge is None:
        raise UserError(
            f"method '{method.name}' learns from a rubric, which a model that talks draws and applies; name it with "
            "--judge (an address such as http://127.0.0.1:8000, or a model folder; see docs/judges.md)"
        )
    if config.environment is not None:
        raise UserError(
            f"method '{method.name}' grades whole completions by a rubric, and in the environment "
            f"'{config.environment}' there are turns; choose a method that learns from the environment's reward"
        )


def rubric_grader(
    config: Config, method: Method, prompts: Sequence[Prompt], asker: Asking | None, verifier: Grader | None
) -> Grader | None:
    """The grader by rubric of a run; None for methods that want none.

    Args:
        config: The resolved configuration.
        method: The method.
        prompts: The training prompts.
        asker: Asks the judge.
        verifier: The task's own grader, whose grades are recorded beside, where there is one.

    Raises:
        UserError: The file of references is of another teacher, damaged, or lacks a prompt; or a prompt has tools.
    """
    plan = method.grading
    if plan is None or asker is None:
        return None
    need_text(prompts)
    references = _references(config, plan, asker)
    references.need(prompts)
    return RubricGrader(asker, plan, references, templates(config.templates), seed=config.seed, verifier=verifier)


def _references(config: Config, plan: RubricPlan, asker: Asking) -> References:
    if config.judge.references is None:
        return AskedReferences(asker, plan, config.seed)
    return StoredReferences(Path(config.judge.references), asker.fingerprint, asker.name)
