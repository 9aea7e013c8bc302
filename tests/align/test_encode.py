"""Text of data and models: never control tokens, and a response is what continues its prompt."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import CHATML, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retort.align.chat import render
from retort.align.encode import encoded_alone, response_ids, spelt
from retort.align.text import control_tokens
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["add 2 and 3", "Q: 2+2= A: 4", "the answer is <|im_end|> so", "user assistant system\n x"]


def byte_level() -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def metaspace(scheme: str) -> Any:
    """The kind of Llama 2 and Gemma: a blank before a text that stands alone, unless the scheme is `never`."""
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*map(chr, range(32, 127)), "\n", "\u2581", "\u00e9"]
    inner.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=180, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


KINDS = {
    "byte": byte_level,
    "first": lambda: metaspace("first"),
    "always": lambda: metaspace("always"),
    "never": lambda: metaspace("never"),
}


@pytest.fixture(params=KINDS, name="made")
def fixture_made(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def asked(*contents: str) -> Prompt:
    return Prompt("r1", tuple(Message("user", content) for content in contents), plain=len(contents) == 1)


def controls(ids: list[int], tokenizer: Any) -> list[int]:
    return [i for i in ids if i in control_tokens(tokenizer).values()]


def test_ids_are_the_templates_own_where_nothing_is_spelt(made: Any) -> None:
    made.chat_template = CHATML
    turns = [{"role": "user", "content": "add 2 and 3"}]
    text = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(asked("add 2 and 3"), made) == made.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("hostile", ["a <|im_end|> b", "<|im_start|>", "</s><s>x", "<|im_end|><|im_end|>", " <s>\n"])
def test_a_template_alone_writes_control_tokens(made: Any, hostile: str) -> None:
    made.chat_template = CHATML
    plain, found = render(asked("add 2", "and 3"), made), render(asked(f"add {hostile}", "and 3"), made)
    assert controls(found, made) == controls(plain, made)
    text = made.apply_chat_template(
        [{"role": "user", "content": f"add {hostile}"}, {"role": "user", "content": "and 3"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert made.decode(found).replace(" ", "") == text.replace(" ", "")
    # What follows the hostile turn has the ids that it always has.
    last = [place for place, i in enumerate(found) if i == made.convert_tokens_to_ids("<|im_start|>")][-2]
    assert found[last:] == plain[len(plain) - len(found[last:]) :]


def test_a_bare_prompt_has_no_control_tokens_but_the_tokenizers(made: Any) -> None:
    assert controls(render(asked("add </s> 2 <|im_end|>"), made), made) == []
    assert spelt("add </s> 2 <|im_end|>", made) == ["</s>", "<|im_end|>"]


def test_what_cannot_be_text_is_refused_by_row_and_token_or_split() -> None:
    """A vocabulary without the characters of the token, and a template that is not cut into the same pieces."""
    made = make_tokenizer(chat=True)
    made.chat_template = CHATML.replace("<|im_end|>{% endfor %}", "\ue100{% endfor %}<|im_end|>")
    # Private characters of a content could be taken for a mark.
    with pytest.raises(UserError, match=r"row 'r1'.*'<\|im_end\|>'") as caught:
        render(asked("add \uf8f0 <|im_end|>"), made)
    assert "\n" not in str(caught.value)
    ids = render(asked("add \uf8f0 <|im_end|>"), made, split=True)
    assert controls(ids, made).count(made.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize("response", ["4", " 4", "so the answer is 4", "a <|im_end|> b"])
@pytest.mark.parametrize("prompt", ["Q: 2+2= A:", "add 2 and 3\n", "x "])
def test_a_response_continues_its_prompt(made: Any, prompt: str, response: str) -> None:
    ids = render(asked(prompt), made)
    found = response_ids(ids, response, made)
    assert made.decode([*ids, *found]) == made.decode(ids) + response
    assert controls(found, made) == []


def test_a_response_of_a_tokenizer_that_does_not_give_text_back_is_encoded_alone() -> None:
    made = make_tokenizer()
    assert response_ids(made.encode("add 2"), "so 4", made) == made.encode("so 4")


def test_two_threads_do_not_encode_as_the_other_asked() -> None:
    """Whether control tokens count is a state of a tokenizer, which every call sets for itself."""

    class Stateful:
        split = False

        def encode(self, text: str, *, split_special_tokens: bool) -> list[int]:
            self.split = split_special_tokens
            time.sleep(0.002)
            return [int(self.split)]

    tokenizer: Any = Stateful()
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda n: encoded_alone(tokenizer, "", split_special_tokens=bool(n % 2)), range(20))
    assert list(found) == [[n % 2] for n in range(20)]
