"""`retort score`: a teacher's scores of the data's completions, stored before a run needs them."""

from __future__ import annotations

from functools import partial
from typing import Any

from retort.config import Config
from retort.core.rollouts import Prompt, in_groups
from retort.errors import UserError, counted, visible
from retort.method import Method
from retort.train.events.observe import Observer, Silent
from retort.train.flows.prepare import decides_latents
from retort.train.given.given import CallerObjects
from retort.train.setup.memory import size_text
from retort.train.setup.prepare import Prepared, prepare


def score(config: Config, observer: Observer | None = None, *, method: Method | None = None) -> dict[str, Any]:
    """Has the teachers of a method score the completions of the data, and stores the scores.

    Every need of the method is stored, that of each of its curves too, at the length that a run would learn from.

    Args:
        config: The resolved configuration; `cache.dir` names the cache.
        observer: Receives progress and notes.
        method: A method of the caller's own.

    Returns:
        `completions`: how many there are; `scored` and `stored_before`: how many scores were computed now, and how many
        were found; `cache`: the folder; `bytes`: its size.

    Raises:
        UserError: No cache is named, or the method learns from no completion of the data.
    """
    observer = observer or Silent()
    if decides_latents(config, method, CallerObjects()):
        raise UserError(
            "retort score stores scores of tokens, and this student decides denoising steps; its teachers are asked "
            "during the run (retort train)"
        )
    if config.cache.dir is None:
        raise UserError("retort score stores scores in a cache; name its folder: --cache DIR")
    if config.cache.only:
        raise UserError("cache.only=true loads no teacher, and retort score has one score; leave it out")
    prepared = prepare(config, method, asks=False)
    for note in prepared.notes:
        observer.note(note)
    cached = prepared.teachers.cached
    phases = [phase for _, phase in prepared.phases if "dataset" in phase.rollout.sources]
    if not phases:
        raise UserError(
            f"method '{prepared.method.name}' with these settings learns from no completion of the data, and those of "
            "the student are new each time; choose one that does, such as --method gkd method.on_policy_fraction=0"
        )
    if cached is None or not cached.teachers:
        raise UserError(f"method '{prepared.method.name}' asks no frozen model anything, so there is nothing to store")
    everything = [*prepared.source.prompts, *prepared.source.probe, *prepared.held_out]
    prompts = [prompt for prompt in everything if prompt.response is not None]
    for phase in phases:
        _score(prepared, phase, prompts, observer)
    asked, found = cached.tally.take()
    damaged, unsaved = cached.store.take_faults()
    if unsaved:
        raise UserError(
            f"{counted(unsaved, 'score')} could not be stored in {cached.store.folder}; make room on its disk, and "
            "start again: what was stored stays"
        )
    return {
        "completions": len(prompts),
        "scored": asked - found,
        "stored_before": found,
        **({"damaged": damaged} if damaged else {}),
        "cache": str(cached.store.folder),
        "bytes": cached.store.size,
    }


def line(found: dict[str, Any]) -> str:
    """What `score` returns, as a sentence."""
    return visible(
        f"{counted(found['completions'], 'completion')}: {found['scored']} scores computed, {found['stored_before']} "
        f"were in the cache; {found['cache']} takes {size_text(found['bytes'])}"
    )


def _score(prepared: Prepared, method: Method, prompts: list[Prompt], observer: Observer) -> None:
    source, size = prepared.source, prepared.source.count
    for start in range(0, len(prompts), size):
        observer.phase("scoring the data's completions", start, len(prompts))
        some = prompts[start : start + size]
        groups = in_groups([source.response_rollout(prompt, 0, source.limit) for prompt in some])
        groups = prepared.teachers.with_passages(method, groups)
        for needs in prepared.teachers.all_wanted(method):
            prepared.teachers.score(method, groups, needs, partial(prepared.learner.top_ids, method, groups))
    observer.phase("scoring the data's completions", len(prompts), len(prompts))
