"""`retort eval`: any model folder on the built-in task or a data file with answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retort import config as configuration
from retort.align.chat import render
from retort.align.stops import stop_map
from retort.align.tokens import check_same_tokenizer, vocabulary_width
from retort.data import load_prompts
from retort.errors import UserError, did_you_mean
from retort.evaluate.judge import Judge
from retort.models.lm import LanguageModel, best_precision, load_model
from retort.rewards.verify import verifier_for
from retort.teachers.local import LocalTeacher
from retort.train.observe import Observer
from retort.train.setup import countdown_prompts, device_of, located

#: Settings that have a meaning here.
_READ = (
    *(
        "attention",
        "columns",
        "device",
        "eval",
        "optimizer",
        "precision",
        "rollout",
        "seed",
        "split",
        "task",
        "threads",
    ),
    "trust_remote_code",
)


def evaluate(model: str, data: str, teacher: str | None, words: Sequence[str], observer: Observer) -> dict[str, Any]:
    """avg@k, pass@k and, with a teacher, the divergences from it.

    Args:
        model: Folder, hub name, or `countdown:student` and `countdown:teacher`.
        data: `countdown`, or a data file with answers.
        teacher: Folder or hub name, if distributions are to be compared.
        words: Settings as `key=value`: those of the section `eval` by their bare name, others by their full one.
        observer: Who watches.

    Returns:
        A table of one row, in the form of `eval.json`.
    """
    given = configuration.overrides([_full(word) for word in words])
    for key in given:
        if key not in _READ:
            raise UserError(f"retort eval does not read '{key}'; {did_you_mean(key, _READ)}")
    recipe = configuration.recipe("countdown") if data == "countdown" else {}
    config = configuration.resolve(recipe, {"data": data, "eval": {}}, given, with_recipe=False)
    if config.eval.problems == 0:
        raise UserError("problems=0 leaves nothing to judge")
    if config.threads:
        torch.set_num_threads(config.threads)
    if data == "countdown":
        prompts = countdown_prompts("held_out", config.eval.problems)
    else:
        prompts = load_prompts(data, split=config.split, limit=config.eval.problems, columns=config.columns)
    verifier = verifier_for("countdown" if data == "countdown" else config.task, prompts)
    if verifier is None and teacher is None:
        raise UserError(
            f"{data}: not every row has an `answer`, so nothing can be graded; add answers, or compare with --teacher"
        )
    device = torch.device(device_of(config))
    precision = best_precision(device) if config.precision == "auto" else config.precision
    settings = {
        "precision": precision,
        "device": device,
        "attention": config.attention,
        "trust_remote_code": config.trust_remote_code,
    }
    lm = load_model(model, source=located(model), role="student", stop=config.rollout.stop, **settings)
    vocab = min(lm.head().width, vocabulary_width(lm.tokenizer))
    other = None
    if teacher is not None:
        vocab, other = _teacher(lm, load_model(teacher, source=located(teacher), role="teacher", **settings), config)
    judge = Judge.of(config, prompts, verifier, vocab=vocab)
    for prompt in prompts:
        length = len(render(prompt, lm.tokenizer, thinking=config.rollout.thinking))
        if length + judge.max_new_tokens > lm.context:
            raise UserError(
                f"row '{prompt.id}': {length} prompt tokens and {judge.max_new_tokens} new ones exceed the model's "
                f"context of {lm.context}; lower max_new_tokens"
            )
    row = judge.judge(lm, teacher=other, progress=lambda done, total: observer.phase("judging", done, total))
    cells = {name: cell for name, cell in row.items() if name != "pass_at"}
    return {
        "k": judge.samples,
        "problems": len(prompts),
        "seed": judge.seed,
        "rows": [{"who": model, **cells}],
        "pass_at": {model: row.get("pass_at", {})},
    }


def _full(word: str) -> str:
    """`samples=4` means eval.samples here; keys of the top level and of other sections keep their names."""
    key = word.partition("=")[0]
    return word if "." in key or "=" not in word or key in configuration.Config.model_fields else f"eval.{word}"


def _teacher(lm: LanguageModel, teacher: LanguageModel, config: configuration.Config) -> tuple[int, LocalTeacher]:
    known = check_same_tokenizer(lm.tokenizer, teacher.tokenizer)
    vocab = min(known, lm.head().width, teacher.head().width)
    return vocab, LocalTeacher(
        teacher,
        vocab=vocab,
        stop_map=stop_map(lm.stops, teacher.stops, width=vocab),
        batch_tokens=config.optimizer.batch_tokens,
        thinking=config.rollout.thinking,
    )
