"""Puts together who is asked in conversation: a server, a model of the run, another model here, or a record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from retort.align.chat import Renderer
from retort.align.tokens import vocabulary_width
from retort.chat.asking import Asking
from retort.chat.base import ChatModel
from retort.chat.endpoint import ChatEndpoint
from retort.chat.record import Record, again_after, given_up_after
from retort.config import Config
from retort.config.judge import JudgeSection
from retort.errors import UserError, quoted
from retort.models.fingerprint import digests_of, fingerprint_of
from retort.models.lm import LanguageModel
from retort.models.offload import Room
from retort.models.stored import StoredModel
from retort.ranks import here
from retort.rollout.chat import LocalChat
from retort.rollout.engines.hf import HFEngine
from retort.train.given.given import CallerObjects
from retort.train.models.models import engine, load, source_of
from retort.train.models.offloading import offloaded, refuse_offload
from retort.train.storage.metrics import JsonLines
from retort.wire import is_url

__all__ = ["FILE", "asked_model", "asker", "check_settings", "open_record", "step_metrics", "talks"]

#: The record of a run: what was asked and answered.
FILE = "judge.jsonl"
#: Keys of every exchange in it.
_KEYS = {"key": str, "model": str, "step": int, "prompt_tokens": int, "completion_tokens": int, "calls": int}


def asker(
    config: Config,
    models: Mapping[str, Any] | None = None,
    caller_objects: CallerObjects | None = None,
    *,
    say: Callable[[str], object] = lambda text: None,
) -> Asking | None:
    """Who is asked in a run, with budget and record as the settings say.

    Args:
        config: The resolved configuration.
        models: The run's models by name, as far as they are loaded.
        caller_objects: The objects behind placeholders.
        say: Takes lines for the user.

    Returns:
        None where the settings name nobody. It keeps nothing until `open_record`.

    Raises:
        UserError: There is no such model, the key is refused, or the record to answer from is none.
        UnreachableError: A server does not answer.
    """
    asked = config.judge
    if asked.replay is not None:
        record = Record(*_replayed(Path(asked.replay)))
        return Asking(None, record=record, attempts=asked.attempts, budget=asked.budget, prices=asked.prices)
    if asked.model is None:
        return None
    model = _model(config, asked.model, models or {}, caller_objects, say)
    return Asking(model, attempts=asked.attempts, budget=asked.budget, prices=asked.prices)


def check_settings(config: Config) -> None:
    """Refuses settings of the section that do nothing, or that lack another one.

    Raises:
        UserError: What does nothing, or what is missing.
    """
    asked, given = config.judge, [name for name in _SETTINGS if config.set_by_user(f"judge.{name}")]
    given = [name for name in given if getattr(config.judge, name) != getattr(_DEFAULTS, name)]
    if asked.model is None and asked.replay is None and given:
        raise UserError(f"judge.{given[0]} does nothing without a model; set judge.model, or judge.replay")
    served = next((name for name in ("name", "key", "timeout", "patience", "requests") if name in given), None)
    if served is not None and asked.model is not None and not is_url(asked.model):
        raise UserError(f"judge.{served} is for a model at an address, and {asked.model} is none; leave it out")
    if asked.budget_money is not None and None in (asked.price_prompt, asked.price_completion):
        raise UserError("judge.budget_money needs judge.price_prompt and judge.price_completion, of a million tokens")


_DEFAULTS = JudgeSection()
_SETTINGS = tuple(JudgeSection.model_fields)


def _model(
    config: Config,
    named: str,
    models: Mapping[str, Any],
    caller_objects: CallerObjects | None,
    say: Callable[[str], object],
) -> ChatModel:
    asked, paths = config.judge, config.model_paths
    if named == "student" or (named == "base" and config.base is None):
        raise UserError(
            f"judge.model = {named}: a model that learns cannot be asked the same twice; name a frozen one, or the "
            "student's folder"
        )
    path = paths.get(named, named)
    if is_url(path) and named not in paths:
        endpoint = ChatEndpoint(
            path,
            model=asked.name,
            key_variable=asked.key,
            timeout=asked.timeout,
            patience=asked.patience,
            requests=asked.requests,
        )
        endpoint.listen(say)
        endpoint.check()
        return endpoint
    lm = models.get(named)
    if lm is not None and not isinstance(lm, LanguageModel):
        raise UserError(f"judge.model = {named}: that model only scores ({path}); give its address as judge.model")
    return talks(config, lm if lm is not None else _loaded(config, named, path, caller_objects or CallerObjects()))


def _loaded(config: Config, named: str, path: str, given: CallerObjects) -> LanguageModel:
    """A model that nobody but the judge takes, as the settings of its name say, where it has one.

    Raises:
        UserError: It cannot be loaded so.
    """
    name = named if named in config.models else "judge"
    refuse_offload(config, {name: (path, source_of(config.server, path, name, given, student=config.student))})
    lm = load(config, path, name, given)
    offloaded(config, path, name, lm, Room(), given)
    return lm


def talks(config: Config, lm: LanguageModel) -> LocalChat:
    """A frozen model of this process, or behind `retort serve`, as one that is asked in conversation.

    Args:
        config: The resolved configuration.
        lm: The model.

    Raises:
        UserError: Nothing can be generated with it.
    """
    if isinstance(lm, StoredModel):
        raise UserError(f"{lm.name}: its scores come from the cache, so it cannot be asked anything; load it")
    vocab = min(lm.head().width, vocabulary_width(lm.tokenizer))
    return LocalChat(
        engine(config, lm, vocab),
        Renderer(lm.tokenizer, replace(config.rollout.template_options, rendered=False), lm.image_tokens),
        name=lm.name,
        fingerprint=fingerprint_of(lm, digests_of(lm)),
        batch=config.rollout.parallel,
    )


def asked_model(asking: Asking | None) -> LanguageModel | None:
    """The model of this process that is asked; None where there is none, or another process answers."""
    model = None if asking is None else asking.model
    engine_of = model.engine if isinstance(model, LocalChat) else None
    return engine_of.lm if isinstance(engine_of, HFEngine) else None


def open_record(asking: Asking, folder: Path, step: Callable[[], int]) -> None:
    """Keeps what is asked in a run's folder from now on, and brings this rank's file to the step.

    Answers behind the step stay, for they were paid for; failures behind it do not count, nor do the last answers to
    questions that were given up.

    Args:
        asking: Who is asked.
        folder: The run's, which exists.
        step: Returns the number of steps that the run has done.

    Raises:
        UserError: The record in the folder is damaged, or of another model.
        RunError: It cannot be written.
    """
    rank, done = here().rank, step()
    own = JsonLines(folder / (FILE if rank == 0 else f"judge-rank-{rank}.jsonl"), own=True)
    found = [row for path in _files(folder / FILE) for row in _rows(path)]
    given_up = given_up_after(found, done, asking.attempts)
    rows = [again_after(row, done, given_up) for row in found]
    if own.path.exists():
        own.replace([again_after(row, done, given_up) for row in own.rows()])
    asking.open(rows, own.append, lambda: step() + 1, ways=here().size)


def step_metrics(asking: Asking) -> dict[str, float]:
    """What all ranks together spent in a step, for its metrics; all of them call it.

    Each then knows what the others were answered, so that a prompt that comes to another rank later is not asked about
    once more.

    Args:
        asking: Who is asked.
    """
    total: dict[str, float] = {}
    for news, own in here().each(lambda: (asking.record.news(), asking.metrics())):
        asking.record.learn(news)
        for name, value in own.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _files(path: Path) -> list[Path]:
    """A record's file, and beside it those of further ranks."""
    return [path, *sorted(path.parent.glob(f"{path.stem}-rank-*{path.suffix}"))]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = JsonLines(path).rows()
    for number, row in enumerate(rows, 1):
        if "messages" not in row:
            continue
        told = isinstance(row.get("text"), str) and isinstance(row.get("ended"), bool)
        failed = isinstance(row.get("reason"), str) and isinstance(row.get("message"), str)
        if not (told or failed) or any(type(row.get(key)) is not kind for key, kind in _KEYS.items()):
            raise UserError(f"{path}: exchange {number} is not one of Retort's; put the file back as it was")
    return rows


def _replayed(path: Path) -> tuple[str, Iterable[Mapping[str, Any]]]:
    """The model's fingerprint and the rows of a record that questions are answered from.

    Raises:
        UserError: There is none, or it is of several models.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"judge.replay = {path}: no such file; name the judge.jsonl of a run, or the run's folder")
    rows = [row for file in _files(path) for row in _rows(file)]
    models = sorted({row["model"] for row in rows if "messages" in row})
    if len(models) != 1:
        there = quoted([own[:8] for own in models]) if models else "no answers"
        raise UserError(f"judge.replay = {path}: it holds {there}, and must hold answers of one model")
    return models[0], rows
