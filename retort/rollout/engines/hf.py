"""Writing with transformers' own `generate`. Axis letters: see `retort.types`; B is the rollouts written at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retort.models.lm import LanguageModel
from retort.types import Status


@dataclass(frozen=True)
class Request:
    """One answer to write.

    Attributes:
        prompt_ids: Context.
        uniforms: Random numbers in [0, 1), one per token that may be written, float64: the only source of chance.
    """

    prompt_ids: Sequence[int]
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


class _InverseCdf:
    """A logits processor that draws each row's token from given uniforms, leaving `generate` nothing to choose.

    `generate` would draw from the global random state, in an order that depends on the batch. Here a row's token
    depends on its own number only; and the log-prob of what was drawn is kept, so that nobody has to compute it again.
    """

    def __init__(self, uniforms_BA: Tensor, vocab: int, temperature: float, top_p: float) -> None:
        self.uniforms_BA = uniforms_BA
        self.vocab = vocab
        self.temperature = temperature
        self.top_p = top_p
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp_BV = torch.log_softmax(scores[:, : self.vocab].float() / self.temperature, dim=-1)
        if self.top_p < 1.0:
            logp_BV = nucleus(logp_BV, self.top_p)
        # float64, or the tail of 150,000 small probabilities is rounded away; a token of probability 0 is never hit,
        # because its cumulative sum does not exceed that of the token before it.
        cdf_BV = logp_BV.double().exp().cumsum(-1)
        draw_B1 = self.uniforms_BA[:, len(self.logps), None] * cdf_BV[:, -1:]
        token_B1 = torch.searchsorted(cdf_BV, draw_B1, right=True).clamp_max(self.vocab - 1)
        self.logps.append(logp_BV.gather(-1, token_B1).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B1, 0.0)


def nucleus(logp_BV: Tensor, top_p: float) -> Tensor:
    """Log-probs renormalised on the smallest set of most likely tokens that holds `top_p`; -inf outside."""
    sorted_BV, order_BV = logp_BV.sort(dim=-1, descending=True)
    # What lies before a token, summed without it: subtracting it again would leave rounding at the edge.
    before_BV = functional.pad(sorted_BV.exp().cumsum(-1)[:, :-1], (1, 0))
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
    return torch.log_softmax(logp_BV.masked_fill(outside_BV, float("-inf")), dim=-1)


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

    def write(
        self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, top_p: float
    ) -> list[Written]:
        """Answers all requests, in order."""
        written: dict[int, Written] = {}
        # Neighbours of like length need least padding.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        for start in range(0, len(order), self.max_parallel):
            batch = order[start : start + self.max_parallel]
            answers = self._write_batch([requests[i] for i in batch], max_new_tokens, temperature, top_p)
            written.update(zip(batch, answers, strict=True))
        return [written[index] for index in range(len(requests))]

    @torch.no_grad()
    def _write_batch(
        self, requests: Sequence[Request], max_new_tokens: int, temperature: float, top_p: float
    ) -> list[Written]:
        from transformers import GenerationConfig, LogitsProcessorList

        lm, longest = self.lm, max(len(request.prompt_ids) for request in requests)
        ids_BL = torch.full((len(requests), longest), lm.stops.primary)
        mask_BL = torch.zeros_like(ids_BL)
        for row, request in enumerate(requests):
            ids_BL[row, longest - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
            mask_BL[row, longest - len(request.prompt_ids) :] = 1
        uniforms_BA = torch.stack([request.uniforms[:max_new_tokens] for request in requests]).to(lm.device)
        sampler = _InverseCdf(uniforms_BA, self.vocab, temperature, top_p)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(lm.stops.ids),
            pad_token_id=lm.stops.primary,
        )
        was_training = lm.model.training
        lm.model.eval()
        try:
            with lm.compute():
                generate: Any = lm.model.generate
                out_BL = generate(
                    input_ids=ids_BL.to(lm.device),
                    attention_mask=mask_BL.to(lm.device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([sampler]),
                )
        finally:
            lm.model.train(was_training)
        new_BA = out_BL[:, longest:].cpu()
        logp_BA = torch.stack(sampler.logps, dim=1).cpu()
        return [self._cut(new_BA[row], logp_BA[row]) for row in range(len(requests))]

    def _cut(self, ids_A: Tensor, logp_A: Tensor) -> Written:
        """Ends an answer after its first stop token."""
        ids = ids_A.tolist()
        for place, token in enumerate(ids):
            if token in self.lm.stops.ids:
                return Written(ids[: place + 1], logp_A[: place + 1], Status.COMPLETED)
        return Written(ids, logp_A[: len(ids)], Status.TRUNCATED)
