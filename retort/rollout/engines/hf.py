"""Writing with a model in this process. Axis letters: see `retort.types`; B is the rollouts written at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retort.models.lm import LanguageModel
from retort.rollout.engines.sample import nucleus, sample
from retort.sequences import TokenSequence
from retort.types import Status

if TYPE_CHECKING:
    from retort.rollout.engines.decode import Draw

__all__ = ["HFEngine", "Request", "Written", "nucleus"]


@dataclass(frozen=True)
class Request:
    """One answer to write.

    Attributes:
        context: What it follows, tokens and media; which of them were decided does not matter.
        uniforms: Random numbers in [0, 1), one per token that may be written, float64: the only source of chance.
    """

    context: TokenSequence
    uniforms: Tensor


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: Tokens, the stop token included.
        logp_A: Log-prob of each under the distribution it was drawn from, nats.
        status: Completed, or truncated at the token limit.
    """

    ids: list[int]
    logp_A: Tensor
    status: Status


class _Given:
    """A logits processor that leaves `generate` nothing to choose: every row's token is drawn from its own number.

    `generate` would draw from the global random state, in an order that depends on the batch.
    """

    def __init__(self, draw: Draw, rows: int, vocab: int, device: torch.device) -> None:
        self.draw = draw
        self.row_B = torch.arange(rows, device=device)
        self.vocab = vocab
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B, logp_B = self.draw(scores[:, : self.vocab], self.row_B, len(self.logps))
        self.logps.append(logp_B)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)


class HFEngine:
    """Writes with a model that is in this process, so its weights are always the newest."""

    def __init__(self, lm: LanguageModel, *, vocab: int, max_parallel: int) -> None:
        """An engine.

        Args:
            lm: Who writes.
            vocab: Only ids below this are tokens.
            max_parallel: Rollouts written at once.
        """
        self.lm = lm
        self.vocab = vocab
        self.max_parallel = max_parallel
        self._loops: bool | None = None

    def write(
        self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, top_p: float
    ) -> list[Written]:
        """Answers all requests, in order.

        Raises:
            UserError: A prompt holds an id for which the model has no row, or media, which it cannot read.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        written: dict[int, Written] = {}
        # Neighbours of like length need least padding.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), i))
        limit = self.lm.together_up_to
        alone = [i for i in order if limit is not None and len(requests[i].context) + max_new_tokens > limit]
        others = order if not alone else [i for i in order if i not in set(alone)]
        batches = [others[start : start + self.max_parallel] for start in range(0, len(others), self.max_parallel)]
        for batch in [*batches, *([i] for i in alone)]:
            answers = self._write_batch([requests[i] for i in batch], max_new_tokens, temperature, top_p)
            written.update(zip(batch, answers, strict=True))
        return [written[index] for index in range(len(requests))]

    def _write_batch(
        self, requests: Sequence[Request], max_new_tokens: int, temperature: float, top_p: float
    ) -> list[Written]:
        from retort.rollout.engines.decode import can_decode, decode  # loads transformers

        lm = self.lm
        uniforms_BA = torch.stack([request.uniforms[:max_new_tokens] for request in requests]).to(lm.device)

        def draw(logits_BV: Tensor, row_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
            return sample(logits_BV, uniforms_BA[row_B, step], temperature, top_p)

        was_training = lm.model.training
        lm.model.eval()
        try:
            with torch.inference_mode(), lm.compute():
                self._loops = can_decode(lm) if self._loops is None else self._loops
                write = decode if self._loops else _generate
                ids_BA, logp_BA = write(lm, [r.context for r in requests], draw, self.vocab, max_new_tokens)
        finally:
            lm.model.train(was_training)
        # Copied outside of inference mode: what it made may never meet autograd.
        return [self._cut(ids, logp_A) for ids, logp_A in zip(ids_BA.tolist(), logp_BA.clone(), strict=True)]

    def _cut(self, ids: list[int], logp_A: Tensor) -> Written:
        """Ends an answer after its first stop token."""
        for place, token in enumerate(ids):
            if token in self.lm.stops.ids:
                return Written(ids[: place + 1], logp_A[: place + 1], Status.COMPLETED)
        return Written(ids, logp_A[: len(ids)], Status.TRUNCATED)


def _generate(
    lm: LanguageModel, contexts: Sequence[TokenSequence], draw: Draw, vocab: int, longest: int
) -> tuple[Tensor, Tensor]:
    """`decode` by transformers' own `generate`, for families whose inputs only it knows how to prepare."""
    from transformers import GenerationConfig, LogitsProcessorList

    from retort.rollout.engines.decode import left_padded

    ids_BL, mask_BL = left_padded(contexts, lm)
    given = _Given(draw, len(contexts), vocab, lm.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest,
        eos_token_id=sorted(lm.stops.ids),
        pad_token_id=lm.stops.primary,
    )
    generate: Any = lm.model.generate
    out_BL = generate(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        generation_config=config,
        logits_processor=LogitsProcessorList([given]),
    )
    return out_BL[:, ids_BL.shape[1] :].cpu(), torch.stack(given.logps, dim=1).cpu()
