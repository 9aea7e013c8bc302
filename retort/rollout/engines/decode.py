"""The decode loop: a batch of prompts in, ids and log-probs out. Axis letters: see `retort.core`; B is rows.

transformers' `generate` does the same and much else: for every token it copies the whole cache to append to it, keeps
finished completions in the batch until the last ends, and fills and searches [B, V] arrays of scores to find the
sampled ids. This module uses the model, its cache and its masks of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel

#: Returns ids and the log-prob of each, [B] both, from logits [B, V], the rows' indices in the batch [B] and the step.
Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

#: Rows leave when at least this share of the batch is done: the next few tokens pay back the copy of the cache.
_LEAVE = 1 / 8
#: Free tokens that a cache has behind the prompt at first.
_ROOM = 64


class RoomyLayer(DynamicLayer):
    """A layer of transformers' dynamic cache with free room, so that a token does not copy all before it.

    The room is doubled when it is full, up to the length of the longest completion: most completions are shorter.
    """

    def __init__(self, most: int) -> None:
        """Begins empty; `most` is the largest number of tokens."""
        super().__init__()
        self.most = most
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self.length, self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            room = min(self.most, max(2 * start, end + _ROOM))
            self._keys, self._values = self._moved(self._keys, room), self._moved(self._values, room)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.is_initialized:
            return  # this layer shares another's keys
        room = self._keys.shape[2]
        self._keys, self._values = self._moved(self._keys, room, beam_idx), self._moved(self._values, room, beam_idx)
        self._show()

    def _moved(self, states: Tensor, room: int, rows_B: Tensor | None = None) -> Tensor:
        """A copy of the filled part, or of some of its rows, with room behind it."""
        rows = len(states) if rows_B is None else len(rows_B)
        moved = states.new_empty(rows, states.shape[1], room, states.shape[3])
        filled = states[:, :, : self.length]
        moved[:, :, : self.length] = filled if rows_B is None else filled[rows_B]
        return moved

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]
        return self.keys, self.values


def can_decode(lm: LanguageModel) -> bool:
    """Whether this loop decodes the model correctly.

    A family may prepare its inputs in a way of its own, or keep a state outside of the cache. The first shows on its
    class, the second by a trial: three completions, two of them of one prompt, that end one by one, against the same
    tokens scored at once.
    """
    model, usual = (cast("Any", kind) for kind in (type(lm.model), GenerationMixin))
    as_usual = (
        model.prepare_inputs_for_generation is usual.prepare_inputs_for_generation
        and model._supports_default_dynamic_cache()
        and "past_key_values" in _arguments(lm)
    )
    if not as_usual or not _decodes_as_it_scores(lm, 2, 5):
        return False
    # On both sides of every length after which the model may compute differently.
    lengths = [] if lm.together_up_to is not None else lm.tried
    return all(_decodes_as_it_scores(lm, max(1, length // 2), length + 3) for length in lengths)


def _decodes_as_it_scores(lm: LanguageModel, shorter: int, longer: int) -> bool:
    vocab, stop = lm.head().width, lm.stops.primary
    other = next(token for token in range(vocab) if token not in lm.stops.ids)
    short, long = (
        TokenSequence.of([(7 * index + length) % vocab for index in range(length)]) for length in (shorter, longer)
    )
    prompts = [short, long, long]
    completions_BA = torch.tensor([[stop, stop, stop, stop], [other, stop, stop, stop], [other, other, other, stop]])

    def draw(logits_BV: Tensor, row_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        token_B = completions_BA[row_B.cpu(), step].to(logits_BV.device)
        return token_B, logits_BV.float().log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)

    try:
        _, logp_BA = decode(lm, prompts, draw, vocab, completions_BA.shape[1])
    except Exception:  # a family may fail in any way on a cache that it does not expect
        return False
    for prompt, completion_A, logp_A in zip(prompts, completions_BA, logp_BA, strict=True):
        length = int((completion_A == stop).nonzero()[0]) + 1
        logits_AV = lm.head().logits(lm.hidden([prompt.then(completion_A[:length].tolist(), decided=True)]))
        again_A = logits_AV.float().log_softmax(-1).cpu().gather(1, completion_A[:length, None]).squeeze(1)
        # Rounding of logits is an eighth in bf16 where they reach 16; another context differs by more.
        if not bool(((logp_A[:length] - again_A).abs() < (1e-2 if lm.precision == "fp32" else 0.5)).all()):
            return False
    return True


def decode(
    lm: LanguageModel, contexts: Sequence[TokenSequence], draw: Draw, vocab: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Generates at most `longest` tokens after every context.

    Args:
        lm: The model.
        contexts: Context of each row.
        draw: Chooses the ids.
        vocab: Ids below this are tokens.
        longest: Longest completion, tokens.

    Returns:
        Ids and log-probs, [B, A] each, on the CPU; tokens after a row's first stop token mean nothing.
    """
    # Rows with the same context read it together, and separate when the first token is sampled.
    asked_B, different = read_once(contexts)
    asked_B = asked_B.to(lm.device)
    ids_BL, mask_BL = left_padded(different, lm)
    rows, width = len(contexts), ids_BL.shape[1]
    stops = torch.tensor(sorted(lm.stops.ids), device=lm.device)
    found_BA = torch.full((rows, longest), lm.stops.primary, device=lm.device)
    logp_BA = torch.zeros(rows, longest, device=lm.device)
    head, takes_positions = lm.head(), "position_ids" in _arguments(lm)
    cache: Any = roomy_cache(lm, width + longest)
    # Without padding no mask has to be made or read at all.
    mask_BL = None if bool(mask_BL.all()) else functional.pad(mask_BL, (0, longest), value=1)
    position_BL = _positions(mask_BL, len(different), width, lm.device)
    row_B = torch.arange(rows, device=lm.device)
    live_B = torch.ones(rows, dtype=torch.bool, device=lm.device)
    for step in range(longest):
        hidden_BD = lm.model.base_model(
            input_ids=ids_BL,
            attention_mask=None if mask_BL is None else mask_BL[:, : width + step],
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": position_BL} if takes_positions else {}),
        ).last_hidden_state[:, -1]
        if step == 0 and len(different) < rows:
            cache.reorder_cache(asked_B)
            hidden_BD, position_BL = hidden_BD[asked_B], position_BL[asked_B]
            mask_BL = None if mask_BL is None else mask_BL[asked_B]
        token_B, logp_B = draw(head.logits(hidden_BD, vocab), row_B, step)
        found_BA[row_B, step], logp_BA[row_B, step] = token_B, logp_B
        live_B &= ~torch.isin(token_B, stops)
        left = int(live_B.sum())
        if not left:
            break
        if left <= (1 - _LEAVE) * len(row_B):
            kept = live_B.nonzero().squeeze(1)
            cache.reorder_cache(kept)
            row_B, token_B, live_B, position_BL = row_B[kept], token_B[kept], live_B[kept], position_BL[kept]
            mask_BL = None if mask_BL is None else mask_BL[kept]
        ids_BL, position_BL = token_B[:, None], position_BL[:, -1:] + 1
    return found_BA.cpu(), logp_BA.cpu()


