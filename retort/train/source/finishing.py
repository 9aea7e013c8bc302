"""What makes rollouts of a batch out of completions: at once, or visit by visit as they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retort.core.rollouts import Group, Rollout, Status
from retort.core.steps import Clock
from retort.errors import RunError, UserError
from retort.method import Method
from retort.rewards.base import Grader, graded

#: Takes the rollouts of one visit to a prompt, graded, as soon as they are.
OnGroup = Callable[[Group], None]


def finished(
    play: Callable[[Callable[[list[Rollout]], list[Rollout]] | None], list[Rollout]],
    finish: Callable[[list[Rollout], bool], list[Rollout]],
    on_group: OnGroup | None,
) -> list[Rollout]:
    """The finished rollouts of a batch.

    Args:
        play: Generates them; takes what is made of each visit's as soon as all of them have ended, or None.
        finish: Finishes some of them, and takes whether the batch begins with them.
        on_group: Takes each visit's; None: all are finished together.
    """
    if on_group is None:
        return finish(play(None), True)
    begins = True

    def written(visit: list[Rollout]) -> list[Rollout]:
        nonlocal begins
        found, begins = finish(visit, begins), False
        on_group(tuple(found))
        return found

    return play(written)


def graded_for(method: Method, grader: Grader | None, rollouts: list[Rollout], *, begins: bool = True) -> list[Rollout]:
    """Some rollouts with their grades, where there is a grader.

    Args:
        method: Decides whether a grade may be missing.
        grader: Grades them.
        rollouts: The rollouts.
        begins: See `retort.rewards.base.graded`.

    Raises:
        UserError: The method learns from rewards, and one is missing.
    """
    if grader is None:
        return rollouts
    found, wants = graded(grader, rollouts, begins=begins), method.needs_rewards
    lacking = next((rollout for rollout in found if rollout.reward is None), None)
    if wants is not None and lacking is not None:
        raise UserError(
            f"verifier '{grader.name}', row '{lacking.prompt.id}': it gave a completion no grade, and method "
            f"'{method.name}' learns from rewards ({wants}); grade every one, or choose a method without rewards"
        )
    return found


def without_failed(rollouts: Sequence[Rollout], clock: Clock) -> tuple[list[Rollout], list[str]]:
    """Some rollouts without those that ended in an error of their environment, and what it said of each of these.

    Raises:
        RunError: All of them did.
    """
    found = [rollout for rollout in rollouts if rollout.status != Status.ERROR]
    failed = [rollout.feedback for rollout in rollouts if rollout.status == Status.ERROR]
    if not found:
        raise RunError(
            f"step {clock.step + 1}: every episode ended in an error of its environment, so there is nothing to "
            f"learn; the first: {failed[0]}"
        )
    return found, failed
