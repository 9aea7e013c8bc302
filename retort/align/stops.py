"""Where a model stops, and how the student's stop is read by a teacher that stops with another token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retort.align.text import decode
from retort.align.tokens import vocabulary_width
from retort.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StopMap", "StopTokens", "describe_stop_map", "stop_map", "stop_tokens"]

#: Student's id -> teacher's id and back; to be applied to the teacher's copy of a response *and* to the ids of the
#: teacher's distributions. Empty if both stop with the same token.
StopMap = Mapping[int, int]


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end a response.

    Attributes:
        ids: Each of these ends the writing.
        primary: The one that is taught: where the teacher stops with another token, the probability it gives to its
            own is what this one learns.
    """

    ids: frozenset[int]
    primary: int

    def __post_init__(self) -> None:
        if self.primary not in self.ids:
            raise ValueError(f"the primary stop {self.primary} is not among {sorted(self.ids)}")


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Any,
    model_config: Any,
    *,
    who: str,
    override: Sequence[int | str] | None = None,
) -> StopTokens:
    """The stop tokens of a model, from what its tokenizer and configurations say.

    The primary one is the tokenizer's own `eos_token`, else the first that generation_config.json lists, else
    config.json's. All that generation_config.json lists end the writing; config.json's only where it lists none.

    A configuration class fills in an `eos_token_id` of its own (LlamaConfig: 2) if the model's maker set none. Where
    that is an ordinary word of this vocabulary, a student would stop at every such word and nobody would notice: an
    error, in whichever configuration it is found. So an id counts only if it is a special or added token.

    Args:
        tokenizer: The model's tokenizer.
        generation_config: transformers' `GenerationConfig`, or None.
        model_config: transformers' model configuration, or None.
        who: Whose they are, for messages: `student` or `teacher`, perhaps with a name.
        override: Ids or tokens to use instead of all that; ordinary tokens too. The first is the primary one.

    Raises:
        UserError: A stop that is an ordinary token or no token of this vocabulary, or no stop at all.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    if override is not None:
        found = [_overridden(tokenizer, tokens, stop, who) for stop in override]
        if not found:
            raise UserError("rollout.stop is empty; name at least one token, or leave it out")
        primary, ids = found[0], found
    else:
        generation, model = _ids(generation_config), _ids(model_config)
        for origin, stated in (("generation_config.json", generation), ("config.json", model)):
            for i in stated:
                _check(tokenizer, tokens, i, origin, who)
        own: Any = tokenizer.eos_token_id
        ids = ([] if own is None else [int(own)]) + (generation or model)
        if not ids:
            raise UserError(
                f"the {who} has no stop token: its tokenizer, generation_config.json and config.json name none; "
                "set eos_token in its tokenizer, or rollout.stop=['<...>']"
            )
        primary = ids[0]
    return StopTokens(frozenset(ids), primary)


def stop_map(student: StopTokens, teacher: StopTokens, *, width: int | None = None) -> StopMap:
    """How the teacher reads the student's stop: `{}`, or the two primary stops swapped (the student's first).

    A swap and not a replacement, so that the map stays one to one on the vocabulary: the probability of the teacher's
    own stop goes to the student's, and what the teacher gives to the student's goes to the teacher's.

    Args:
        student: The student's stop tokens.
        teacher: The teacher's.
        width: Number of ids that both share, where it is known; both primary stops must be among them.

    Raises:
        UserError: A primary stop that only one side has.
    """
    for who, stops in (("student", student), ("teacher", teacher)):
        if width is not None and stops.primary >= width:
            raise UserError(
                f"the {who} stops with id {stops.primary}, which is not among the {width} ids that student and teacher "
                "share; choose a stop that both have (rollout.stop for the student, eos_token for the teacher)"
            )
    if student.primary == teacher.primary:
        return {}
    return {student.primary: teacher.primary, teacher.primary: student.primary}


def describe_stop_map(
    mapping: StopMap, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> str:
    """One sentence for the summary at the start of a run, with the tokens' names."""
    if not mapping:
        return "student and teacher stop with the same token"
    student, teacher = next(iter(mapping.items()))
    return (
        f"the student stops with {_shown(student_tokenizer, student)}, which the teacher reads as its own stop "
        f"{_shown(teacher_tokenizer, teacher)} (and the other way round)"
    )


def _ids(config: Any) -> list[int]:
    """What a configuration gives as `eos_token_id`: none, one or several, in order and each once."""
    value = getattr(config, "eos_token_id", None)
    if value is None:
        return []
    return list(dict.fromkeys(int(i) for i in (value if isinstance(value, (list, tuple)) else [value])))


def _check(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str], i: int, origin: str, who: str) -> None:
    example = tokenizer.eos_token or "<...>"
    remedy = f"set the right eos_token_id in generation_config.json and config.json, or rollout.stop=[{example!r}]"
    where = f"the {who}'s {origin}, or the default of its class,"
    if i not in tokens:
        raise UserError(
            f"{where} says to stop at id {i}, which is beyond the tokenizer's vocabulary of "
            f"{vocabulary_width(tokenizer)} ids; {remedy}"
        )
    if i not in tokenizer.all_special_ids and i not in tokenizer.added_tokens_decoder:
        raise UserError(
            f"{where} says to stop at id {i}, but that is {tokens[i]!r}, an ordinary token of this vocabulary; {remedy}"
        )


def _shown(tokenizer: PreTrainedTokenizerBase, i: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(i)} ({i})"


def _overridden(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str], stop: int | str, who: str) -> int:
    if isinstance(stop, int):
        if stop not in tokens:
            raise UserError(
                f"rollout.stop: the {who}'s tokenizer has no id {stop} (largest: {max(tokens, default=-1)})"
            )
        return stop
    named = tokenizer.get_vocab().get(stop)
    if named is not None:
        return named
    try:
        ids = tokenizer.encode(stop, add_special_tokens=False)
    except Exception:  # the tokenizers library raises plain Exception for a text that it cannot encode
        ids = []
    # Decoded again, because an unknown token is one token too.
    if len(ids) == 1 and decode(tokenizer, ids) == stop:
        return int(ids[0])
    special = [tokens[i] for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} if i in tokens]
    raise UserError(f"rollout.stop: {stop!r} is not one token of the {who}'s tokenizer; {did_you_mean(stop, special)}")
