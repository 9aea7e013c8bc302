"""Checks of what a method's views can show: whether there is anything, and whether the teacher knows its words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from retort.core.rollouts import Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.method import Method
from retort.rewards.base import Grader
from retort.teachers.reader import Reader
from retort.teachers.templates import templates
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput

#: Training prompts that are looked at.
EXAMINED = 16
#: Rewards below and above every threshold.
_WORST, _BEST = -1e9, 1e9
_PLACES = re.compile(r"\{\w+\}")


def need_context(method: Method, verifier: Grader | None, stage: Stage, notes: list[str]) -> None:
    """Refuses a run in which no term can ever count a step, and notes a term that cannot.

    Raises:
        UserError: Every view that some term asks would have nothing to show, whatever the rollouts; or every
            coefficient is 0.
    """
    phases = [method] if method.before is None else [method.before[1], method]
    for phase in phases:
        if all(term.coef == 0 for term in phase.terms):
            raise UserError(
                f"all terms of method '{phase.name}' have the coefficient 0, so nothing would be learnt; raise one"
            )
        empty = [name for name, view in phase.views.items() if not _shows(phase, view, verifier, stage)]
        silent = {term.name: name for term in phase.terms for name in reversed(empty) if term.needs_of(name)}
        if len(silent) == len(phase.terms):
            name = next(iter(silent.values()))
            raise UserError(
                f"method '{phase.name}' would have nothing to show its teacher (view '{name}') for any rollout, so "
                f"nothing would be learnt (samples = {phase.rollout.samples}, {len(stage.pool)} training prompts); let "
                "it show siblings (method.samples of 2 or more), feedback (method.feedback), or give more data"
            )
        notes += [
            f"term '{term}' of '{phase.name}' is never learnt from: view '{name}' has nothing to show for any rollout"
            for term, name in silent.items()
        ]


def note_unknown(method: Method, models: Mapping[str, Reader], stage: Stage, notes: list[str]) -> None:
    """Notes views in whose prompts there are words that the teacher's tokenizer does not know.

    Args:
        method: The method whose views are checked.
        models: The models that read them, by `View.model`.
        stage: With the run's templates and prompts.
        notes: Collects notes for the user.
    """
    for name, view in method.views.items():
        model = models[view.model]
        unknown: Any = model.lm.tokenizer.unk_token_id
        if view.render is None or unknown is None:
            continue
        found, seen, used = 0, 0, set[str]()
        for group in _example_groups(method, view, True, stage):
            shown = set[str]()
            prompt = view.prompt(ViewInput(group.rollout, group.group, stage, shown=shown))
            if prompt is None:
                continue
            seen += 1
            if model.render(prompt).ids.count(unknown) > model.render(group.prompt).ids.count(unknown):
                found += 1
                used |= shown
        if found:
            words = [own for own in sorted({*used, "frame", "closing"}) if unknown in _ids(model, stage, own)]
            remedy = (
                f"write {', '.join(f'templates.{own}' for own in words)} in words that it knows"
                if words
                else "the texts themselves hold them"
            )
            notes.append(
                f"view '{name}' shows its teacher words that {model.name} does not know (id {unknown}, "
                f"{model.lm.tokenizer.unk_token!r}) in {found} of {seen} prompts looked at: {remedy}"
            )


def need_room(method: Method, models: Mapping[str, Reader], stage: Stage, notes: list[str]) -> None:
    """Refuses a run whose views can show nothing in the room that they have, and notes prompts of which that is so.

    Args:
        method: The method whose views are checked.
        models: The models that read them, by `View.model`.
        stage: With the run's templates, prompts and the longest prompt of a view.
        notes: Collects notes for the user.

    Raises:
        UserError: For none of the prompts looked at is there room for a single character, in any view that is learnt
            from.
    """
    full = set[str]()
    for name, view in method.views.items():
        room = min(stage.longest or 2**31, models[view.model].lm.context - 1)
        groups = list(_example_groups(method, view, True, stage)) if view.render is not None else []
        least = [view.prompt(replace(group, limit=1)) for group in groups]
        lengths = [len(models[view.model].render(prompt, split=True)) for prompt in least if prompt is not None]
        tight = sum(length > room for length in lengths)
        if not tight:
            continue
        what = (
            f"view '{name}' has no room for a single character of what it shows in {tight} of {len(lengths)} prompts "
            f"looked at: the rest of a prompt alone has up to {max(lengths)} tokens, and rollout.max_view_tokens is "
            f"{stage.longest}, the context of {models[view.model].name} {models[view.model].lm.context}"
        )
        full |= {name} if tight == len(lengths) else set()
        if full and all(any(term.needs_of(other) for other in full) for term in method.terms):
            raise UserError(f"{what}; nothing would be learnt: raise rollout.max_view_tokens, or shorten the prompts")
        notes.append(what)


def _ids(model: Reader, stage: Stage, template: str) -> list[int]:
    """Ids of a template's own words."""
    text = _PLACES.sub(" ", {**templates({}), **stage.templates}[template])
    return list(model.lm.tokenizer.encode(text, add_special_tokens=False))


def _shows(method: Method, view: View, verifier: Grader | None, stage: Stage) -> bool:
    """Whether a view has anything to show for some rollout."""
    if view.render is None:
        return True
    feedback = verifier is not None and verifier.explains
    return any(view.prompt(group) is not None for group in _example_groups(method, view, feedback, stage))


def _example_groups(method: Method, view: View, feedback: bool, stage: Stage) -> Iterator[ViewInput]:
    """Rollouts to a few prompts: right and wrong ones among siblings that are all right, all wrong, or both."""
    fit = [prompt for prompt in stage.pool if view.can_show(prompt)]
    for prompt in _spread(fit):
        for own in (_WORST, _BEST):
            for others in ((_BEST, _BEST), (_WORST, _WORST), (_BEST, _WORST)):
                rewards = [own, *(others[member % 2] for member in range(1, method.rollout.samples))]
                made = (_rollout(prompt, place, reward, feedback) for place, reward in enumerate(rewards))
                group = tuple(_with_passages(rollout, view) for rollout in made)
                yield ViewInput(group[0], group, stage)


def _with_passages(rollout: Rollout, view: View) -> Rollout:
    """A rollout for which the texts that a view shows are written, in the words of the reference answer."""
    return rollout if view.draft is None else replace(rollout, passages=view.draft.example(rollout.text))


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A few prompts, spread evenly."""
    step = max(1, len(prompts) // EXAMINED)
    return list(prompts[::step][:EXAMINED])


def _rollout(prompt: Prompt, member: int, reward: float, feedback: bool) -> Rollout:
    sequence = TokenSequence.of([0]).then([0], decided=True)
    # The text is the reference answer, whose words every task knows.
    text = prompt.response or prompt.answer or prompt.readable
    note = text if feedback and reward == _WORST else ""
    return Rollout(prompt, (sequence,), member=member, text=text, reward=reward, feedback=note)
