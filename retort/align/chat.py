"""Rendering: from a prompt to the ids that a model continues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from retort.align.encode import Spelt, encoded_alone, filled, ordinary, spelt, split_open
from retort.align.images import ImageTokens, context_of
from retort.align.turns import changed, conversation, inner_texts, unshown, with_inner
from retort.core.rollouts import Message, Prompt
from retort.core.sequences import TokenSequence
from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Renderer", "TemplateOptions", "as_text", "dated", "render", "rendered"]

#: Ids that a renderer caches: some 40 MB of Python integers.
_KEPT = 2**20
#: The call by which a template reads the time: a function that transformers provides, and a format.
_NOW = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")

#: A text to try a template with.
_ASKED = "Retortasks"
#: By tokenizer its chat template, and whether that shows lists of parts alone.
_PARTS: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TemplateOptions:
    """Options for rendering prompts to ids.

    With the defaults, ids are those of the tokenizer's own `apply_chat_template(..., add_generation_prompt=True)`.

    Attributes:
        thinking: Passed to chat templates as `enable_thinking`; None: not passed, so each template uses its default.
        date: Date for templates that write today's, as 2026-11-29; None: today.
        rendered: Prompts are already rendered: no template is applied, and control tokens that they spell count.
    """

    thinking: bool | None = None
    date: str | None = None
    rendered: bool = False


_AS_IT_STANDS = TemplateOptions()


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions = _AS_IT_STANDS,
    *,
    split: bool = False,
    opened: bool = True,
) -> list[int]:
    """The ids of a prompt, up to where the model's completion begins; each of its images is a single placeholder.

    With a chat template: the conversation, and the beginning of the assistant's turn. Without one, a plain prompt is
        the bare text with the special tokens that this tokenizer puts before a text, but without an end-of-text token
        after it, which would make a model begin a new document.

    A control token that a message spells is text: only the template, or the tokenizer itself, adds control tokens.
    Prompts that are `rendered` are the exception, and begin with one beginning-of-text token where the tokenizer adds
    one, whether or not they spell it.

    Args:
        prompt: The prompt; only its messages are shown.
        tokenizer: Tokenizer of the model that continues.
        template_options: Options of chat templates.
        split: Put a blank into a spelt control token that the tokenizer cannot encode as text, instead of refusing it.
        opened: See `as_text`; it does not apply to bare texts.

    Returns:
        At least one id.

    Raises:
        UserError: Messages or images without a chat template or where prompts are rendered already, a conversation that
            the template refuses, nothing to encode, or a control token that cannot be text.
    """
    try:
        return _ids(prompt, tokenizer, template_options, opened)
    except Spelt as error:
        if split:
            return _ids(changed(prompt, lambda text: split_open(text, tokenizer)), tokenizer, template_options, opened)
        raise UserError(
            f"row '{prompt.id}': its prompt spells the control token {error.token!r}, which the "
            f"tokenizer{_named(tokenizer)} cannot encode as ordinary text; take it out of the prompt, or drop the row"
        ) from None


def _ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, opened: bool
) -> list[int]:
    if template_options.rendered:
        ids = _as_it_stands(prompt, tokenizer)
    elif tokenizer.chat_template:
        ids = _templated(prompt, tokenizer, template_options, opened)
    elif prompt.images:
        raise UserError(
            f"prompt '{prompt.id}' holds an image, whose place a chat template writes, and the tokenizer"
            f"{_named(tokenizer)} has none; give it one (chat_template.jinja in its folder)"
        )
    elif prompt.plain:
        ids = _bare(prompt, tokenizer)
    else:
        raise UserError(
            f"prompt '{prompt.id}' is a conversation, but the tokenizer{_named(tokenizer)} has no chat template; "
            "give it one (chat_template.jinja in its folder), or use a plain column 'prompt' without system and tools"
        )
    if not ids:
        raise UserError(f"prompt '{prompt.id}' encodes to no tokens with the tokenizer{_named(tokenizer)}")
    return ids


def rendered(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions = _AS_IT_STANDS,
    image_tokens: ImageTokens | None = None,
    *,
    split: bool = False,
) -> TokenSequence:
    """A prompt as a model reads it, with the tokens that stand for its images.

    Args:
        prompt: See `render`.
        tokenizer: See `render`.
        template_options: See `render`.
        image_tokens: How the model writes images; None for one of text alone.
        split: See `render`.

    Raises:
        UserError: See `render` and `retort.align.images.context_of`.
    """
    ids = render(prompt, tokenizer, template_options, split=split)
    return context_of(prompt, ids, image_tokens, tokenizer.name_or_path or "the model")


class Renderer:
    """Renders prompts as one model reads them, images included, with a cache of what it rendered.

    A run comes back to every prompt in each epoch. The cache is bounded: prompts beyond its size are rendered every
    time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_options: TemplateOptions = _AS_IT_STANDS,
        image_tokens: ImageTokens | None = None,
    ) -> None:
        """Begins with an empty cache.

        Args:
            tokenizer: Tokenizer of the model that continues.
            template_options: See `render`.
            image_tokens: How the model writes images; None for one of text alone.
        """
        self.tokenizer = tokenizer
        self.template_options = template_options
        self.image_tokens = image_tokens
        self._found: dict[tuple[tuple[Message, ...], str, bool, bool], TokenSequence] = {}
        self._kept = 0

    def __call__(self, prompt: Prompt, *, split: bool = False) -> TokenSequence:
        """A prompt as the model reads it.

        Args:
            prompt: The prompt.
            split: See `render`; for texts that models generated, which must not end a run.

        Raises:
            UserError: See `rendered`.
        """
        key = (prompt.messages, json.dumps(prompt.tools), prompt.plain, split)
        context = self._found.get(key)
        if context is None:
            context = rendered(prompt, self.tokenizer, self.template_options, self.image_tokens, split=split)
            if self._kept + len(context) <= _KEPT:
                self._found[key] = context
                self._kept += len(context)
        return context


