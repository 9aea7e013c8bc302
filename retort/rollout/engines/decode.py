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
from transformers import GenerationMixin

from retort.core.sequences import TokenSequence
from retort.models.image_trials import tried_contexts
from retort.models.lm import LanguageModel
from retort.rollout.engines.images import Images
from retort.rollout.engines.kept import Turns
from retort.rollout.engines.kv import keeps_every_token, roomy_cache

#: Returns ids and the log-prob of each, [B] both, from logits [B, V], the rows' indices in the batch [B] and the step.
Draw = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

#: Rows leave when at least this share of the batch is done: the next few tokens pay back the copy of the cache.
_LEAVE = 1 / 8


def can_decode(lm: LanguageModel) -> bool:
    """Whether this loop decodes the model correctly, with images where it reads them.

    A family may prepare its inputs in a way of its own, or keep a state outside of the cache. The first shows on its
    class, the second by a trial: three completions, two of them of one prompt, that end one by one, against the same
    tokens scored at once.
    """
    model, usual = (cast("Any", kind) for kind in (type(lm.model), GenerationMixin))
    # A model that reads images prepares them, which the trial with images shows to be done here, too.
    as_usual = (
        (lm.vision is not None or model.prepare_inputs_for_generation is usual.prepare_inputs_for_generation)
        and model._supports_default_dynamic_cache()
        and "past_key_values" in _arguments(lm)
    )
    if not as_usual or not _decodes_as_it_scores(lm, _texts(lm, 2, 5)):
        return False
    if lm.vision is not None and not (lm.vision.joins and _decodes_as_it_scores(lm, tried_contexts(lm))):
        return False
    # On both sides of every length after which the model may compute differently.
    lengths = [] if lm.together_up_to is not None else lm.tried
    return all(_decodes_as_it_scores(lm, _texts(lm, max(1, length // 2), length + 3)) for length in lengths)


def can_continue(lm: LanguageModel) -> bool:
    """Whether keys and values of a turn may be read again in the next one; asked where `can_decode` is true.

    Tried by conversations of two turns, with replies of other lengths, against the same tokens scored at once.
    """
    return keeps_every_token(lm) and _decodes_as_it_scores(lm, _texts(lm, 2, 5), replies=(2, 4, 1))


def _texts(lm: LanguageModel, shorter: int, longer: int) -> tuple[TokenSequence, TokenSequence]:
    vocab = lm.head().width
    ids = ([(7 * index + length) % vocab for index in range(length)] for length in (shorter, longer))
    return TokenSequence.of(next(ids)), TokenSequence.of(next(ids))


def _decodes_as_it_scores(
    lm: LanguageModel, texts: tuple[TokenSequence, TokenSequence], replies: Sequence[int] = ()
) -> bool:
    short, long = texts
    vocab, stop = lm.head().width, lm.stops.primary
    other = next(token for token in range(vocab) if token not in lm.stops.ids)
    contexts, turns = [short, long, long], Turns([None] * 3, [True] * 3) if replies else None
    completions_BA = torch.tensor([[stop, stop, stop, stop], [other, stop, stop, stop], [other, other, other, stop]])
    written = [completion[: completion.index(stop) + 1] for completion in completions_BA.tolist()]

    def draw(logits_BV: Tensor, row_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        token_B = completions_BA[row_B.cpu(), step].to(logits_BV.device)
        return token_B, logits_BV.float().log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)

    try:
        _, logp_BA = decode(lm, contexts, draw, vocab, completions_BA.shape[1], turns)
        if turns is not None:
            said = [context.then(ids) for context, ids in zip(contexts, written, strict=True)]
            turns = Turns([turns.kept(n, own) for n, own in enumerate(said)], [False] * 3)
            contexts = [own.then([other] * count) for own, count in zip(said, replies, strict=True)]
            _, logp_BA = decode(lm, contexts, draw, vocab, completions_BA.shape[1], turns)
    except Exception:  # a family may fail in any way on a cache that it does not expect
        return False
    for context, ids, logp_A in zip(contexts, written, logp_BA, strict=True):
        logits_AV = lm.head().logits(lm.hidden([context.then(ids, decided=True)]))
        again_A = logits_AV.float().log_softmax(-1).cpu().gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        # Rounding of logits is an eighth in bf16 where they reach 16; another context differs by more.
        if not bool(((logp_A[: len(ids)] - again_A).abs() < (1e-2 if lm.precision == "fp32" else 0.5)).all()):
            return False
    return True


def decode(
    lm: LanguageModel,
    contexts: Sequence[TokenSequence],
    draw: Draw,
    vocab: int,
    longest: int,
    turns: Turns | None = None,
) -> tuple[Tensor, Tensor]:
    """Generates at most `longest` tokens after every context.

    Args:
        lm: The model.
        contexts: Context of each row.
        draw: Chooses the ids.
        vocab: Ids below this are tokens.
        longest: Longest completion, tokens.
        turns: What was kept of the contexts, and what is to be kept of them; see `can_continue`.

    Returns:
        Ids and log-probs, [B, A] each, on the CPU; tokens after a row's first stop token mean nothing.
    """
    # Rows with the same context read it together, and separate when the first token is sampled.
    asked_B, different = read_once(contexts)
    images = Images.of(lm, different)
    ids_BL, mask_BL = left_padded(different, lm)
    rows, width = len(contexts), ids_BL.shape[1]
    stops = torch.tensor(sorted(lm.stops.ids), device=lm.device)
    found_BA = torch.full((rows, longest), lm.stops.primary, device=lm.device)
    logp_BA = torch.zeros(rows, longest, device=lm.device)
    head, takes_positions = lm.head(), "position_ids" in _arguments(lm)
    cache: Any = roomy_cache(lm, width + longest)
    unread = width if turns is None else turns.fill(cache, different, asked_B.tolist())
    asked_B = asked_B.to(lm.device)
    # Without padding no mask has to be made or read at all.
    mask_BL = None if bool(mask_BL.all()) else functional.pad(mask_BL, (0, longest), value=1)
    position_BL = _positions(mask_BL, len(different), width, lm.device) if images is None else images.position_BL
    ids_BL, position_BL = ids_BL[:, -unread:], position_BL[..., -unread:]
    row_B = torch.arange(rows, device=lm.device)
    live_B = torch.ones(rows, dtype=torch.bool, device=lm.device)
    for step in range(longest):
        read = lm.model.base_model if images is None or step else images.read
        hidden_BD = read(
            input_ids=ids_BL,
            attention_mask=None if mask_BL is None else mask_BL[:, : width + step],
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": position_BL} if takes_positions else {}),
        ).last_hidden_state[:, -1]
        if step == 0 and len(different) < rows:
            cache.reorder_cache(asked_B)
            hidden_BD, position_BL = hidden_BD[asked_B], position_BL[..., asked_B, :]
            mask_BL = None if mask_BL is None else mask_BL[asked_B]
        token_B, logp_B = draw(head.logits(hidden_BD, vocab), row_B, step)
        found_BA[row_B, step], logp_BA[row_B, step] = token_B, logp_B
        live_B &= ~torch.isin(token_B, stops)
        left = int(live_B.sum())
        if not left:
            break
        if left <= (1 - _LEAVE) * len(row_B):
            kept = live_B.nonzero().squeeze(1)
            if turns is None:
                cache.reorder_cache(kept)
            else:
                turns.leave(cache, row_B, torch.isin(found_BA[row_B, : step + 1], stops), kept)
            row_B, token_B, live_B, position_BL = row_B[kept], token_B[kept], live_B[kept], position_BL[..., kept, :]
            mask_BL = None if mask_BL is None else mask_BL[kept]
        ids_BL, position_BL = token_B[:, None], _next(position_BL)
    if turns is not None:
        turns.leave(cache, row_B, torch.isin(found_BA[row_B], stops))
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


def _positions(mask_BL: Tensor | None, rows: int, width: int, device: torch.device) -> Tensor:
    if mask_BL is None:
        return torch.arange(width, device=device).expand(rows, -1)
    return (mask_BL[:, :width].cumsum(-1) - 1).clamp_min(0)


def _next(position_BL: Tensor) -> Tensor:
    """Positions [B, 1] behind the last column; of several axes, [axes, B, L], behind the largest of them."""
    last = position_BL[..., -1:]
    return (last if last.ndim == 2 else last.amax(0).expand_as(last)) + 1


def _arguments(lm: LanguageModel) -> set[str]:
    return set(inspect.signature(lm.model.base_model.forward).parameters)
