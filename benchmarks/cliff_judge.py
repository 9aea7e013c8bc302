"""What the cliff's runs do not measure themselves: greedy answers, and the parse rate of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.tasks import ranking

SAMPLES = 4


def judged(prompts: Sequence[str], texts: Sequence[str]) -> dict[str, float | None]:
    """Parse rate, NDCG@1 of what parses (None if nothing does), and the share in which one item is missing."""
    found = [ranking.score_list(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    good = [one.ndcg for one in found if one.ndcg is not None]
    return {
        "parse": len(good) / len(found),
        "ndcg": sum(good) / len(good) if good else None,
        "one_missing": sum(one.one_missing for one in found) / len(found),
    }


def greedy(model: Path, problems: int) -> float:
    """The parse rate of a model's greedy answers; the run's own judge has those at temperature 1."""
    from retort.cli.evaluation import evaluate
    from retort.train.events.observe import Silent

    words = [f"problems={problems}", "samples=1", "top_p=1e-9", "threads=1"]  # of the likeliest token alone
    (row,) = evaluate(str(model), "ranking", None, words, Silent())["rows"]
    return float(row["avg@1"]["value"])


def extrapolated(teacher_logp_BV: Tensor, base_logp_BV: Tensor, weight: float) -> Tensor:
    """Where `listopd` drives the student, [B, V]: log softmax of lambda log p_T + (1 - lambda) log p_B."""
    return (weight * teacher_logp_BV + (1.0 - weight) * base_logp_BV).log_softmax(-1)


@torch.no_grad()
def target(weight: float, problems: int, seed: int = 0) -> dict[str, Any]:
    """Samples from that target itself, token by token, on the held-out prompts: what a student without error writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    torch.set_num_threads(1)
    load = AutoModelForCausalLM.from_pretrained
    models = [load(path, dtype=torch.float32).eval() for path in (ranking.teacher_path(), ranking.student_path())]
    tokenizer = AutoTokenizer.from_pretrained(ranking.teacher_path())
    generator = torch.Generator().manual_seed(seed)
    prompts: list[str] = []
    texts: list[str] = []
    tokens = 0
    for alike in _by_length([str(row["prompt"]) for row in ranking.rows("held_out", problems)]):
        rows = [prompt for prompt in alike for _ in range(SAMPLES)]
        drawn_BL = torch.tensor(tokenizer(rows).input_ids)
        caches, start = [DynamicCache(config=model.config) for model in models], drawn_BL.shape[1]
        fed_BL = drawn_BL
        while drawn_BL.shape[1] - start < longest():
            logp_BV = [
                model(input_ids=fed_BL, past_key_values=cache, use_cache=True).logits[:, -1].log_softmax(-1)
                for model, cache in zip(models, caches, strict=True)
            ]
            fed_BL = torch.multinomial(extrapolated(*logp_BV, weight).exp(), 1, generator=generator)
            drawn_BL = torch.cat([drawn_BL, fed_BL], 1)
        for answer in drawn_BL[:, start:].tolist():
            ended = tokenizer.eos_token_id in answer
            end = answer.index(tokenizer.eos_token_id) if ended else len(answer)
            texts.append(str(tokenizer.decode(answer[:end])))
            tokens += end + ended
        prompts += rows
    return {"weight": weight, **judged(prompts, texts), "length": tokens / len(texts)}


def longest() -> int:
    """New tokens, as in the recipe of the task."""
    from retort.config import recipe

    return int(recipe("ranking")["rollout"]["max_new_tokens"])


def _by_length(prompts: Sequence[str]) -> list[list[str]]:
    lengths: Mapping[int, list[str]] = {len(prompt.split()): [] for prompt in prompts}
    for prompt in prompts:
        lengths[len(prompt.split())].append(prompt)
    return list(lengths.values())