def as_text(
    turns: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template_options: TemplateOptions = _AS_IT_STANDS,
    *,
    opened: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text that a chat template makes of a conversation. Errors of the template are passed on.

    Args:
        turns: See `conversation`.
        tokenizer: A tokenizer with a chat template.
        template_options: Options of the template.
        opened: Whether the beginning of the assistant's turn follows.
        tools: The functions that the model may call.
    """
    arguments: dict[str, Any] = (
        {} if template_options.thinking is None else {"enable_thinking": template_options.thinking}
    )
    if tools:
        arguments["tools"] = [dict(tool) for tool in tools]
    if template_options.date is not None and dated(tokenizer):
        # Some tokenizers have a template of their own for conversations with tools.
        arguments["chat_template"] = _on_day(
            tokenizer.get_chat_template(tools=arguments.get("tools")), template_options.date
        )
    if reads_parts_alone(tokenizer):
        turns = [{**turn, "content": _in_parts(turn["content"])} for turn in turns]
    # As text: the ids come as a list or as a BatchEncoding, depending on the version of transformers.
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=opened, **arguments
    )
    return str(text)


def reads_parts_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template leaves out a turn that is a text, and shows one that is a list of parts.

    Those of many image-text models do. It is found by trying, once for each template.
    """
    template = str(tokenizer.chat_template)
    known = _PARTS.get(tokenizer)
    if known is None or known[0] != template:
        known = template, not _shows(tokenizer, _ASKED) and _shows(tokenizer, _in_parts(_ASKED))
        _PARTS[tokenizer] = known
    return known[1]


def _shows(tokenizer: PreTrainedTokenizerBase, content: Any) -> bool:
    try:
        return _ASKED in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # jinja2's errors, and what the template itself raises
        return False


def _in_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the current date."""
    template: Any = tokenizer.chat_template or ""
    return any(_NOW.search(str(text)) for text in (template.values() if isinstance(template, Mapping) else [template]))


@lru_cache(maxsize=16)
def _on_day(template: str, date: str) -> str:
    """A template in which every call for the time gives midnight of that day."""
    day = datetime.fromisoformat(date)

    def formatted(match: re.Match[str]) -> str:
        return repr(day.strftime(match[1][1:-1]))

    return _NOW.sub(formatted, template)


def _as_it_stands(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not prompt.plain:
        raise UserError(
            f"prompt '{prompt.id}' is a conversation, which is not rendered yet; rollout.rendered is for texts in a "
            "column 'prompt'"
        )
    if prompt.images:
        raise UserError(
            f"prompt '{prompt.id}' holds an image, whose place only a chat template can write; give it as it was "
            "before it was rendered, and leave out rollout.rendered"
        )
    ids = _bare(prompt, tokenizer, control=True)
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def _templated(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions, opened: bool
) -> list[int]:
    # Texts other than contents can steer templates (a call's type is compared), so they stay as they are unless they
    # spell a control token.
    contents = [message.content for message in prompt.messages]
    spelling = [text for text in inner_texts(prompt) if spelt(text, tokenizer)]

    def shown(prompt: Prompt) -> str:
        return as_text(conversation(prompt.messages), tokenizer, template_options, opened=opened, tools=prompt.tools)

    def template(texts: Sequence[str]) -> str:
        inner = dict(zip(spelling, texts[len(contents) :], strict=True))
        other = with_inner(prompt, lambda text: inner.get(text, text)) if inner else prompt
        turns = conversation(other.messages, texts[: len(contents)])
        return as_text(turns, tokenizer, template_options, opened=opened, tools=other.tools)

    try:
        # The template writes its own special tokens, a beginning-of-text among them.
        ids = filled([*contents, *spelling], template, tokenizer)
        if not prompt.tools and all(turn.role in ("user", "assistant") and not turn.extra for turn in prompt.messages):
            return ids
        missing = unshown(prompt, shown(prompt), shown)
    except Spelt:
        raise
    except Exception as error:  # jinja2's errors, and what the template itself raises ("system role not supported")
        raise UserError(f"prompt '{prompt.id}': {_why('chat template', tokenizer, error)}") from error
    if missing:
        raise UserError(
            f"prompt '{prompt.id}': the chat template{_named(tokenizer)} leaves out {missing} without a word; use a "
            "model whose template shows them, or take them out of the data"
        )
    return ids


def _bare(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, control: bool = False) -> list[int]:
    try:
        text_only = not control and bool(spelt(prompt.text, tokenizer))
        text, plain = prompt.text, {"add_special_tokens": False}
        bare = encoded_alone(tokenizer, text, **plain) if control else ordinary(text, tokenizer)
        ids = encoded_alone(tokenizer, text, add_special_tokens=True, split_special_tokens=text_only)
    except Spelt:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"prompt '{prompt.id}': {_why('tokenizer', tokenizer, error)}") from error
    eos = tokenizer.eos_token_id
    # A token that the text itself ends with is part of the text.
    added = _trailing(ids, eos) - _trailing(bare, eos)
    return ids[: len(ids) - added] if added > 0 else ids


def _trailing(ids: list[int], eos: object) -> int:
    count = 0
    while count < len(ids) and ids[-1 - count] == eos:
        count += 1
    return count


def _why(part: str, tokenizer: PreTrainedTokenizerBase, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the {part}{_named(tokenizer)} refuses it: {first}"


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
