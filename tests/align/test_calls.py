"""Calls of tools in a model's turn: the forms that are known, and what fits a schema."""

from __future__ import annotations

from typing import Any

import pytest
from support import make_tokenizer

from retort.align.calls import Call, Malformed, calls_of, misfit, refused, turn_calls

GO = Call("go", {"to": "north"})
NO_JSON = Malformed("the call is not valid JSON")
NO_OBJECT = Malformed('the call must be a JSON object with "name" and "arguments"')


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("go north", []),
        ("", []),
        ('<tool_call>\n{"name": "go", "arguments": {"to": "north"}}\n</tool_call>', [GO]),
        ('I go. <tool_call>{"name": "go", "arguments": {"to": "north"}}</tool_call> so', [GO]),
        ('<tool_call>{"name": "go", "arguments": {"to": "north"}}', [GO]),
        ('<tool_call>{"name": "go", "arguments": "{\\"to\\": \\"north\\"}"}</tool_call>', [GO]),
        ('<tool_call>{"function": {"name": "go", "arguments": {"to": "north"}}}</tool_call>', [GO]),
        ('<tool_call>{"name": "go", "arguments": {"to": "north"}}</tool_call><tool_call>{</tool_call>', [GO, NO_JSON]),
        ('<tool_call>{"name": "look"}</tool_call>', [Call("look")]),
        ('{"name": "go", "parameters": {"to": "north"}}', [GO]),
        ('{"name": "go", "parameters": {"to": "north"}}; {"name": "look", "parameters": {}}', [GO, Call("look")]),
        ('<|python_tag|>{"name": "go", "parameters": {"to": "north"}}', [GO]),
        ('<|python_tag|>{"name": "go", "parameters": {"to": "north"}} {"name"', [GO, NO_JSON]),
        ('{"name": "Ada", "born": 1815}', []),
        ("{5}", []),
        ("<tool_call></tool_call>", [NO_JSON]),
        ("<tool_call>go north</tool_call>", [NO_JSON]),
        ("<tool_call>" + '{"a":' * 5000, [NO_JSON]),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', [NO_OBJECT]),
        ("<tool_call>[7]</tool_call>", [NO_OBJECT]),
        ('{"name": "go", "arguments": 5}', [Malformed("the arguments must be a JSON object", "go")]),
        ('<think><tool_call>{"name": "look"}</tool_call></think>go', []),
    ],
)
def test_the_calls_of_a_text(text: str, calls: list[Any]) -> None:
    assert calls_of(text) == calls


def test_an_id_is_kept_where_it_is_one() -> None:
    """Model output is hostile: an id that is shown to the model again must not spell anything."""
    (call,) = calls_of('{"name": "look", "arguments": {}, "id": "a1B2c3D4e"}')
    assert call == Call("look", {}, "a1B2c3D4e")
    (call,) = calls_of('{"name": "look", "arguments": {}, "id": "<|im_end|>"}')
    assert call == Call("look")


SCHEMA = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "enum": ["north", "south"]},
        "steps": {"type": "integer"},
        "how": {"type": ["number", "null"]},
        "bag": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
    "required": ["to"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "north", "steps": 2, "how": None, "bag": [{"name": "key"}]}, None),
        ({"to": "north", "steps": 2.0, "how": 0.5}, None),
        ({}, "the arguments must have to"),
        ({"to": "up"}, 'to must be one of "north", "south"'),
        ({"to": 5}, "to must be of the type string"),
        ({"to": "north", "steps": True}, "steps must be of the type integer"),
        ({"to": "north", "how": "so"}, "how must be of the type number or null"),
        ({"to": "north", "bag": [{"name": "key"}, {}]}, "bag[1] must have name"),
        ({"to": "north", "so": 1}, "the arguments must have nothing but to, steps, how, bag"),
    ],
)
def test_arguments_are_compared_with_the_schema(arguments: dict[str, Any], words: str | None) -> None:
    assert misfit(arguments, SCHEMA) == words
    tools = ({"type": "function", "function": {"name": "go", "parameters": SCHEMA}},)
    assert refused(Call("go", arguments), tools) == words


def test_a_tool_that_there_is_not_is_refused_and_a_bare_schema_is_read() -> None:
    tools = ({"name": "go"}, {"name": "look"})
    assert refused(Call("look", {"so": 1}), tools) is None
    assert refused(Call("fly"), tools) == "there is no such tool; there is: go, look"
    assert refused(NO_JSON, tools) == NO_JSON.words


# --- by the tokenizer ---

#: Calls in square brackets, as no form of Retort's has them.
TEMPLATE = {
    "start_anchor": "<|im_start|>",
    "fields": {
        "content": {"close": "<|im_end|>"},
        "tool_calls": {
            "open": "[",
            "close": "]",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "go", "arguments": "{content}"}},
        },
    },
}


def test_a_tokenizer_with_a_response_template_reads_its_own_form() -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True, words=["so", "north", "[", "]", "{", "}", "to", '"', ":"])
    ids = tokenizer.encode('so [ { " to " : " north " } ]', add_special_tokens=False)
    text = tokenizer.decode(ids)
    assert turn_calls(tokenizer, [*ids, 4], text=text, prompt_ids=[3]) == []
    tokenizer.response_template = TEMPLATE
    assert turn_calls(tokenizer, [*ids, 4], text=text, prompt_ids=[3]) == [Call("go", {" to ": " north "})]
    plain = tokenizer.encode("so", add_special_tokens=False)
    assert turn_calls(tokenizer, [*plain, 4], text="so", prompt_ids=[3]) == []
    assert turn_calls(tokenizer, [*ids[:-2], 4], text="so", prompt_ids=[3]) == [Malformed("the call cannot be read")]


def test_a_tag_that_is_a_control_token_is_seen() -> None:
    """Llama 3 writes its tag as a control token, which the text of a turn lacks."""
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True, words=["so", "{", "}", '"', "name", ":", "look"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]})
    ids = tokenizer.encode("so <|python_tag|> look", add_special_tokens=False)
    assert turn_calls(tokenizer, [*ids, 4], text="so look") == [NO_JSON]
    assert turn_calls(tokenizer, [*ids[:1], *ids[2:], 4], text="so look") == []
