"""The batch of rollouts of one step: which prompts, who answers each, and what the verifier says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from retort.errors import UserError
from retort.rollout.plan import RolloutPlan
from retort.rollout.single_turn import Task, acted, write
from retort.streams import permutation, uniforms
from retort.train.setup import Setup
from retort.types import Prompt, Rollout, Status


@dataclass(frozen=True)
class Visit:
    """A prompt, and how many times the run had been through the data when it came to it."""

    prompt: Prompt
    epoch: int


def visits(prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
    """The prompts of a step: the data in an order shuffled anew every time through, cut into batches of `count`."""
    places = [divmod(step * count + offset, len(prompts)) for offset in range(count)]
    orders = {epoch: permutation(seed, "data", epoch, count=len(prompts)) for epoch in {epoch for epoch, _ in places}}
    return [Visit(prompts[orders[epoch][place]], epoch) for epoch, place in places]


def write_rollouts(setup: Setup, step: int, version: int) -> list[Rollout]:
    """The rollouts of a step, graded.

    Args:
        setup: Of the run.
        step: Batches of rollouts done.
        version: Optimizer steps done.
    """
    plan, seed = setup.method.rollout, setup.config.seed
    longest = setup.config.rollout.max_new_tokens
    tasks: list[Task] = []
    given: list[Visit] = []
    for visit in visits(setup.train, seed=seed, step=step, count=setup.batch_prompts):
        # Streams are keyed: where every answer is the student's own, this number can be left undrawn.
        if plan.on_policy_fraction < 1:
            mixture = uniforms(seed, "mixture", visit.epoch, visit.prompt.id, count=1)
            if float(mixture) >= plan.on_policy_fraction:
                given.append(visit)
                continue
        prompt_ids = setup.render(visit.prompt)
        for member in range(plan.samples):
            chance = uniforms(seed, "rollouts", visit.epoch, visit.prompt.id, member, count=longest)
            tasks.append(Task(visit.prompt, prompt_ids, member, chance, visit.epoch))
    written = write(
        setup.engine,
        tasks,
        max_new_tokens=longest,
        temperature=plan.temperature,
        top_p=plan.top_p,
        version=version,
    )
    if setup.verifier is not None:
        grade = setup.verifier
        written = [replace(rollout, reward=grade(rollout.prompt, rollout.text)) for rollout in written]
    return written + [_given_rollout(setup, visit) for visit in given]


def _given_rollout(setup: Setup, visit: Visit) -> Rollout:
    """The data's own answer to a prompt, closed with the student's stop token."""
    prompt = visit.prompt
    assert prompt.response is not None  # checked by `prepare`
    longest = setup.config.rollout.max_new_tokens
    prompt_ids = setup.render(prompt)
    ids: list[int] = setup.student.tokenizer(prompt.response, add_special_tokens=False)["input_ids"]
    outside = [token for token in ids if token >= setup.vocab]
    if outside:
        raise UserError(
            f"row '{prompt.id}': its response holds token id {outside[0]}, which student and teacher do not share"
        )
    ids = [*ids, setup.student.stops.primary]
    status = Status.COMPLETED if len(ids) <= longest else Status.TRUNCATED
    return Rollout(
        prompt=prompt,
        tokens_L=torch.tensor([*prompt_ids, *ids[:longest]]),
        acted_L=acted(len(prompt_ids), len(ids[:longest])),
        status=status,
        visit=visit.epoch,
        source="dataset",
        text=prompt.response,
    )


def plan_summary(plan: RolloutPlan, prompts: int) -> str:
    """One line on who writes, for the start-up summary."""
    mixed = (
        "" if plan.on_policy_fraction == 1 else f", {plan.on_policy_fraction:.0%} of prompts (else the data's answer)"
    )
    return f"{prompts} prompts x {plan.samples} at temperature {plan.temperature:g}{mixed}"
