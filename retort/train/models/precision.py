"""Resolves `precision = "auto"`: fp32 on a CPU; on a GPU bf16, unless its rounding exceeds what is to be learnt.

On the CPUs that were measured, bf16 saves no time in a step, even where the processor has bf16 products, and its
rounding can be as large as the divergence between student and teacher. On a GPU it halves the time of a step, so there
both numbers are measured on the pair itself, on completions of the student. Axis letters: see `retort.core`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retort.align.pair import Alignment, SameIds, align_pair
from retort.align.tokens import OtherTokenizer
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel, Precision
from retort.rollout.engines.base import Sampling
from retort.rollout.engines.hf import HFEngine, Request

#: Smallest ratio of a divergence to the rounding error of a log-prob that counts as a divergence.
ABOVE_NOISE = 3.0
#: Number of completions generated for the measurement, and tokens of each.
_COMPLETIONS, _GENERATED = 8, 16


def settle(
    student: LanguageModel, teacher: LanguageModel | None, prompts: Sequence[TokenSequence], seed: int
) -> tuple[Precision, str]:
    """Chooses between bf16, in which the models are, and fp32.

    Args:
        student: A model in bf16; it is left so.
        teacher: A model in bf16, if there is one.
        prompts: Some prompts, as the student reads them.
        seed: The seed of the run.

    Returns:
        The choice, and a sentence on what was measured.

    Raises:
        UserError: A model lacks rows for its tokens.
    """
    # Longer prompts are refused where all are checked.
    usual = [context for context in prompts if 0 < len(context) < student.context]
    if not usual:
        return "bf16", "precision is bf16 (auto): no prompt is of a length at which it could be measured"
    noise, apart = measured(student, teacher, usual, seed)
    saw = f"in bf16 a token's log-prob is {noise:.1e} nats from fp32's on average"
    if apart is None:
        return "bf16", f"precision is bf16 (auto): {saw}; if the teacher differs by less than that, set precision=fp32"
    saw = f"{saw}, and student and teacher are {apart:.1e} nats apart"
    if math.isfinite(apart) and apart < ABOVE_NOISE * noise:
        return "fp32", f"precision is fp32 (auto): {saw}, less than {ABOVE_NOISE:g} times that"
    return "bf16", f"precision is bf16 (auto): {saw}"


@torch.no_grad()
def measured(
    student: LanguageModel, teacher: LanguageModel | None, prompts: Sequence[TokenSequence], seed: int
) -> tuple[float, float | None]:
    """Measures the rounding error of bf16 in the student, and its divergence from the teacher.

    Args:
        student: As in `settle`, as are all arguments.
        teacher: As in `settle`.
        prompts: As in `settle`; each leaves room for a completion.
        seed: As in `settle`.

    Returns:
        The mean distance between bf16 and fp32 log-probs of the generated tokens, nats; and the mean reverse KL from
        the teacher on them, nats.
    """
    width = student.head().width
    try:
        pair = SameIds(width) if teacher is None else align_pair(student, teacher, with_stops=False)
    except OtherTokenizer:  # their divergence is not that of two distributions over the same ids
        pair, teacher = SameIds(width), None
    same = SameIds(pair.vocab)
    generated = min(_GENERATED, student.context - max(map(len, prompts[:_COMPLETIONS])))
    requests = [
        Request(context, uniforms(seed, "precision", n, count=generated))
        for n, context in enumerate(prompts[:_COMPLETIONS])
    ]
    engine = HFEngine(student, vocab=same.vocab, max_parallel=_COMPLETIONS)
    completions = engine.generate(requests, Sampling(generated))
    sequences = [request.context.then(a.ids, decided=True) for request, a in zip(requests, completions, strict=True)]
    token_N1 = torch.cat([sequence.actions_A for sequence in sequences])[:, None].to(student.device)
    rounded_N1 = _logp(student, sequences, same).gather(1, token_N1)
    before: Precision = student.precision
    student.precision = "fp32"
    try:
        exact_NV = _logp(student, sequences, same)
    finally:
        student.precision = before
    noise = float((rounded_N1 - exact_NV.gather(1, token_N1)).abs().mean())
    if teacher is None:
        return noise, None
    gap_NV = exact_NV - _logp(teacher, sequences, pair)
    return noise, float((exact_NV.exp() * gap_NV).sum(-1).mean())


def _logp(lm: LanguageModel, sequences: list[TokenSequence], alignment: Alignment) -> Tensor:
    """Log-probs of every id of the student's at every generated token, [N, V], fp32."""
    hidden_ND = lm.all_hidden([alignment.read(own) for own in sequences], sum(map(len, sequences)))
    with lm.compute():
        return alignment.logits(lm.head().logits(hidden_ND, alignment.width), 1.0).float().log_softmax(-1)
