"""`retort eval`: any model folder on the built-in task or a data file with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from retort import config as configuration
from retort.align.chat import Renderer
from retort.align.tokens import vocabulary_width
from retort.cli.flow_evaluation import evaluate_flow, is_flow_model
from retort.config import Config
from retort.config.clients import environment_client
from retort.config.flow import FlowSection
from retort.config.synonyms import ours_for
from retort.envs.registry import rewards
from retort.errors import UserError, did_you_mean
from retort.evaluate.evaluator import Evaluator
from retort.models.lm import LanguageModel
from retort.rewards.environment import ByEnvironment
from retort.rewards.user import is_user_defined
from retort.teachers.spanned import SpanTeacher
from retort.train.events.observe import Observer
from retort.train.flows.prepare import FLOW_DATA
from retort.train.models.models import engine, load, local_teacher
from retort.train.setup.prompts import eval_prompts, grader
from retort.train.setup.split import repeats
from retort.train.setup.templates import check_rendered, ends, settled

#: Settings that have a meaning here.
_READ = frozenset(
    {"attention", "device", "precision", "seed", "split", "task", "threads", "trust_remote_code", "weights"}
    | {f"eval.{name}" for name in ("problems", "samples", "temperature", "top_p", "max_new_tokens", "threshold")}
    | {"eval.pixelated"}
    | {
        f"rollout.{name}"
        for name in (
            "date",
            "env",
            "history",
            "max_new_tokens",
            "max_turns",
            "parallel",
            "rendered",
            "stop",
            "thinking",
            "tools",
        )
    }
    | {"optimizer.batch_tokens"}
)
#: The same of flow models.
_OF_FLOWS = frozenset(
    {"device", "precision", "seed", "split", "threads"}
    | {f"eval.{name}" for name in ("problems", "samples")}
    | {f"flow.{name}" for name in FlowSection.model_fields if name not in ("start", "window", "window_end")}
)


def evaluate(model: str, data: str, teacher: str | None, words: Sequence[str], observer: Observer) -> dict[str, Any]:
    """avg@k, pass@k and, with a teacher, the divergences from it.

    Args:
        model: Folder, hub name, or a built-in one such as `countdown:student`.
        data: A built-in task, such as `countdown` or `glyphs`, or a data file with answers.
        teacher: Folder or hub name, if distributions are to be compared.
        words: Settings as `key=value`: those of the section `eval` by their bare name, others by their full one.
        observer: Who watches.

    Returns:
        A table of one row, in the form of `eval.json`.
    """
    full, flow = [_full(word) for word in words], is_flow_model(model)
    _check_keys(model, data, [word.partition("=")[0] for word in full if "=" in word], flow=flow)
    given = configuration.overrides(full)
    recipe = configuration.recipe(data) if data in configuration.BUILTIN else {}
    config = configuration.resolve(recipe, {"data": data, "eval": {}}, given, with_recipe=False)
    if config.eval.problems == 0:
        raise UserError("problems=0 leaves nothing to evaluate")
    if config.threads:
        torch.set_num_threads(config.threads)
    notes: list[str] = []
    prompts = eval_prompts(config, data, notes)
    if flow:
        for note in notes:
            observer.note(note)
        return evaluate_flow(config, model, prompts, teacher, observer)
    own, played = data not in configuration.BUILTIN, config.environment
    if played is not None and (is_user_defined(config.task) or not rewards(played, environment_client(config.server))):
        played = None
    notes += repeats(prompts, "rows of the data") if own else []
    task = config.task if own or is_user_defined(config.task) else data
    verifier = grader(task, prompts, "prompts", notes) if played is None else ByEnvironment(played)
    if verifier is None and teacher is None:
        raise UserError(
            f"{data}: no row has an `answer`, so nothing can be graded; add answers, or compare with --teacher"
        )
    lm = load(config, model, "student")
    teacher_lm = None if teacher is None else load(config, teacher, "teacher")
    models = {"model": lm} | ({} if teacher_lm is None else {"teacher": teacher_lm})
    config = settled(config, {who: model.tokenizer for who, model in models.items()}, notes)
    render = Renderer(lm.tokenizer, config.rollout.template_options, lm.image_tokens)
    notes += [*check_rendered(prompts, {"model": render}), *ends({"model": render})[1]]
    for note in [*notes, *lm.notes, *(teacher_lm.notes if teacher_lm is not None else [])]:
        observer.note(note)
    other = None if teacher_lm is None else local_teacher(config, lm, teacher_lm)
    vocab = min(lm.head().width, vocabulary_width(lm.tokenizer)) if other is None else other.alignment.vocab
    evaluator = Evaluator.from_config(config, prompts, verifier, vocab=vocab)
    if isinstance(other, SpanTeacher) and not evaluator.as_drawn:
        observer.note("no divergence from the teacher is given: it is estimated at temperature=1 and top_p=1 only")
    longest, first = 0, prompts[0].id
    for prompt in prompts:
        context = render(prompt)
        lm.check_readable([context], f"row '{prompt.id}': its prompt")
        longest, first = max((longest, first), (len(context), prompt.id))
    evaluator = _fit(config, evaluator, lm, (longest, first), observer)
    row = evaluator.evaluate(
        lm,
        engine(config, lm, vocab),
        teacher=other,
        progress=lambda done, total: observer.phase("evaluating", done, total),
    )
    cells = {name: cell for name, cell in row.items() if name not in ("pass_at", "profile", "given_up", "answers")}
    return {
        "k": evaluator.samples,
        "problems": len(prompts),
        **evaluator.graded(),
        "seed": evaluator.seed,
        "rows": [{"who": model, **cells}],
        "pass_at": {model: row.get("pass_at", {})},
        "profile": {model: row["profile"]},
        **({"given_up": {model: row["given_up"]}} if "given_up" in row else {}),
    }


def _check_keys(model: str, data: str, keys: Sequence[str], *, flow: bool) -> None:
    """Refuses settings that are not read, and what is for flow models only where the model is none."""
    for what in () if flow else [f"'{data}'"] * (data in FLOW_DATA) + [key for key in keys if key.startswith("flow.")]:
        raise UserError(
            f"{what} is for flow models, and {model} is none that can be opened; name a folder such as RUN/model, or a "
            "built-in one such as plane:student"
        )
    read = _OF_FLOWS if flow else _READ
    for key in keys:
        if key not in read and not key.startswith("columns."):
            raise UserError(f"retort eval does not read '{key}'; {ours_for(key, read) or did_you_mean(key, read)}")


def tasks(data: str | None, env: str | None, words: Sequence[str]) -> tuple[str, list[str]]:
    """The data and the settings that `--data` and `--env` stand for; an environment's own tasks need no `--data`.

    Raises:
        UserError: An environment without tasks of its own, and no data.
    """
    if env is None:
        return data or "countdown", list(words)
    if data is None and env not in configuration.BUILTIN:
        raise UserError(f"--env {env}: this environment has no tasks of its own; name a file of tasks with --data")
    return data or env, [f"rollout.env={env}", *words]


def _fit(
    config: Config, evaluator: Evaluator, lm: LanguageModel, prompt: tuple[int, str], observer: Observer
) -> Evaluator:
    """The evaluator, with answers as long as the model's context holds beside the longest prompt (its tokens, its row).

    Raises:
        UserError: A length of the user's does not fit, or none does.
    """
    longest, row = prompt
    room = lm.context - longest
    if evaluator.max_new_tokens <= room:
        return evaluator
    if room < 1 or config.set_by_user("eval.max_new_tokens") or config.set_by_user("rollout.max_new_tokens"):
        raise UserError(
            f"row '{row}': {longest} prompt tokens and {evaluator.max_new_tokens} new ones exceed the model's "
            f"context of {lm.context}; lower max_new_tokens"
        )
    observer.note(
        f"answers end after {room:,} tokens: beside the longest prompt (row '{row}', {longest} tokens) the model's "
        f"context of {lm.context:,} holds no more"
    )
    return replace(evaluator, max_new_tokens=room)


def _full(word: str) -> str:
    """`samples=4` means eval.samples here; keys of the top level and of other sections keep their names."""
    key = word.partition("=")[0]
    return word if "." in key or "=" not in word or key in configuration.Config.model_fields else f"eval.{word}"
