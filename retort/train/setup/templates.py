"""Chat templates of a run: the options that they get, and checks of the rendered prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from retort.align.chat import Renderer, TemplateOptions, dated
from retort.align.encode import spelt
from retort.align.template import looks_rendered, of_another_family, thinks, turns, unlike_a_turn
from retort.align.text import decode
from retort.config import Config
from retort.core.images import WRITTEN
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.ranks import here

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Extremes", "check_prompts", "check_rendered", "ends", "refuse_views", "settled", "thinking_note", "today"]


def today() -> str:
    """The present day as ISO 8601."""
    return here().agree(date.today().isoformat())  # Ranks may start on both sides of midnight.


def settled(config: Config, tokenizers: Mapping[str, PreTrainedTokenizerBase], notes: list[str]) -> Config:
    """Fills in what a run's settings leave open for templates: the day that they write.

    Args:
        config: Resolved.
        tokenizers: By role.
        notes: Collects what is chosen, and how `enable_thinking` is used.
    """
    rollout = config.rollout
    roles = [role for role, tokenizer in tokenizers.items() if dated(tokenizer)]
    if roles and not rollout.rendered:
        rollout = rollout.model_copy(update={"date": rollout.date or today()})
        notes.append(
            f"the chat template of the {' and the '.join(roles)} writes today's date: it stays {rollout.date}, "
            "whenever the run goes on (rollout.date)"
        )
    note = thinking_note(tokenizers, rollout.template_options)
    if note:
        notes.append(note)
    return config if rollout is config.rollout else config.model_copy(update={"rollout": rollout})


def thinking_note(tokenizers: Mapping[str, PreTrainedTokenizerBase], template_options: TemplateOptions) -> str:
    """A sentence on `enable_thinking` where a template knows it, or where it is set and none does; else empty."""
    ways = {role: thinks(tokenizer, template_options) for role, tokenizer in tokenizers.items()}
    found = [(role, way) for role, way in ways.items() if way is not None]
    if not found:
        idle = template_options.thinking is not None and any(
            tokenizer.chat_template for tokenizer in tokenizers.values()
        )
        return (
            f"rollout.thinking = {str(template_options.thinking).lower()} changes nothing: no template knows it"
            if idle
            else ""
        )
    by = "left to the template" if template_options.thinking is None else "as set"
    words = [f"{way} for the {role}" for role, way in found]
    words += [f"unknown to the {role}'s template" for role, way in ways.items() if way is None]
    return f"thinking (`enable_thinking`) is {', '.join(words)}, {by} (rollout.thinking)"


def ends(readers: Mapping[str, Renderer]) -> tuple[dict[str, str], list[str], bool]:
    """Finds where prompts end, from each template's own conversations.

    Args:
        readers: The renderer of each model.

    Returns:
        What completions begin after, by role, where there is a template; what is wrong with it; and whether that leaves
        no prompt to complete: see `retort.align.template.unlike_a_turn`.
    """
    after, wrong, fatal = dict[str, str](), list[str](), False
    for role, render in readers.items():
        found = turns(render.tokenizer, render.template_options)
        if found is None:
            continue
        after[role] = repr(found.beginning) if found.beginning else "the end of the user's turn"
        fault = unlike_a_turn(found)
        if fault is not None:
            wrong.append(f"the {role}'s chat template is at fault: {fault[0]}")
            fatal = fatal or fault[1]
    return after, wrong, fatal


def refuse_views(config: Config, method: Method) -> None:
    """Refuses prompts that are rendered already where a view puts something into them.

    Raises:
        UserError: A view would change a rendered prompt; the message names it.
    """
    phases = [method] if method.before is None else [method.before[1], method]
    shown = [name for phase in phases for name, view in phase.views.items() if view.render or view.draft]
    if config.rollout.rendered and shown:
        raise UserError(
            f"rollout.rendered: the view '{shown[0]}' of method '{method.name}' adds to the user's message, which "
            "cannot be found in a rendered prompt; give prompts as they were before"
        )


def check_rendered(prompts: Sequence[Prompt], readers: Mapping[str, Renderer]) -> list[str]:
    """Checks all prompts for ones that were rendered before.

    Args:
        prompts: All of them.
        readers: The renderer of each model; the one that generates first.

    Returns:
        Notes on control tokens that are read as text, and on beginnings that are there twice.

    Raises:
        UserError: Prompts look rendered: see `retort.align.template.looks_rendered`; or one writes a placeholder for an
            image, and has none.
    """
    first = next(iter(readers.values()))
    tokenizer, template_options = first.tokenizer, first.template_options
    _need_images(prompts, first)
    notes = [] if template_options.rendered else _spelt(prompts, tokenizer, template_options)
    for role, render in readers.items():
        bos = render.tokenizer.bos_token_id
        doubled = 0 if bos is None else sum(render(prompt).ids[:2] == [bos, bos] for prompt in prompts)
        if doubled:
            notes.append(
                f"{doubled} of {len(prompts)} prompts begin with two beginning-of-text tokens for the {role}: its chat "
                "template writes both; take one out of it"
            )
    return notes


def _need_images(prompts: Sequence[Prompt], render: Renderer) -> None:
    """Refuses prompts without an image that write a placeholder for one, to a model that reads images.

    The model would read a word where an image was meant. A prompt that has images may spell a placeholder.
    """
    if render.image_tokens is None:
        return
    own = str(render.tokenizer.convert_ids_to_tokens(render.image_tokens.placeholder))
    for prompt in prompts:
        asked = "" if prompt.images else "\0".join(turn.content for turn in prompt.messages if turn.role != "assistant")
        found = next((written for written in dict.fromkeys((own, WRITTEN)) if written in asked), None)
        if found is not None:
            raise UserError(
                f"row '{prompt.id}' writes the placeholder {found}, and has no image; give it in the column 'images' "
                "(or map the column that holds it, columns.images=...), or take the placeholder out of the text"
            )


def _spelt(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions
) -> list[str]:
    found = turns(tokenizer, template_options)
    rendered, foreign, control = list[tuple[str, str]](), list[tuple[str, str]](), Counter[str]()
    for prompt in prompts:
        for text in (message.content for message in prompt.messages):
            control.update(spelt(text, tokenizer))
            if begins := looks_rendered(text, tokenizer, found):
                rendered.append((prompt.id, begins))
            elif begins := of_another_family(text, tokenizer):
                foreign.append((prompt.id, begins))
    if rendered:
        first, begins = rendered[0]
        raise UserError(
            f"{_rows(rendered, prompts)} look rendered already (row '{first}' spells {begins!r}), and would be "
            "rendered again; give turns as a column 'messages', or set rollout.rendered=true to take them as they are"
        )
    notes: list[str] = []
    if foreign:
        first, begins = foreign[0]
        notes.append(
            f"{_rows(foreign, prompts)} look rendered for another family (row '{first}' spells {begins!r}), which is "
            "text to the student; give the turns as a column 'messages'"
        )
    if control:
        notes.append(
            f"prompts spell {control.total()} control tokens of the student ({', '.join(sorted(control)[:4])}): they "
            "are read as ordinary text; where they were meant, give the turns as a column 'messages'"
        )
    return notes


@dataclass
class Extremes:
    """The longest prompts as one model reads them, and the largest id, each with its row.

    Attributes:
        train: Number of tokens and row of the longest training prompt.
        held_out: The same of the held-out prompts.
        highest: The largest id and its row.
    """

    train: tuple[int, str] = (0, "")
    held_out: tuple[int, str] = (0, "")
    highest: tuple[int, str] = (-1, "")


def check_prompts(
    config: Config,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    readers: Mapping[str, Renderer],
    notes: list[str],
) -> dict[str, Extremes]:
    """Refuses prompts that no model can continue or that are too long; notes prompts that models read differently.

    Args:
        config: Resolved.
        train: Prompts to learn from.
        held_out: Prompts for evaluation.
        readers: The renderer of each model by role; the student first.
        notes: Collects notes for the user.

    Returns:
        By role, the length of its prompts and the size of their ids.

    Raises:
        UserError: A prompt is too long, is empty, or looks rendered already.
    """
    prompts, allowed = [*train, *held_out], config.rollout.max_prompt_tokens
    notes += check_rendered(prompts, readers)
    found = {role: Extremes() for role in readers}
    differing = 0
    for index, prompt in enumerate(prompts):
        ours = readers["student"](prompt)
        if not ours:
            raise UserError(f"row '{prompt.id}': its prompt has no tokens, so there is nothing to continue")
        if len(ours) > allowed:
            raise UserError(
                f"row '{prompt.id}': its prompt has {len(ours)} tokens, more than rollout.max_prompt_tokens = "
                f"{allowed}; raise that, or drop the row"
            )
        for role, read in readers.items():
            theirs, most = read(prompt), found[role]
            differing += role == "teacher" and not _alike(readers["student"], ours.ids, read, theirs.ids)
            if index < len(train):
                most.train = max(most.train, (len(theirs), prompt.id), key=_first)
            else:
                most.held_out = max(most.held_out, (len(theirs), prompt.id), key=_first)
            most.highest = max(most.highest, (max(theirs.ids, default=-1), prompt.id), key=_first)
    if differing:
        notes.append(
            f"{differing} of {len(prompts)} prompts read differently to student and teacher: each sees its own chat "
            "template, or a beginning of its own"
        )
    return found


def _alike(student: Renderer, ours: list[int], teacher: Renderer, theirs: list[int]) -> bool:
    """Whether both read the same tokens, which may have other ids for the teacher, or the same text in other tokens."""
    if ours == theirs:
        return True
    read = ((student.tokenizer, ours), (teacher.tokenizer, theirs))
    one, other = (tokenizer.convert_ids_to_tokens(ids) for tokenizer, ids in read)
    return one == other or decode(*read[0]) == decode(*read[1])


def _first(pair: tuple[int, str]) -> int:
    return pair[0]


def _rows(found: Sequence[tuple[str, str]], prompts: Sequence[Prompt]) -> str:
    return f"{len({name for name, _ in found})} of {len(prompts)} prompts"
