"""Checks that all texts of the data can be read: an id without a row is found before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from retort.align.tokens import vocabulary_width
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.models.lm import LanguageModel


def check_texts(
    method: Method, train: Sequence[Prompt], student: LanguageModel, readers: Iterable[LanguageModel], vocab: int
) -> None:
    """Checks responses that are learnt from, and what views show; prompts are checked where they are rendered.

    Args:
        method: The method, with what comes before it.
        train: Prompts to learn from.
        student: The model whose tokenizer reads the responses.
        readers: The models that read what views show.
        vocab: Number of ids that student and teachers share.

    Raises:
        UserError: A text holds an id that no model, or not every model, has.
    """
    phases = [method] if method.before is None else [method.before[1], method]
    # Models as they are made have a row for every id: then no text has to be read.
    if any("dataset" in phase.rollout.sources for phase in phases) and vocab < vocabulary_width(student.tokenizer):
        for prompt in train:
            for token in _ids(student, prompt.response):
                if token >= vocab:
                    named = student.tokenizer.convert_ids_to_tokens(token)
                    raise UserError(
                        f"row '{prompt.id}': its response holds {named!r} (id {token}), which student and "
                        f"teacher do not share ({vocab} ids); leave out that row, or resize the embeddings that lack it"
                    )
    if all(view.render is None for phase in phases for view in phase.views.values()):
        return
    for lm in readers:
        if lm.rows < vocabulary_width(lm.tokenizer):
            for prompt in train:
                for name in ("answer", "response", "clean", *prompt.privileged):
                    lm.check_ids(_ids(lm, prompt.shown(name)), f"row '{prompt.id}': its {name}")


def _ids(lm: LanguageModel, text: str | None) -> list[int]:
    return [] if not text else list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
