"""How hard each prompt is for the student that a method begins with: measured once, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retort.errors import UserError
from retort.rollout.plan import RolloutPlan
from retort.train.source.source import Source
from retort.train.storage.metrics import JsonLines

FILE = "difficulty.jsonl"
#: Prompts per block: completions are generated, graded and saved in blocks, so that a killed run goes on from there.
_BLOCK = 64


def difficulties(
    source: Source,
    plan: RolloutPlan,
    folder: Path,
    *,
    first: bool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """1 minus the pass rate of every training prompt, by its id.

    Args:
        source: The source of the run.
        plan: The rollout plan of the current method, with an `EasyToHard` order.
        folder: The folder of the run, where difficulties are kept.
        first: Whether the student has not learnt yet.
        progress: Called with prompts done and prompts in all.

    Raises:
        UserError: Some are missing, and the student has learnt since.
    """
    order, prompts, file = plan.order, source.prompts, JsonLines(folder / FILE)
    assert order is not None
    file.cut(0)  # This drops a line that was cut off.
    found = source.world.first(lambda: {row["prompt_id"]: row["pass_rate"] for row in file.rows()})
    blocks = range(0, len(prompts), _BLOCK)
    # Whole blocks: with other neighbours a batch may round otherwise.
    missing = [start for start in blocks if any(p.id not in found for p in prompts[start : start + _BLOCK])]
    if missing and not first:
        raise UserError(f"{file.path}: missing or incomplete, and it can only be made before the first step")
    if missing and progress is not None:
        progress(_BLOCK * (len(blocks) - len(missing)), len(prompts))
    for start in missing:
        for prompt_id, rate in source.passed(plan, prompts[start : start + _BLOCK], order.samples).items():
            if prompt_id not in found:
                file.append({"step": 0, "prompt_id": prompt_id, "pass_rate": rate})
                found[prompt_id] = rate
        if progress is not None:
            progress(min(start + _BLOCK, len(prompts)), len(prompts))
    return {prompt.id: 1.0 - found[prompt.id] for prompt in prompts}
