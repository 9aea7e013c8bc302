from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retort.align import TemplateOptions, render
from retort.align import chat as chat_module
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

# ChatML as the Qwen models write it: without thinking, an empty thought is put in front of the answer.
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }} {{ message.content }} <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{%- if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif -%}
{%- endif -%}"""
PLAIN_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
REFUSING = "{{ raise_exception('System role not supported') }}"
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<bos>", "<eos>"]
WORDS = ["?", "user", "assistant", "system", "hello", "world"]


def tokenizer(template: str | None = None, *, unknown: bool = True, wrap: bool = False) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?") if unknown else models.WordLevel(vocab))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(MARKS)
    if wrap:
        ids = [(mark, inner.token_to_id(mark)) for mark in ("<bos>", "<eos>")]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


def chat(*turns: tuple[str, str]) -> Prompt:
    return Prompt("row", tuple(Message(*turn) for turn in turns), plain=False)


PLAIN = Prompt("row", (Message("user", "hello world"),))


def words(made: PreTrainedTokenizerFast, ids: list[int]) -> str:
    assert type(ids) is list
    assert all(type(i) is int for i in ids)
    return " ".join(made.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("wrap", [False, True])  # a template writes its own special tokens: none are added to it
def test_chat_template(wrap: bool) -> None:
    made = tokenizer(CHATML, wrap=wrap)
    rendered = words(made, render(chat(("system", "world"), ("user", "hello")), made, TemplateOptions(thinking=False)))
    assert rendered == (
        "<|im_start|> system world <|im_end|> <|im_start|> user hello <|im_end|> "
        "<|im_start|> assistant <think> </think>"
    )
    assert words(made, render(PLAIN, made)).startswith("<|im_start|> user hello world <|im_end|>")


def test_thinking_reaches_the_template_and_other_templates_ignore_it() -> None:
    made = tokenizer(CHATML)
    assert words(made, render(PLAIN, made, TemplateOptions(thinking=True))).endswith("<|im_start|> assistant")
    made = tokenizer(PLAIN_TEMPLATE)
    assert render(PLAIN, made, TemplateOptions(thinking=True)) == render(PLAIN, made) != []


def test_bare_text_keeps_the_beginning_but_not_the_end_of_text() -> None:
    made = tokenizer()
    assert words(made, render(PLAIN, made)) == "hello world"
    made = tokenizer(wrap=True)
    assert words(made, render(PLAIN, made)) == "<bos> hello world"
    # One that the text itself spells is text, in this vocabulary an unknown word.
    ends_itself = Prompt("row", (Message("user", "hello <eos>"),))
    assert words(made, render(ends_itself, made)).startswith("<bos> hello")
    assert made.eos_token_id not in render(ends_itself, made)


def test_messages_need_a_template() -> None:
    with pytest.raises(UserError, match=r"prompt 'row' is a conversation.*has no chat template.*chat_template.jinja"):
        render(chat(("user", "hello")), tokenizer())


@pytest.mark.parametrize(
    ("made", "prompt", "expected"),
    [
        (tokenizer(REFUSING), chat(("system", "x"), ("user", "y")), "refuses it: System role not supported"),
        (tokenizer("{% broken"), PLAIN, "chat template refuses it"),
        (tokenizer(unknown=False), Prompt("row", (Message("user", "unheard"),)), "the tokenizer refuses it"),
        (tokenizer(), Prompt("row", (Message("user", "  "),)), "no tokens"),
    ],
)
def test_refusals_name_the_row(made: PreTrainedTokenizerFast, prompt: Prompt, expected: str) -> None:
    with pytest.raises(UserError, match="prompt 'row'") as caught:
        render(prompt, made)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_renderer_renders_each_prompt_once_and_keeps_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(prompt: Prompt, *arguments: Any, **more: Any) -> list[int]:
        asked.append(prompt.id)
        return render(prompt, *arguments, **more)

    monkeypatch.setattr(chat_module, "render", noted)
    monkeypatch.setattr(chat_module, "_KEPT", 3)
    prompts = [Prompt(str(n), (Message("user", text),)) for n, text in enumerate(("hello world", "world hello"))]
    renderer = chat_module.Renderer(tokenizer())
    for _ in range(2):
        for prompt in prompts:
            assert renderer(prompt).ids == render(prompt, tokenizer())
    assert asked == ["0", "1", "1"]  # two ids each: room for one
    # What a prompt is known by is what is shown of it, not its name.
    assert renderer(Prompt("0", (Message("user", "world"),))).ids != renderer(prompts[0]).ids
