from __future__ import annotations

from typing import Any

import pytest
from support import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from retort.align import StopTokens, describe_stop_map, stop_map, stop_tokens
from retort.align.stops import turn_end
from retort.errors import UserError

VOCAB = {"?": 0, "a": 1, "b": 2, "c": 3, "<|endoftext|>": 4, "<|im_end|>": 5}


def tokenizer(eos: str | None = None, *, special: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        inner.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)


def generation(eos: int | list[int] | None) -> GenerationConfig:
    return GenerationConfig(eos_token_id=eos)


SILENT = Qwen3Config()
INHERITED = LlamaConfig()  # whose class says eos_token_id=2, here the letter b


def refused(*arguments: object, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        stop_tokens(*arguments, label="student", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_tokenizers_own_stop_is_primary() -> None:
    chat = stop_tokens(tokenizer("<|im_end|>"), generation([5, 4]), SILENT, label="student")
    assert chat == StopTokens(frozenset({4, 5}), 5)
    base = stop_tokens(tokenizer("<|endoftext|>"), generation(4), SILENT, label="student")
    assert base == StopTokens(frozenset({4}), 4)
    # What generation_config.json leaves out still ends the writing if the tokenizer calls it the end.
    assert stop_tokens(tokenizer("<|im_end|>"), generation(4), None, label="student").ids == {4, 5}
    assert stop_tokens(tokenizer("<|im_end|>"), None, None, label="student") == StopTokens(frozenset({5}), 5)


def test_without_one_the_configurations_are_asked_in_order() -> None:
    assert stop_tokens(tokenizer(), generation([5, 4]), None, label="student") == StopTokens(frozenset({4, 5}), 5)
    assert stop_tokens(tokenizer(), generation(None), Qwen3Config(eos_token_id=4), label="student").primary == 4
    assert stop_tokens(tokenizer(), generation(5), Qwen3Config(eos_token_id=4), label="student").ids == {5}


@pytest.mark.parametrize("own", [None, "<|endoftext|>"])
def test_an_inherited_stop_that_is_an_ordinary_word_is_refused(own: str | None) -> None:
    message = refused(tokenizer(own), None, INHERITED)
    assert "the student's config.json, or the default of its class," in message
    assert "id 2, but that is 'b', an ordinary token" in message
    assert "eos_token_id in generation_config.json" in message
    assert f"rollout.stop=['{own or '<...>'}']" in message
    message = refused(tokenizer(own), GenerationConfig.from_model_config(INHERITED), INHERITED)
    assert "the student's generation_config.json" in message
    # A right generation_config.json does not make the wrong config.json harmless: other tools read that one.
    assert "id 2" in refused(tokenizer(own), generation(4), INHERITED)


def test_a_stop_that_is_called_special_by_the_tokenizer_only_as_its_end() -> None:
    made = tokenizer("<|endoftext|>", special=False)
    assert stop_tokens(made, generation(4), None, label="student").primary == 4
    assert "'<|im_end|>', an ordinary token" in refused(tokenizer(None, special=False), generation(5), None)


def test_beyond_the_vocabulary_and_none_at_all() -> None:
    assert "id 6, which is beyond the tokenizer's vocabulary of 6 ids" in refused(tokenizer(), generation(6), None)
    assert "id -1" in refused(tokenizer("<|im_end|>"), generation(-1), None)
    assert "the student has no stop token" in refused(tokenizer(), generation(None), SILENT)
    assert "rollout.stop" in refused(tokenizer(), None, None)


def test_override() -> None:
    made = tokenizer("<|endoftext|>")
    # Said on purpose, so an ordinary token may be one, and what the configurations say does not matter.
    chosen = stop_tokens(made, None, INHERITED, label="student", override=["<|im_end|>", "b", 4])
    assert chosen == StopTokens(frozenset({2, 4, 5}), 5)
    assert "did you mean '<|im_end|>'?" in refused(made, None, None, override=["<im_end>"])
    assert "not one token" in refused(made, None, None, override=["a b"])
    assert "has no id 99 (largest: 5)" in refused(made, None, None, override=[99])
    assert "rollout.stop is empty" in refused(made, None, None, override=[])


def test_stop_map() -> None:
    made = tokenizer()
    base, chat = StopTokens(frozenset({4}), 4), StopTokens(frozenset({4, 5}), 5)
    assert stop_map(base, base) == {}
    assert stop_map(base, chat) == {4: 5, 5: 4}
    assert describe_stop_map({}, made, made) == "student and teacher stop with the same token"
    sentence = describe_stop_map(stop_map(base, chat), made, made)
    assert "student stops with <|endoftext|> (4)" in sentence
    assert "own stop <|im_end|> (5)" in sentence
    assert stop_map(base, chat, width=6) == {4: 5, 5: 4}
    with pytest.raises(UserError, match="the teacher stops with id 5, which is not among the 5 ids"):
        stop_map(base, chat, width=5)


def test_the_primary_stop_is_one_of_the_stops() -> None:
    with pytest.raises(ValueError, match="not among"):
        StopTokens(frozenset({1}), 2)


def test_the_stop_of_several_is_what_the_template_writes() -> None:
    """Gemma's kind: `eos_token` is not what ends a turn; generation_config.json lists both."""
    both = generation([2, 4])
    assert stop_tokens(make_tokenizer(chat=True), both, None, label="teacher") == StopTokens(frozenset({2, 4}), 4)
    assert stop_tokens(make_tokenizer(), both, None, label="teacher") == StopTokens(frozenset({2, 4}), 2)
    # A template that raises, or that drops what the assistant said, decides nothing.
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].content }}<|im_end|>"):
        odd = make_tokenizer()
        odd.chat_template = template
        assert stop_tokens(odd, both, None, label="teacher").primary == 2
        assert turn_end(odd) == ()


@pytest.mark.parametrize(
    ("student", "teacher", "swap", "merged"),
    [
        (({2}, 2), ({2}, 2), {}, ()),
        (({2}, 2), ({4}, 4), {2: 4, 4: 2}, ()),
        (({2}, 2), ({2, 4}, 4), {2: 4, 4: 2}, (4,)),  # what the teacher gives to 2 is in column 4 after the swap
        (({2}, 2), ({2, 4}, 2), {}, (4,)),
        (({2, 4}, 4), ({2, 4}, 4), {}, ()),
        (({2, 4}, 4), ({2}, 2), {4: 2, 2: 4}, ()),
        (({2, 4}, 2), ({2, 4, 3}, 3), {2: 3, 3: 2}, (3,)),
    ],
)
def test_sets_of_stops(student: Any, teacher: Any, swap: dict[int, int], merged: tuple[int, ...]) -> None:
    ours, theirs = (StopTokens(frozenset(ids), primary) for ids, primary in (student, teacher))
    found = stop_map(ours, theirs)
    assert (dict(found), found.merged, found.into) == (swap, merged, ours.primary)
    assert bool(found) == bool(swap or merged)
