"""Calls of tools in a model's turn: read from its text or by its tokenizer, and compared with the tools' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retort.align.text import after_thinking, completion_text, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Call", "Malformed", "calls_of", "misfit", "refused", "turn_calls"]

#: Llama 3 writes this control token before a call.
_TAG = "<|python_tag|>"
_HEAD = re.compile(r"<tool_call>|<\|python_tag\|>")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BETWEEN = re.compile(r"[\s;,]*")
_ARGUMENTS = ("arguments", "parameters")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: Name of the tool; whether there is one of that name is for `refused` to say.
        arguments: The arguments by name, JSON values.
        id: The call's own id, where the model wrote one that is letters and digits.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: {})
    id: str = ""


@dataclass(frozen=True)
class Malformed:
    """A call that cannot be carried out.

    Attributes:
        words: Why, for the model.
        name: The tool that it names, where that much can be read.
    """

    words: str
    name: str = ""


def calls_of(text: str) -> list[Call | Malformed]:
    """The calls in the text of a turn, in order; none for a turn without one. Thinking is not read.

    Two forms are known. Hermes writes `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call.
    Llama 3 writes nothing but `{"name": ..., "parameters": {...}}`, with `<|python_tag|>` before it or not, and
    semicolons between several. Text that begins with other JSON is no call.
    """
    said = after_thinking(text)
    heads = list(_HEAD.finditer(said))
    if not heads:
        return _untagged(said.strip())
    found: list[Call | Malformed] = []
    for head, end in zip(heads, [*(head.start() for head in heads[1:]), len(said)], strict=True):
        found += _tagged(said[head.end() : end].partition("</tool_call>")[0].strip())
    return found


def turn_calls(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    text: str,
    prompt_ids: Sequence[int] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Call | Malformed]:
    """The calls in a turn: by `tokenizer.parse_response` where the tokenizer has a response template, else `calls_of`.

    Args:
        tokenizer: Tokenizer of the model that wrote the turn.
        ids: Ids of the turn, its stop token included.
        text: The turn as text, see `completion_text`.
        prompt_ids: Ids of what stands before the turn.
        tools: The tools that the model was shown, in the form of chat templates; they say which arguments are numbers.
    """
    if getattr(tokenizer, "response_template", None) is None:
        tag = tokenizer.convert_tokens_to_ids(_TAG)
        if tag in ids and tokenizer.convert_ids_to_tokens(tag) == _TAG:  # a control token, which the text lacks
            text = _TAG + completion_text(tokenizer, ids[list(ids).index(tag) + 1 :])
        return calls_of(text)
    try:
        said: Any = tokenizer.parse_response(
            decode(tokenizer, ids), prefix=decode(tokenizer, prompt_ids), tools=[dict(tool) for tool in tools] or None
        )
    except Exception:  # its parsers raise many kinds; the turn is a model's, and may be anything
        return [Malformed("the call cannot be read")]
    calls = said.get("tool_calls") if isinstance(said, Mapping) else None
    return [_call(call) for call in calls] if isinstance(calls, list) else []


def refused(call: Call | Malformed, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with a call, in words for the model; None where nothing is.

    Args:
        call: The call.
        tools: The tools that there are, in the form of chat templates.
    """
    if isinstance(call, Malformed):
        return call.words
    known = {str(tool.get("name")): tool for tool in (tool.get("function", tool) for tool in tools)}
    if call.name not in known:
        return f"there is no such tool; there is: {', '.join(known)}"
    return misfit(call.arguments, known[call.name].get("parameters") or {})


def misfit(value: Any, schema: Mapping[str, Any], where: str = "the arguments") -> str | None:
    """What of a JSON value does not fit a JSON schema, in words; None where it fits.

    Read of the schema are `type`, `enum`, `const`, `required`, `properties`, `additionalProperties: false` and `items`.

    Args:
        value: The value.
        schema: The schema.
        where: Name of the value in the words.
    """
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{where} must be of the type {' or '.join(map(str, kinds))}"
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and not any(value == one and type(value) is type(one) for one in allowed):
        return f"{where} must be one of {', '.join(json.dumps(one, ensure_ascii=False) for one in allowed)}"
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        found = (misfit(item, schema["items"], f"{where}[{place}]") for place, item in enumerate(value))
        return next((words for words in found if words), None)
    return _of_object(value, schema, where) if isinstance(value, Mapping) else None


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    own: Mapping[str, Any] = schema.get("properties") or {}
    lacking = [name for name in schema.get("required", ()) if name not in value]
    if lacking:
        return f"{where} must have {', '.join(lacking)}"
    other = [name for name in value if name not in own]
    if other and schema.get("additionalProperties") is False:
        return f"{where} must have nothing but {', '.join(own)}" if own else f"{where} must be empty"
    inner = ((name, found) for name, found in value.items() if isinstance(own.get(name), Mapping))
    wrong = (misfit(found, own[name], name if where == "the arguments" else f"{where}.{name}") for name, found in inner)
    return next((words for words in wrong if words), None)


def _is(value: Any, kind: object) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(str(kind), (object,)))


def _tagged(text: str) -> list[Call | Malformed]:
    """The calls behind a tag, of which there must be one."""
    objects, whole = _objects(text)
    if not objects or not whole:
        return [*map(_call, objects), Malformed("the call is not valid JSON")]
    return [*map(_call, objects)]


def _untagged(text: str) -> list[Call | Malformed]:
    """The calls of a text without a tag; none where its first JSON is no call."""
    objects, _ = _objects(text) if text.startswith("{") else ([], False)
    calls = [one for one in objects if isinstance(one, Mapping) and "name" in one and any(a in one for a in _ARGUMENTS)]
    return [*map(_call, calls)] if objects and objects[:1] == calls[:1] else []


def _objects(text: str) -> tuple[list[Any], bool]:
    """JSON values one after another; and whether nothing that begins like another one follows."""
    decoder, found, at = json.JSONDecoder(), list[Any](), 0
    while at < len(text) and text[at] in "{[":
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return found, False
        found += value if isinstance(value, list) else [value]
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
    return found, True


def _call(written: Any) -> Call | Malformed:
    """A call from its JSON, in the plain form or in that of chat templates."""
    if isinstance(written, Mapping) and isinstance(written.get("function"), Mapping):
        written = {**written["function"], "id": written.get("id")}
    name = written.get("name") if isinstance(written, Mapping) else None
    if not isinstance(name, str):
        return Malformed('the call must be a JSON object with "name" and "arguments"')
    given: Any = next((written[key] for key in _ARGUMENTS if key in written), {})
    if isinstance(given, str):  # some write the object as a text
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    if given is not None and not isinstance(given, Mapping):
        given = None
    if given is None:
        return Malformed("the arguments must be a JSON object", name)
    own = written.get("id")
    return Call(name, given, own if isinstance(own, str) and _ID.fullmatch(own) else "")
