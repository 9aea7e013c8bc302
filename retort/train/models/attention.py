"""Measures which attention implementation is quickest: for `attention = "auto"`. Axes: `retort.core`.

Measuring is asked for and never the default. Implementations round differently, and on a busy machine the clock may
prefer another one tomorrow: two starts with the same seed would then part in the last digit and go on from there. The
choice is written into the run's config.json, so that a resumed run at least repeats it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import use_attention
from retort.rollout.engines.hf import HFEngine, Request, Sampling

#: Share of the preferred implementation's time that another one must stay under.
_QUICKER = 0.9
#: Tokens of the trial, generated tokens and repetitions: enough to tell implementations apart in about a second.
_TOKENS, _GENERATED, _REPEATS = 4096, 8, 3


def quickest(
    models: Sequence[LanguageModel], length: int, count: int, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[str | None, dict[str, float]]:
    """Chooses the implementation for a run, and sets all its models to it.

    Args:
        models: The models of the run, the student first: it learns and generates, so it is the one that is timed.
        length: Number of tokens of a typical sequence.
        count: Number of sequences in a batch.
        clock: Returns seconds.

    Returns:
        The name that transformers has for it (None: the models have none in common), and the seconds of each candidate.
    """
    student, times, chosen = models[0], dict[str, float](), None
    loaded_with = [str(lm.model.config._attn_implementation) for lm in models]
    for name in _candidates():
        if not all(use_attention(lm, name) for lm in models):
            continue
        _trial(student, length, count)  # The first call also allocates.
        marks = [clock()]
        for _ in range(_REPEATS):
            _trial(student, length, count)
            marks.append(clock())
        times[name] = min(after - before for before, after in pairwise(marks))
        if chosen is None or times[name] < _QUICKER * times[chosen]:
            chosen = name
    for lm, before in zip(models, loaded_with, strict=True):
        use_attention(lm, chosen or before)
    return chosen, times


def _candidates() -> list[str]:
    """Candidates in order of preference: a later one must be a tenth quicker than those before it."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    # Only where it is installed: where it is not, transformers would look for a build of it on the hub.
    return [*(["flash_attention_2"] if is_flash_attn_2_available() else []), "sdpa", "eager"]


def _trial(lm: LanguageModel, length: int, count: int) -> None:
    """One forward and backward pass over a batch, and a few tokens generated."""
    length = max(2, min(length, lm.context, _TOKENS))
    count = max(1, min(count, _TOKENS // length))
    ids_L = (torch.arange(length) * 7 + 1) % lm.head().width
    lm.hidden([TokenSequence(ids_L, torch.arange(length) > 0)] * count).float().square().mean().backward()
    lm.model.zero_grad(set_to_none=True)
    generated = min(_GENERATED, length - 1)
    half_A = torch.full((generated,), 0.5, dtype=torch.float64)
    requests = [
        Request(TokenSequence.of(ids_L.roll(row)[: length - generated].tolist()), half_A) for row in range(count)
    ]
    engine = HFEngine(lm, vocab=lm.head().width, max_parallel=count)
    engine.generate(requests, Sampling(generated))
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
