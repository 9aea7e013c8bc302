"""How hard each prompt is for the student that a method begins with: measured once, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retort.errors import UserError
from retort.rewards.base import graded
from retort.rollout.engines.base import Sampling
from retort.rollout.episodes import Task, run_episodes
from retort.rollout.plan import EasyToHard
from retort.sequences import TokenSequence
from retort.streams import Chance
from retort.train.metrics import JsonLines
from retort.train.setup import Setup

FILE = "difficulty.jsonl"
#: Prompts per block: answers are written, graded and put on disk in blocks, so that a killed run goes on from there.
_BLOCK = 64


def difficulties(
    setup: Setup, folder: Path, *, first: bool, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """1 minus the pass rate of every training prompt, by its id.

    Args:
        setup: Of the run; its plan has an `EasyToHard` order.
        folder: Of the run, where they are kept.
        first: Whether the student is still the one to measure.
        progress: Called with prompts done and prompts in all.

    Raises:
        UserError: They are not all there, and the student is another one by now.
    """
    order, file = setup.method.rollout.order, JsonLines(folder / FILE)
    assert order is not None
    file.cut(0)  # drops a line that was cut in writing
    found = {row["prompt_id"]: row["pass_rate"] for row in file.rows()}
    blocks = range(0, len(setup.train), _BLOCK)
    # Whole blocks: with other neighbours a batch may round otherwise.
    missing = [start for start in blocks if any(p.id not in found for p in setup.train[start : start + _BLOCK])]
    if missing and not first:
        raise UserError(f"{file.path}: missing or incomplete, and it can only be made before the first step")
    if missing and progress is not None:
        progress(_BLOCK * (len(blocks) - len(missing)), len(setup.train))
    for start in missing:
        for prompt_id, rate in _pass_rates(setup, order, start).items():
            if prompt_id not in found:
                file.append({"step": 0, "prompt_id": prompt_id, "pass_rate": rate})
                found[prompt_id] = rate
        if progress is not None:
            progress(min(start + _BLOCK, len(setup.train)), len(setup.train))
    return {prompt.id: 1.0 - found[prompt.id] for prompt in setup.train}


def _pass_rates(setup: Setup, order: EasyToHard, start: int) -> dict[str, float]:
    plan, longest = setup.method.rollout, setup.config.rollout.max_new_tokens
    assert setup.verifier is not None  # checked by `prepare`
    block, tasks = setup.train[start : start + _BLOCK], list[Task]()
    for prompt in block:
        for member in range(order.samples):
            chance = Chance(setup.config.seed, "difficulty", prompt.id, member)
            tasks.append(Task(prompt, TokenSequence.of(setup.render(prompt)), member, chance))
    written = run_episodes(setup.engine, tasks, Sampling(longest, plan.temperature, plan.top_p))
    rewards = [rollout.reward or 0.0 for rollout in graded(setup.verifier, written)]
    size = order.samples
    return {
        prompt.id: sum(reward > 0.5 for reward in rewards[place * size : (place + 1) * size]) / size
        for place, prompt in enumerate(block)
    }
