"""The prompts of a run, and the graders of their completions."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from retort.config import BUILTIN, Config
from retort.config.clients import environment_client
from retort.core.random_streams import permutation
from retort.core.rollouts import Message, Prompt
from retort.data import each_turn, in_template
from retort.envs.registry import rewards
from retort.errors import UserError
from retort.rewards.base import Grader
from retort.rewards.choose import grader_for
from retort.rewards.environment import ByEnvironment
from retort.rewards.verify import NEED_ANSWER
from retort.train.given.given import CallerObjects
from retort.train.setup.split import different, overlap, repeats, set_aside


def read_prompts(
    config: Config, data: str, notes: list[str], caller_objects: CallerObjects | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and those held out to be evaluated on.

    Rows are held out whole, before they are split into steps.
    """
    train, held_out = _apart(config, data, notes, caller_objects)
    if config.data_turns == "each":
        train = each_turn(train, notes)
    evaluated = config.eval.data or data
    if not (config.builtin and evaluated in BUILTIN):  # Retort's own tasks keep their problems apart.
        notes += overlap(train, held_out)
    # No template is around the prompts of Retort's own tasks.
    return _in_template(config, train), held_out if evaluated in BUILTIN else _in_template(config, held_out)


def _apart(
    config: Config, data: str, notes: list[str], caller_objects: CallerObjects | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Rows to learn from and rows held out, in no template yet."""
    wanted = config.eval.problems
    if config.builtin and config.prompt_template is not None:
        raise UserError(f"prompt_template is for data of your own; the prompts of '{data}' are what its models know")
    prompts = (
        builtin_prompts(data, "train", config.limit)
        if config.builtin
        else _load(config, "data", data, config.limit, notes, caller_objects)
    )
    if wanted == 0:
        return prompts, []
    evaluated = config.eval.data or (data if config.builtin else None)
    if evaluated is not None:
        held_out = _eval_rows(config, evaluated, notes, caller_objects)
        if not config.builtin:
            notes += repeats(prompts, "training rows")
        if evaluated not in BUILTIN:
            notes += repeats(held_out, "rows of eval.data")
        return prompts, held_out
    # Held out of the same file: never more than a fifth of it, chosen by seed, never trained on.
    order = permutation(config.seed, "holdout", count=len(prompts))
    train, held_out = set_aside(prompts, order, wanted, lambda prompt: prompt.answer is not None)
    notes += repeats(prompts, "rows of the data")
    copies = len(prompts) - len(train) - len(held_out)
    if copies:
        notes.append(f"{copies} rows that repeat a held-out prompt are neither learnt from nor evaluated on")
    if len(held_out) < wanted:
        notes.append(
            f"{len(held_out)} of {different(prompts)} prompts are held out for evaluation (a fifth at most; "
            f"eval.problems = {wanted})"
        )
    return train, held_out


def eval_prompts(
    config: Config, data: str, notes: list[str], caller_objects: CallerObjects | None = None
) -> list[Prompt]:
    """The prompts to evaluate on: held-out problems of the built-in task, or a file, or rows that were given."""
    rows = _eval_rows(config, data, notes, caller_objects)
    return rows if data in BUILTIN else _in_template(config, rows)


def _eval_rows(config: Config, data: str, notes: list[str], caller_objects: CallerObjects | None) -> list[Prompt]:
    if data in BUILTIN:
        return builtin_prompts(data, "held_out", config.eval.problems)
    return _load(config, "eval.data", data, config.eval.problems, notes, caller_objects)


def refuse_misspelt(data: str) -> None:
    """Raises `UserError` where data is no file, and nearly the name of a task that ships with Retort."""
    near = difflib.get_close_matches(data, BUILTIN, n=1, cutoff=0.7)
    if near and data not in BUILTIN and not Path(data).exists():
        raise UserError(f"no such file: {data}; did you mean '{near[0]}', which ships with Retort?")


def _load(
    config: Config, setting: str, data: str, limit: int | None, notes: list[str], caller_objects: CallerObjects | None
) -> list[Prompt]:
    refuse_misspelt(data)
    return (caller_objects or CallerObjects()).prompts(config, setting, data, limit, notes)


def _in_template(config: Config, prompts: list[Prompt]) -> list[Prompt]:
    return prompts if config.prompt_template is None else in_template(prompts, config.prompt_template)


def countdown_prompts(split: str, count: int | None) -> list[Prompt]:
    """Prompts of the built-in task Countdown."""
    return builtin_prompts("countdown", split, count)


def builtin_prompts(task: str, split: str, count: int | None) -> list[Prompt]:
    """Prompts of a built-in task."""
    return list(_builtin(task, split, count))


@lru_cache(maxsize=8)  # One split takes solving thousands of puzzles: the result is kept for the session.
def _builtin(task: str, split: str, count: int | None) -> tuple[Prompt, ...]:
    from retort.tasks import coached, countdown, glyphs, plane, ranking, rooms, shapes

    source = {
        "countdown": countdown.rows,
        "ranking": ranking.rows,
        "coached": coached.rows,
        "bait": coached.bait_rows,
        "rooms": rooms.rows,
        "shapes": shapes.rows,
        "plane": plane.rows,
        "glyphs": glyphs.rows,
    }[task]
    rows = source("held_out" if split == "held_out" else "train", count)
    return tuple(
        Prompt(
            id=str(row["id"]),
            messages=(Message("user", str(row["prompt"]), images=row.get("images", ())),),
            answer=str(row["answer"]) if "answer" in row else None,
            response=str(row["response"]) if "response" in row else None,
            privileged={name: str(row[name]) for name in coached.PRIVILEGED if name in row},
            clean=(Message("user", str(row["clean"])),) if "clean" in row else None,
            teacher_images=row.get("teacher_images", ()),
            domain=str(row.get("domain", "")),
        )
        for row in rows
    )


def graders(
    config: Config,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    notes: list[str],
    caller_objects: CallerObjects | None = None,
) -> tuple[Grader | None, Grader | None]:
    """The graders of training rollouts and of held-out completions: None where no prompt can be graded.

    A verifier of the user's own grades everything, or else an environment. Where there is neither, prompts without an
    answer that their verifier needs are left out of the grading, and a note counts them.
    """
    own = (caller_objects or CallerObjects()).verifier(config, train)
    if own is not None:
        return own, own
    if config.environment is not None and rewards(config.environment, environment_client(config.server)):
        played = ByEnvironment(config.environment)
        return played, played
    task = config.data if config.builtin else config.task
    evaluated = config.eval.data or config.data
    eval_task = evaluated if evaluated in BUILTIN else config.task
    verifier = grader(eval_task, held_out, "held-out prompts", notes) if held_out else None
    if all(prompt.answer is not None for prompt in train) and verifier is not None and eval_task == task:
        return verifier, verifier
    if any(prompt.answer is not None for prompt in train):
        return grader(task, train, "training prompts", notes), verifier
    if verifier is not None or task is not None:
        notes.append("not every training prompt has an answer, so training rollouts are not graded (no curve `reward`)")
    return None, verifier


def grader(task: str | None, prompts: Sequence[Prompt], whose: str, notes: list[str]) -> Grader | None:
    """Makes a grader for the prompts that can be graded; a note counts the others.

    Args:
        task: As for `grader_for`.
        prompts: At least one.
        whose: Their name in messages.
        notes: Collects the note.

    Raises:
        UserError: As `grader_for`; where a task is named that needs answers and no prompt has one.
    """
    needed = task is None or task in NEED_ANSWER
    known = [prompt for prompt in prompts if prompt.answer is not None] if needed else prompts
    found = grader_for(task, known or prompts)
    if found is not None and len(known) < len(prompts):
        first = next(prompt.id for prompt in prompts if prompt.answer is None)
        notes.append(
            f"{len(prompts) - len(known)} of {len(prompts)} {whose} have no `answer` ('{first}' first): what is "
            "written for them is not graded"
        )
    return found
