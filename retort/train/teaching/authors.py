"""Which models of a run write the texts that views show, and how each is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.teachers.itself import OwnWeights
from retort.teachers.local import LocalTeacher
from retort.teachers.moving import Weights
from retort.teachers.reader import Reader
from retort.teachers.view_input import Stage
from retort.train.models.models import engine
from retort.train.teaching.drafting import Drafter, Drafting


def drafting(
    config: Config, method: Method, readers: Mapping[str, Reader], own: OwnWeights | None, stage: Stage
) -> Drafting | None:
    """Who writes for the views of a method; None where no view shows a text that is written.

    A model that also scores is not loaded again.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.
        readers: The models of the run by name, beside the student; the student itself is among them.
        own: The weights of the student as its own teacher.
        stage: Inputs that all rollouts have in common.

    Raises:
        UserError: A model that is to write only scores, or is several at once.
    """
    phases = [method] if method.before is None else [method.before[1], method]
    views = [(phase.name, view.draft) for phase in phases for view in phase.views.values()]
    names = {author.model: phase for phase, draft in views if draft is not None for author in draft.authors}
    if not names:
        return None
    found: dict[str, Drafter] = {}
    for name, phase in names.items():
        if name == "teacher" and config.teachers.models:
            raise UserError(
                f"the teacher of method '{phase}' writes before it scores, and of several (teachers.models) none is "
                "the one that writes; give a single teacher"
            )
        reader = readers[name]
        if not isinstance(reader, LocalTeacher):
            raise UserError(
                f"the {name} of method '{phase}' writes before it scores, and behind a server of completions "
                f"({reader.name}) it only scores; serve it with `retort serve`"
            )
        within = _as_it_was(own, reader.lm) if name == "student" and own is not None else _frozen(reader.lm)
        found[name] = Drafter(engine(config, reader.lm, reader.alignment.width), reader.render, within)
    return Drafting(found, stage, config.rollout.max_new_tokens)


def _frozen(lm: LanguageModel) -> Callable[[Weights], AbstractContextManager[None]]:
    return lambda weights: lm.whole()


def _as_it_was(own: OwnWeights, lm: LanguageModel) -> Callable[[Weights], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def within(weights: Weights) -> Iterator[None]:
        with own.in_place(weights), lm.whole():
            yield

    return within
