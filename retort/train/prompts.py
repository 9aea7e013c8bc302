"""The prompts of a run, and who grades the answers to them."""

from __future__ import annotations

from collections.abc import Sequence

from retort.config import BUILTIN, Config
from retort.data import in_template, load_prompts
from retort.errors import UserError
from retort.rewards.verify import Verifier, verifier_for
from retort.streams import permutation
from retort.types import Message, Prompt


def read_prompts(config: Config, data: str, notes: list[str]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and those held out to be judged on."""
    wanted = config.eval.problems
    if config.builtin and config.prompt_template is not None:
        raise UserError(f"prompt_template is for data of your own; the prompts of '{data}' are what its models know")
    prompts = builtin_prompts(data, "train", config.limit) if config.builtin else _load(config, data, config.limit)
    if wanted == 0:
        return prompts, []
    judged = config.eval.data or (data if config.builtin else None)
    if judged is not None:
        return prompts, judge_prompts(config, judged)
    # Held out of the same file: never more than a fifth of it, chosen by seed, never trained on.
    held = min(wanted, len(prompts) // 5)
    if wanted and held < wanted:
        notes.append(
            f"{held} of {len(prompts)} prompts are held out for evaluation (a fifth at most; eval.problems = {wanted})"
        )
    order = permutation(config.seed, "holdout", count=len(prompts))
    chosen = set(order[:held])
    train = [prompt for index, prompt in enumerate(prompts) if index not in chosen]
    return train, [prompts[index] for index in sorted(chosen)]


def judge_prompts(config: Config, data: str) -> list[Prompt]:
    """The prompts to judge on: held-out problems of the built-in task, or a file."""
    if data in BUILTIN:
        return builtin_prompts(data, "held_out", config.eval.problems)
    return _load(config, data, config.eval.problems)


def _load(config: Config, data: str, limit: int | None) -> list[Prompt]:
    prompts = load_prompts(data, split=config.split, limit=limit, columns=config.columns)
    return prompts if config.prompt_template is None else in_template(prompts, config.prompt_template)


def countdown_prompts(split: str, count: int | None) -> list[Prompt]:
    """Prompts of the built-in task Countdown."""
    return builtin_prompts("countdown", split, count)


def builtin_prompts(task: str, split: str, count: int | None) -> list[Prompt]:
    """Prompts of a built-in task."""
    from retort.tasks import coached, countdown, ranking

    source = {
        "countdown": countdown.rows,
        "ranking": ranking.rows,
        "coached": coached.rows,
        "bait": coached.bait_rows,
    }[task]
    rows = source("held_out" if split == "held_out" else "train", count)
    return [
        Prompt(
            id=str(row["id"]),
            messages=(Message("user", str(row["prompt"])),),
            answer=str(row["answer"]),
            response=str(row["response"]),
            privileged={name: str(row[name]) for name in coached.PRIVILEGED if name in row},
            clean=(Message("user", str(row["clean"])),) if "clean" in row else None,
        )
        for row in rows
    ]


def graders(
    config: Config, train: Sequence[Prompt], held_out: Sequence[Prompt], notes: list[str]
) -> tuple[Verifier | None, Verifier | None]:
    """Who grades training rollouts and who grades held-out answers: each only where all its prompts have an answer."""
    task = config.data if config.builtin else config.task
    judged = config.eval.data or config.data
    judge_task = judged if judged in BUILTIN else config.task
    judge = verifier_for(judge_task, held_out) if held_out else None
    if all(prompt.answer is not None for prompt in train):
        return judge if judge and judge_task == task else verifier_for(task, train), judge
    if judge is not None or task is not None:
        notes.append("not every training prompt has an answer, so training rollouts are not graded (no curve `reward`)")
    return None, judge
