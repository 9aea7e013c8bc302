"""Advice to the user, once per run, when a curve is where it should not be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from retort.method import Watch


def advice(metrics: Mapping[str, Any], watches: Iterable[Watch], step: int, already: set[str]) -> list[str]:
    """One sentence for each curve that is where it should not be.

    Args:
        metrics: The metrics of the step.
        watches: The watches of the method, with the values below which they give advice.
        step: The step's number, from 1.
        already: Names of the curves that advice was given about; new ones are added.
    """
    found: list[str] = []
    if metrics.get("given_up") and "given_up" not in already:
        already.add("given_up")
        found.append(
            f"step {step}: {metrics['given_up']} completions count as wrong because their comparison with the right "
            "answer did not finish (curve given_up; docs/grading.md)"
        )
    if metrics.get("episode_errors") and "episode_errors" not in already:
        already.add("episode_errors")
        found.append(
            f"step {step}: {metrics['episode_errors']} episodes ended in an error of their environment and are not "
            "learnt from (curve episode_errors; docs/rooms.md)"
        )
    if metrics.get("timed_out") and "timed_out" not in already:
        already.add("timed_out")
        found.append(
            f"step {step}: rollout.deadline ended {metrics['timed_out']:.1%} of the episodes, whose environment did "
            "not reply in time (curve timed_out; docs/rooms.md)"
        )
    for watch in watches:
        low = watch.alarm_below is not None and metrics.get(watch.name, watch.alarm_below) < watch.alarm_below
        if low and watch.name not in already:
            already.add(watch.name)
            found.append(f"{watch.name} is {metrics[watch.name]:.2f}: {watch.advice}")
    return found
