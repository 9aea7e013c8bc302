"""One prompt, one answer: from prompts to rollouts, ungraded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from retort.align.text import completion_text
from retort.rollout.engines.hf import HFEngine, Request
from retort.sequences import TokenSequence
from retort.types import Prompt, Rollout


@dataclass(frozen=True)
class Task:
    """An answer to be written.

    Attributes:
        prompt: To what.
        context: What the writer reads before it.
        member: Which of the samples of its prompt.
        uniforms: See `Request`.
        visit: See `Rollout`.
    """

    prompt: Prompt
    context: TokenSequence
    member: int
    uniforms: Tensor
    visit: int = 0


def write(
    engine: HFEngine,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    version: int = 0,
    source: Literal["student", "teacher"] = "student",
) -> list[Rollout]:
    """Has the engine answer all tasks, in order."""
    written = engine.write(
        [Request(task.context, task.uniforms) for task in tasks],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    return [
        Rollout(
            prompt=task.prompt,
            sequence=task.context.then(answer.ids, decided=True),
            engine_logp_A=answer.logp_A,
            policy_version=version,
            member=task.member,
            visit=task.visit,
            status=answer.status,
            source=source,
            text=completion_text(engine.lm.tokenizer, answer.ids, prompt_ids=task.context.tokens_L.tolist()),
        )
        for task, answer in zip(tasks, written, strict=True)
    ]
