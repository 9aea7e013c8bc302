"""Reads the columns of a row as a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retort.core.images import PromptImage
from retort.core.rollouts import Message, Prompt
from retort.data.columns import PRIVILEGED, Seen, lookup, no_prompt
from retort.data.conversations import LAST_ROLES, as_conversation, conversation, read_tools
from retort.data.image_parts import RowImages
from retort.data.images import ImageFolder, ImageReader
from retort.data.media import check_media, holds_a_number, holds_something
from retort.data.values import listed, optional, plain, text
from retort.errors import UserError, a_kind

__all__ = ["RowReader"]

#: Columns of the conversation in other formats; read where no column of ours holds the prompt.
_CONVERSATIONS = ("conversations", "conversation")
#: Keys of a turn that are checked against the chat template; the effect of other keys is not known.
_KNOWN_KEYS = ("tool_calls", "tool_call_id")


@dataclass(frozen=True)
class _RowPrompt:
    """The prompt of a row, before other columns are read."""

    messages: tuple[Message, ...]
    plain: bool = False
    response: str | None = None


class RowReader:
    """Reads rows of one source, and counts the facts for its notes."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        """Begins without rows.

        Args:
            columns: Our name -> the name in the source.
        """
        self.columns = columns
        self.seen = Seen()
        self.rows = 0
        self._counts: Counter[str] = Counter()
        self._answers = self._responses = False
        self._read_image = ImageReader()

    def __call__(self, where: str, row: Mapping[str, Any], folder: ImageFolder) -> tuple[str | None, Prompt]:
        """Returns the row's own id, if it has one, and the prompt, named by the row's number where it has none.

        Args:
            where: The row, for messages.
            row: Its cells by column.
            folder: The folder of the images that it names.

        Raises:
            UserError: One line that names the row and the remedy.
        """
        number = self.rows
        self.rows += 1
        self.seen.row(row)
        images = self._row_images(where, row, folder)
        asked = self._row_prompt(where, row, images)
        name, system = self._words(where, row, "id"), self._words(where, row, "system")
        tools = read_tools(where, self._cell(row, "tools"))
        messages = self._with_system(where, system, asked.messages)
        given = {column: self._words(where, row, column) for column in PRIVILEGED}
        prompt = Prompt(
            id=str(number) if name is None else name,
            messages=messages,
            plain=asked.plain and system is None and not tools,
            answer=self._words(where, row, "answer"),
            response=self._response(where, row, asked.response),
            privileged={column: words for column, words in given.items() if words is not None},
            clean=self._clean(where, row, system, messages, images),
            domain=self._words(where, row, "domain") or "",
            tools=tools,
            teacher_images=tuple(self._images(where, row, "teacher_images", folder)),
        )
        self._only_read_media(where, row, messages)
        self._answers |= prompt.answer is not None
        self._responses |= prompt.response is not None
        return name, prompt

    def _row_images(self, where: str, row: Mapping[str, Any], folder: ImageFolder) -> RowImages:
        """The images of the prompt; a column `image` counts as `images` where that is neither there nor mapped."""
        found = self._images(where, row, "images", folder)
        given = self.columns.get("images", "images") in row
        if "images" not in self.columns and "image" in row and "image" not in self.columns.values():
            single = self._images(where, row, "image", folder)
            if found and single:
                raise UserError(
                    f"{where}: the columns 'images' and 'image' both hold images; map the one that is meant "
                    "(columns.images=...), and leave the other out"
                )
            found, given = found or single, True
        return RowImages(lambda at, value: self._read_image(at, value, folder), found, given=given)

    def _images(self, where: str, row: Mapping[str, Any], ours: str, folder: ImageFolder) -> list[PromptImage]:
        theirs = self.columns.get(ours, ours)
        found, at = plain(lookup(row, theirs)), f"{where}, '{theirs}'"
        if not holds_something(found):
            if holds_a_number(found):
                raise UserError(
                    f"{at}: holds {a_kind(found)} of which no image is read; expected paths, bytes or data URLs: map the "
                    "column that holds these (columns.images=...), or leave this one out"
                )
            return []
        value = listed(self._cell(row, ours))
        if isinstance(value, list):
            return [self._read_image(f"{at}, item {number}", item, folder) for number, item in enumerate(value)]
        return [self._read_image(at, value, folder)]

    def _only_read_media(self, where: str, row: Mapping[str, Any], messages: tuple[Message, ...]) -> None:
        """Refuses media that are not read, also in structures that something is read from."""
        check_media(where, row, self.seen.read)
        apart = [theirs.rpartition(".") for theirs in self.columns.values() if theirs not in row]
        for above in dict.fromkeys(above for above, _, _ in apart if above):
            inside = lookup(row, above)
            if isinstance(inside, Mapping):
                check_media(f"{where}, '{above}'", inside, {part for own, _, part in apart if own == above})
        if any("\0" in message.content for message in messages):
            self._counts["the prompt holds a NUL character (\\x00), which is kept"] += 1

    def notes(self) -> list[str]:
        """Notes on what was recognised, with the number of rows, and on what was not used."""
        counts = [f"{what}: {count} of {self.rows} rows" for what, count in self._counts.items()]
        return counts + self.seen.notes(answers=self._answers, responses=self._responses)

    def _cell(self, row: Mapping[str, Any], ours: str) -> Any:
        theirs = self.columns.get(ours, ours)
        if theirs in row:
            self.seen.read.add(theirs)
            return plain(row[theirs])
        if "." not in theirs:
            return None
        self.seen.read.add(theirs.split(".")[0])
        return plain(lookup(row, theirs))

    def _words(self, where: str, row: Mapping[str, Any], ours: str) -> str | None:
        value = self._cell(row, ours)
        return None if value is None else optional(where, ours, value)

    def _row_prompt(self, where: str, row: Mapping[str, Any], images: RowImages) -> _RowPrompt:
        # A mapping of `messages` alone decides between the two, even if the file also has a `prompt`.
        chosen = (
            ("messages",) if "messages" in self.columns and "prompt" not in self.columns else ("prompt", "messages")
        )
        for ours in chosen:
            value = self._cell(row, ours)
            if value is not None:
                return self._cell_prompt(where, ours, value, images)
        # Formats of others are recognised by their columns alone, and never against a mapping.
        if not {"prompt", "messages"} & set(self.columns):
            for name in _CONVERSATIONS:
                if row.get(name) is not None:
                    self.seen.read.add(name)
                    self._counts[f"`{name}` is read as the conversation"] += 1
                    return self._conversation(where, plain(row[name]), name, images)
            if row.get("instruction") is not None and ("input" in row or "output" in row):
                return self._alpaca(where, row, images)
        raise UserError(f"{where}: {no_prompt(row, self.columns)}")

    def _cell_prompt(self, where: str, ours: str, value: Any, images: RowImages) -> _RowPrompt:
        if not isinstance(value, str):
            return self._conversation(where, value, ours, images)
        turns = as_conversation(where, value) if ours == "prompt" else value
        if turns is None:
            return self._text(where, value, images)
        self._counts[f"`{self.columns.get(ours, ours)}` is JSON text of a conversation, and read as its turns"] += 1
        return self._conversation(where, turns, ours, images)

    def _text(self, where: str, words: str, images: RowImages, response: str | None = None) -> _RowPrompt:
        if not words.strip():
            raise UserError(f"{where}: the prompt is empty")
        messages = images.placed(where, [Message("user", text(where, "prompt", words))])
        return _RowPrompt(messages, plain=True, response=response)

    def _alpaca(self, where: str, row: Mapping[str, Any], images: RowImages) -> _RowPrompt:
        """Instruction, a blank line, and the input where there is one; the output is the response."""
        self.seen.read |= {"instruction", "input", "output"}
        parts = {name: optional(where, name, plain(row.get(name))) for name in ("instruction", "input", "output")}
        self._counts["read as Alpaca: `instruction` and `input` are the prompt, `output` is the response"] += 1
        asked = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
        return self._text(where, asked, images, parts["output"])

    def _conversation(self, where: str, value: Any, name: str, images: RowImages) -> _RowPrompt:
        """The turns up to the last one of the user or a tool; the assistant's text after it is the response."""
        messages = conversation(where, value, images, name)
        response = None
        if messages[-1].role == "assistant" and len(messages) > 1:
            *before, last = messages
            messages, response = tuple(before), self._last_words(where, last)
        _check_last(where, messages)
        messages = images.placed(where, messages)
        for key in {key: None for message in messages for key in message.extra if key not in _KNOWN_KEYS}:
            self._counts[f"turns have a key `{key}`, which the chat template may show or not"] += 1
        return _RowPrompt(messages, response=response)

    def _last_words(self, where: str, last: Message) -> str | None:
        if last.images:
            raise UserError(f"{where}: the response holds an image; a response is text alone")
        if "tool_calls" in last.extra:
            words = " with the words beside the call" if last.content.strip() else ""
            self._counts[
                f"the last turn, the assistant's, calls a tool and is left out{words}: it is no response in words"
            ] += 1
            return None
        if not last.content.strip():
            self._counts["the last turn, the assistant's, is empty and left out"] += 1
            return None
        for key in last.extra:
            self._counts[f"the last turn's `{key}` is not in the response"] += 1
        self._counts["the last turn, the assistant's, is read as the response"] += 1
        return last.content

    def _response(self, where: str, row: Mapping[str, Any], last: str | None) -> str | None:
        value = self._cell(row, "response")
        if isinstance(value, list) and value:
            turns = conversation(where, value, RowImages(self._no_image), "response")
            if [turn.role for turn in turns] != ["assistant"]:
                raise UserError(f"{where}: 'response' holds turns; expected text, or one turn of the assistant")
            given = self._last_words(where, turns[0])
        else:
            given = optional(where, "response", value)
        if given is not None and last is not None and given.strip() != last.strip():
            raise UserError(
                f"{where}: the column 'response' and the response that the row ends with differ; leave one of them out"
            )
        return last if given is None else given

    def _with_system(self, where: str, system: str | None, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if system is None:
            return messages
        self._counts[f"`{self.columns.get('system', 'system')}` is read as the system's turn"] += 1
        if messages[0].role not in ("system", "developer"):
            return (Message("system", system), *messages)
        if messages[0].content.strip() != system.strip():
            raise UserError(f"{where}: the column 'system' and the conversation's own system turn differ; drop one")
        return messages

    @staticmethod
    def _no_image(at: str, value: Any) -> PromptImage:
        raise UserError(f"{at}: is an image in 'response'; a response is text alone")

    def _clean(
        self, where: str, row: Mapping[str, Any], system: str | None, messages: tuple[Message, ...], images: RowImages
    ) -> tuple[Message, ...] | None:
        """The other half of a pair of prompts: another last turn, with the same images, or another conversation."""
        value = self._cell(row, "clean")
        if isinstance(value, list):
            own = images.again()
            clean = conversation(where, value, own, "clean")
            _check_last(where, clean)
            return self._with_system(where, system, own.placed(f"{where}, 'clean'", clean))
        words = optional(where, "clean", value)
        if words is None:
            return None
        own = RowImages(self._no_image, messages[-1].images)
        return (*messages[:-1], *own.placed(f"{where}, 'clean'", [replace(messages[-1], content=words, images=())]))


def _check_last(where: str, messages: tuple[Message, ...]) -> None:
    last = messages[-1].role
    if last not in LAST_ROLES:
        remedy = "; join turns of the assistant to one, which is read as the response, and begin with a user's turn"
        raise UserError(
            f"{where}: the last message is the {last}'s; a prompt ends with the user's turn"
            f"{remedy if last == 'assistant' else ''}"
        )
