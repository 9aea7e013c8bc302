"""Stop tokens of a model, and how a teacher with another stop reads the student's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retort.align.text import decode
from retort.align.tokens import vocabulary_width
from retort.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KEPT",
    "STOP_IDS_KEY",
    "StopMap",
    "StopTokens",
    "describe_stop_map",
    "named_stops",
    "stop_map",
    "stop_tokens",
    "turn_end",
]

#: Share of the teacher's stop probability that each merged stop keeps: with none, the reverse KL would be infinite.
KEPT = 2.0**-20

#: Key of config.json in which an exported student stores its stop ids, the primary stop first.
STOP_IDS_KEY = "retort_stop_ids"

_ANSWER = "Retortanswer"


@dataclass(frozen=True, eq=False)
class StopMap(Mapping[int, int]):
    """A teacher's reading of the student's stop: a swap of two ids, and the teacher's stops that count as that stop.

    As a mapping it is the swap (student's id to teacher's id and back). It is applied to the teacher's copy of a
    response *and* to the ids of its distributions. Then the probability of each of `merged` is added to `into`.

    Attributes:
        swap: The two ids; empty if both have the same primary stop.
        merged: The teacher's further stops, as ids of the student's, at which the student does not stop.
        into: The student's primary stop.
    """

    swap: Mapping[int, int] = field(default_factory=lambda: {})
    merged: tuple[int, ...] = ()
    into: int = -1

    def __getitem__(self, key: int) -> int:
        return self.swap[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self.swap)

    def __len__(self) -> int:
        return len(self.swap)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.swap or self.merged)


@dataclass(frozen=True)
class StopTokens:
    """The tokens that end a completion.

    Attributes:
        ids: All ids that end generation.
        primary: The id that is taught: where the teacher stops with another token, the probability of that token is
            what this one learns.
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
    label: str,
    override: Sequence[int | str] | None = None,
) -> StopTokens:
    """The stop tokens of a model, from its tokenizer and configurations.

    All that generation_config.json lists end generation, and the tokenizer's own `eos_token`; those of config.json only
    where generation_config.json lists none. The primary one of several is the one that the chat template writes after
    an assistant's turn. Where it writes none of them, or there is no template, it is the tokenizer's `eos_token`, else
    the first listed. A student that Retort exported stores it in its config.json.

    A configuration class fills in an `eos_token_id` of its own (LlamaConfig: 2) if the model's maker set none. Where
    that is an ordinary word of this vocabulary, a student would silently stop at every such word. That is an error, in
    either configuration: an id counts only if it is a special or added token.

    Args:
        tokenizer: The model's tokenizer.
        generation_config: transformers' `GenerationConfig`, or None.
        model_config: transformers' model configuration, or None.
        label: Role of the model for messages: `student` or `teacher`, perhaps with a name.
        override: Ids or tokens to use instead; ordinary tokens too. The first is the primary one.

    Raises:
        UserError: A stop that is an ordinary token or no token of this vocabulary, or no stop at all.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    if override is not None:
        found = [_overridden(tokenizer, tokens, stop, label) for stop in override]
        if not found:
            raise UserError("rollout.stop is empty; name at least one token, or leave it out")
        primary, ids = found[0], found
    else:
        generation, model = _ids(generation_config), _ids(model_config)
        as_text = [int(i) for i in getattr(model_config, STOP_IDS_KEY, None) or ()]
        # Used only while generation_config.json agrees: an edit of that file wins.
        if as_text and set(as_text) == set(generation) and all(i in tokens for i in as_text):
            return StopTokens(frozenset(as_text), as_text[0])
        for origin, stated in (("generation_config.json", generation), ("config.json", model)):
            for i in stated:
                _check(tokenizer, tokens, i, origin, label)
        own: Any = tokenizer.eos_token_id
        ids = ([] if own is None else [int(own)]) + (generation or model)
        if not ids:
            raise UserError(
                f"the {label} has no stop token: its tokenizer, generation_config.json and config.json name none; "
                "set eos_token in its tokenizer, or rollout.stop=['<...>']"
            )
        primary = ids[0] if len(set(ids)) == 1 else _used(tokenizer, tokens, ids)
    return StopTokens(frozenset(ids), primary)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special and added tokens that the chat template writes after an assistant's turn, in order; maybe none."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except Exception:  # jinja2's errors, and errors of the template itself; rendering a prompt reports them
        return ()
    _, found, tail = text.rpartition(_ANSWER)
    if not found:
        return ()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    names = sorted((re.escape(name) for name in added if name.strip()), key=len, reverse=True)
    return tuple(re.findall("|".join(names), tail)) if names else ()


def _used(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str], ids: Sequence[int]) -> int:
    """The stop, of several, that the model ends its turns with."""
    named = {tokens[i]: i for i in ids if i in tokens}
    return next((named[name] for name in turn_end(tokenizer) if name in named), ids[0])


def stop_map(student: StopTokens, teacher: StopTokens, *, width: int | None = None) -> StopMap:
    """The teacher's reading of the student's stop: the primary stops swapped, the teacher's other stops merged.

    It is a swap and not a replacement, so that reading stays one to one on the vocabulary: the probability of the
        teacher's primary stop goes to the student's, and the teacher's probability of the student's goes to the
        teacher's. Then every id that holds the probability of a teacher's stop, and at which the student does not stop,
        gives it to the student's primary stop. A token that ends generation for both is left as it is. The map is empty
        if nothing differs.

    Args:
        student: The student's stop tokens.
        teacher: The teacher's.
        width: Number of ids that both share, where it is known; both primary stops must be among them.

    Raises:
        UserError: Only one side has a primary stop.
    """
    for label, stops in (("student", student), ("teacher", teacher)):
        if width is not None and stops.primary >= width:
            raise UserError(
                f"the {label} stops with id {stops.primary}, which is not among the {width} ids that student and "
                "teacher share; choose a stop that both have (rollout.stop for the student, eos_token for the teacher)"
            )
    ours, theirs = student.primary, teacher.primary
    swap = {} if ours == theirs else {ours: theirs, theirs: ours}
    # The swap is its own inverse: a teacher's id is the student's id that is read as it.
    held = {swap.get(i, i) for i in teacher.ids if width is None or i < width}
    merged = tuple(sorted(held - student.ids - {ours}))
    return StopMap(swap, merged, ours)


def describe_stop_map(
    mapping: StopMap, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> str:
    """One sentence for the summary at the start of a run, with the tokens' names."""
    if not mapping:
        return "student and teacher stop with the same token"
    parts: list[str] = []
    if len(mapping):
        student, teacher = next(iter(mapping.items()))
        parts.append(
            f"the student stops with {_shown(student_tokenizer, student)}, which the teacher reads as its own stop "
            f"{_shown(teacher_tokenizer, teacher)} (and the other way round)"
        )
    if isinstance(mapping, StopMap) and mapping.merged:
        further = [_shown(teacher_tokenizer, mapping.get(i, i)) for i in mapping.merged]
        into = _shown(student_tokenizer, mapping.into)
        parts.append(f"the teacher stops with {' and '.join(further)}, too, which counts as the student's {into}")
    return "; ".join(parts)


def named_stops(stops: StopTokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """All stops with their ids, the primary one first."""
    further = sorted(stops.ids - {stops.primary})
    return ", ".join(_shown(tokenizer, i) for i in (stops.primary, *further))


def _ids(config: Any) -> list[int]:
    """The `eos_token_id` of a configuration: none, one or several, in order and each once."""
    value = getattr(config, "eos_token_id", None)
    if value is None:
        return []
    return list(dict.fromkeys(int(i) for i in (value if isinstance(value, (list, tuple)) else [value])))


def _check(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str], i: int, origin: str, label: str) -> None:
    example = tokenizer.eos_token or "<...>"
    remedy = f"set the right eos_token_id in generation_config.json and config.json, or rollout.stop=[{example!r}]"
    where = f"the {label}'s {origin}, or the default of its class,"
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


def _overridden(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[int, str], stop: int | str, label: str) -> int:
    if isinstance(stop, int):
        if stop not in tokens:
            raise UserError(
                f"rollout.stop: the {label}'s tokenizer has no id {stop} (largest: {max(tokens, default=-1)})"
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
    raise UserError(
        f"rollout.stop: {stop!r} is not one token of the {label}'s tokenizer; {did_you_mean(stop, special)}"
    )
