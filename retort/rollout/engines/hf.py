"""Generation with a model in this process. Axis letters: see `retort.core`; B is the rollouts generated at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.kept import Conversations, KeptRow
from retort.rollout.engines.of_model import OfModel
from retort.rollout.engines.sample import nucleus, sample

if TYPE_CHECKING:
    from retort.rollout.engines.decode import Draw

__all__ = ["Completion", "HFEngine", "Request", "Sampling", "nucleus"]


class _ForcedDraw:
    """A logits processor that leaves `generate` no choice: every row's token is drawn from its own random number.

    `generate` would draw from the global random state, in an order that depends on the batch.
    """

    def __init__(self, draw: Draw, row_B: Tensor, vocab: int) -> None:
        self.draw = draw
        self.row_B = row_B
        self.vocab = vocab
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B, logp_B = self.draw(scores[:, : self.vocab], self.row_B, len(self.logps))
        self.logps.append(logp_B)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)


class HFEngine(OfModel[LanguageModel]):
    """Generates with a model that is in this process, so its weights are always the newest."""

    def __init__(self, lm: LanguageModel, *, vocab: int, max_parallel: int) -> None:
        """Builds the engine.

        Args:
            lm: The model.
            vocab: Only ids below this are tokens.
            max_parallel: Rollouts generated at once; of as many others, keys and values are kept between turns.
        """
        self.lm = lm
        self.vocab = vocab
        self.max_parallel = max_parallel
        self.version = 0
        self.loops: bool | None = None
        self.continues: bool | None = None
        self._conversations = Conversations(max_parallel)

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """See `Engine`; it uses the live weights, and stores their version. What was kept of conversations is freed."""
        self.version = version
        self._conversations.forget()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`."""
        self.lm.check_readable((request.context for request in requests), "a prompt")
        found: dict[int, Completion] = {}
        rooms = [min(sampling.max_new_tokens, len(request.uniforms)) for request in requests]
        kept = [self._conversations.take(request) for request in requests]
        unread = [
            len(request.context) - (0 if row is None else row.common(request.context))
            for request, row in zip(requests, kept, strict=True)
        ]
        # Neighbours of similar length need least padding; those that go on are not held up by those that begin.
        order = sorted(range(len(requests)), key=lambda i: (kept[i] is None, unread[i], len(requests[i].context), i))
        limit = self.lm.together_up_to
        alone = [i for i in order if limit is not None and len(requests[i].context) + rooms[i] > limit]
        others = order if not alone else [i for i in order if i not in set(alone)]
        going, new = [i for i in others if kept[i] is not None], [i for i in others if kept[i] is None]
        size = self.max_parallel
        batches = [own[start : start + size] for own in (going, new) for start in range(0, len(own), size)]
        with self.lm.offload.kept():  # else a model whose weights wait elsewhere is read again for each token
            for batch in [*batches, *([i] for i in alone)]:
                own = [kept[i] for i in batch]
                for i in batch:
                    kept[i] = None
                found.update(zip(batch, self._batch([requests[i] for i in batch], sampling, own), strict=True))
        return [found[index] for index in range(len(requests))]

    def _batch(self, requests: Sequence[Request], sampling: Sampling, kept: list[KeptRow | None]) -> list[Completion]:
        from retort.rollout.engines.decode import can_continue, can_decode, decode  # loads transformers

        lm = self.lm
        uniforms = [request.uniforms[: sampling.max_new_tokens] for request in requests]
        rooms, uniforms_BA = [len(own_A) for own_A in uniforms], pad_sequence(uniforms, batch_first=True).to(lm.device)
        longest, ragged = max(rooms), min(rooms) < max(rooms)
        room_B = torch.tensor(rooms, device=lm.device)

        def draw(logits_BV: Tensor, row_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
            token_B, logp_B = sample(logits_BV, uniforms_BA[row_B, step], sampling.temperature, sampling.top_p)
            # A row whose random numbers are used up leaves; its further tokens are cut off below.
            return (torch.where(step < room_B[row_B], token_B, lm.stops.primary) if ragged else token_B), logp_B

        was_training = lm.model.training
        lm.model.eval()
        try:
            with torch.inference_mode(), lm.compute():
                self.loops = self._tried("decode", can_decode) if self.loops is None else self.loops
                talks = any(request.turn_cache is not None for request in requests)
                if talks and self.continues is None:
                    self.continues = self.loops and self._tried("continue", can_continue)
                turns = self._conversations.turns(requests, kept) if talks and self.continues else None
                own = ([request.context for request in requests], draw, self.vocab, longest)
                ids_BA, logp_BA = decode(lm, *own, turns) if self.loops else _generate(lm, *own)
        finally:
            lm.model.train(was_training)
        # Copied outside of inference mode, because autograd must not meet its tensors.
        parts = zip(ids_BA.tolist(), logp_BA.clone(), rooms, strict=True)
        found = [self._cut(ids[:room], logp_A[:room]) for ids, logp_A, room in parts]
        if turns is not None:
            self._conversations.keep(turns, requests, found)
        return found

    def _tried(self, name: str, trial: Callable[[LanguageModel], bool]) -> bool:
        """What a trial shows of the model, which other engines may have tried before; its weights have no say in it."""
        found, key = self.lm.trials, f"{name} {self.lm.arithmetic}"
        if key not in found:
            found[key] = trial(self.lm)
        return found[key]

    def _cut(self, ids: list[int], logp_A: Tensor) -> Completion:
        """Ends a completion after its first stop token."""
        for last, token in enumerate(ids):
            if token in self.lm.stops.ids:
                return Completion(ids[: last + 1], logp_A[: last + 1], Status.COMPLETED, self.version)
        return Completion(ids, logp_A[: len(ids)], Status.TRUNCATED, self.version)


def _generate(
    lm: LanguageModel, contexts: Sequence[TokenSequence], draw: Draw, vocab: int, longest: int
) -> tuple[Tensor, Tensor]:
    """`decode` by transformers' own `generate`, for families whose inputs only it knows how to prepare."""
    from retort.rollout.engines.decode import left_padded

    if any(context.media for context in contexts):
        parts = [_generate_with_images(lm, context, draw, row, vocab, longest) for row, context in enumerate(contexts)]
        return torch.stack([ids_A for ids_A, _ in parts]), torch.stack([logp_A for _, logp_A in parts])
    ids_BL, mask_BL = left_padded(contexts, lm)
    given = _ForcedDraw(draw, torch.arange(len(contexts), device=lm.device), vocab)
    out_BL = _forced(lm, given, longest, input_ids=ids_BL, attention_mask=mask_BL)
    return out_BL[:, ids_BL.shape[1] :].cpu(), torch.stack(given.logps, dim=1).cpu()


def _generate_with_images(
    lm: LanguageModel, context: TokenSequence, draw: Draw, row: int, vocab: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs [A] of one row of a batch, whose images the model's own forward reads."""
    given = _ForcedDraw(draw, torch.tensor([row], device=lm.device), vocab)
    assert lm.vision is not None
    if context.media:
        with lm.vision.own_inputs(context) as inputs:
            out_1L = _forced(lm, given, longest, **inputs)
    else:
        out_1L = _forced(lm, given, longest, input_ids=context.tokens_L[None].to(lm.device))
    ids_A, logp_A = out_1L[0, len(context) :].cpu(), torch.cat(given.logps).cpu()
    room = longest - len(ids_A)
    return functional.pad(ids_A, (0, room), value=lm.stops.primary), functional.pad(logp_A, (0, room))


def _forced(lm: LanguageModel, given: _ForcedDraw, longest: int, **inputs: Any) -> Tensor:
    """What `generate` returns, prompts included, where every token is drawn by `given`."""
    from transformers import GenerationConfig, LogitsProcessorList

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest,
        eos_token_id=sorted(lm.stops.ids),
        pad_token_id=lm.stops.primary,
    )
    generate: Any = lm.model.generate
    return generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([given]))