def read_once(contexts: Sequence[TokenSequence]) -> tuple[Tensor, list[TokenSequence]]:
    """The distinct contexts, by tokens and media, and the index of each given context among them, [B]."""
    different: dict[object, TokenSequence] = {}
    keys = [context.key for context in contexts]
    for key, context in zip(keys, contexts, strict=True):
        different.setdefault(key, context)
    index_of = {key: index for index, key in enumerate(different)}
    return torch.tensor([index_of[key] for key in keys]), list(different.values())


def left_padded(contexts: Sequence[TokenSequence], lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """Ids [B, L] that end where the contexts end, and a mask that is 1 on them and 0 before."""
    longest = max(len(context) for context in contexts)
    ids = [[lm.stops.primary] * (longest - len(context)) + context.tokens_L.tolist() for context in contexts]
    mask = [[0] * (longest - len(context)) + [1] * len(context) for context in contexts]
    return torch.tensor(ids, device=lm.device), torch.tensor(mask, device=lm.device)


def roomy_cache(lm: LanguageModel, room: int) -> DynamicCache:
    """A cache of transformers for this model, with room in the layers that keep every token."""
    cache = DynamicCache(config=lm.model.config)
    # Other layers (sliding windows, states of linear attention) do not grow with the completion.
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _positions(mask_BL: Tensor | None, rows: int, width: int, device: torch.device) -> Tensor:
    if mask_BL is None:
        return torch.arange(width, device=device).expand(rows, -1)
    return (mask_BL[:, :width].cumsum(-1) - 1).clamp_min(0)


def _arguments(lm: LanguageModel) -> set[str]:
    return set(inspect.signature(lm.model.base_model.forward).parameters)
