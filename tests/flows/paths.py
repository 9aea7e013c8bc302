"""Rollouts of a tiny flow: trajectories to a few prompts, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from flows.linear import model

from retort.core.rollouts import Message, Prompt, Rollout
from retort.core.trajectory import Noise, Sampler
from retort.flows import FlowModel
from retort.flows.sampling import FlowRequest, FlowSampling, denoise

#: Text and domain of each prompt.
PROMPTS = (("a ring", "ring"), ("two moons, and a third", "moons"), ("a", "ring"))


def prompts(asked: Sequence[tuple[str, str]] = PROMPTS) -> list[Prompt]:
    return [Prompt(text, (Message("user", text),), domain=domain) for text, domain in asked]


def sampling(sampler: Sampler = "sde", *, steps: int = 5, window: int | None = None) -> FlowSampling:
    return FlowSampling(Noise(sampler, 0.7), steps, window, None, batch=4)


def rollouts(
    flow: FlowModel | None = None, how: FlowSampling | None = None, *, members: int = 2, asked: Sequence[Prompt] = ()
) -> list[Rollout]:
    """Trajectories of a student to each prompt, those of a prompt beside one another."""
    rows = [(own, member) for own in asked or prompts() for member in range(members)]
    requests = [FlowRequest(own.text, (0, "rollouts", own.id, member), (0, "rollouts", own.id)) for own, member in rows]
    paths = denoise(flow or model(), requests, how or sampling())
    return [
        Rollout(own, (path,), member=member, reward=float(member % 2))
        for (own, member), path in zip(rows, paths, strict=True)
    ]
