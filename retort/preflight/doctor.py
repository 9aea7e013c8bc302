"""Checks before any GPU-hour is spent: do the models fit together, does the run fit, will it teach?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retort import registry
from retort.align.pair import IdMap, align_ids
from retort.align.tokens import OtherTokenizer
from retort.config import Config
from retort.errors import UserError
from retort.method import Method
from retort.models.described import describe
from retort.models.stored import StoredModel
from retort.preflight.checks import quick_checks
from retort.preflight.findings import Check, Examination
from retort.preflight.flows import examine_flow
from retort.preflight.rounding import rounding_checks
from retort.preflight.rubric_context import rubric_context
from retort.preflight.rubrics import draft_checks, rubric_spending
from retort.preflight.trial import run_trial, trial_checks
from retort.train.flows.prepare import decides_latents, prepare_flow
from retort.train.given.given import CallerObjects
from retort.train.models.models import sources
from retort.train.setup.before import needs_ids
from retort.train.setup.prepare import Prepared, prepare

_SPANS_WHY = "the teacher reads the bytes that the student generated in its own tokens"
_TOKENIZER_WHY = "the teacher scores ids: the same id must be the same token to both, and text be cut alike"


def examine(
    config: Config, method: Method | None = None, *, quick: bool = False, caller_objects: CallerObjects | None = None
) -> Examination:
    """Makes all checks of a configuration; what keeps a run from starting is a fatal finding, not an error.

    Args:
        config: The resolved configuration.
        method: A method of the caller's own, instead of the one that the configuration names.
        quick: Leave out the checks that generate.
        caller_objects: The objects behind placeholders in the configuration.
    """
    objects = caller_objects or CallerObjects()
    try:
        if decides_latents(config, method, objects):
            return examine_flow(prepare_flow(config, method, objects), quick=quick)
    except UserError as error:
        return Examination((_refused(str(error)),), quick)
    first = _tokenizers(config, method, objects)
    if not any(check.verdict == "fatal" for check in first):
        try:
            return examine_setup(prepare(config, method, caller_objects), quick=quick, before=first)
        except UserError as error:
            first.append(_refused(str(error)))
    return Examination(tuple(first), quick)


def examine_setup(prepared: Prepared, *, quick: bool = False, before: Sequence[Check] = ()) -> Examination:
    """Makes the checks of a run whose parts are loaded.

    Args:
        prepared: The parts of the run; nothing of them changes.
        quick: Leave out the checks that generate.
        before: Checks that were made already.
    """
    checks = [*before, *([] if before else _alike(prepared)), *_quick(prepared)]
    checks += [*draft_checks(prepared), *rubric_context(prepared), *rubric_spending(prepared)]
    absent = any(isinstance(lm, StoredModel) for lm in prepared.lms.values())
    if not quick and not absent and not any(check.verdict == "fatal" for check in checks):
        # Without a cache: what a doctor's completions score is of no use to a run.
        own = replace(prepared, notes=[], teachers=prepared.teachers.with_models({}))
        trial = run_trial(own)
        checks += [*trial_checks(own, trial), *rounding_checks(own, trial)]
    return Examination(tuple(checks), quick)


def _quick(prepared: Prepared) -> list[Check]:
    """The quick checks; what is about a teacher is checked of each of several."""
    found = quick_checks(prepared)
    known = {check.name for check in found}
    for name in prepared.config.teachers.models:
        alone = prepared.teachers.with_models({"teacher": prepared.teachers.models[name]})
        own = quick_checks(replace(prepared, teachers=alone))
        found += [replace(check, name=f"{check.name} of {name}") for check in own if check.name not in known]
    return found


def refuse(examination: Examination) -> None:
    """Raises `UserError` if a check is fatal: the first, and how to go on all the same."""
    found = examination.of("fatal")
    if found:
        first, *others = found
        more = f" (and {len(others)} more: see `retort doctor`)" if others else ""
        raise UserError(f"{first.line}{more}. To go on all the same: checks=warn")


def _alike(prepared: Prepared) -> list[Check]:
    """Compares the tokenizers of the models that a run names."""
    others = [name for name in prepared.config.model_paths if name != "student" and name in prepared.lms]
    if not others:
        saw = "the student's own: there is no other model to compare it with"
        return [Check("tokenizer", "ok", saw, _TOKENIZER_WHY)]
    ours = prepared.student.tokenizer
    return [_tokenizer_check(name, ours, prepared.lms[name].tokenizer, prepared.method) for name in others]


def _tokenizers(config: Config, method: Method | None, caller_objects: CallerObjects) -> list[Check]:
    """Compares tokenizers before any weights are read; no check where there is nothing to be compared."""
    if config.student is None:
        return []
    try:
        found = {
            name: describe(path, source, name, trust_remote_code=config.trust_remote_code).tokenizer
            for name, (path, source) in sources(config.server, config.model_paths, caller_objects).items()
        }
        method = method or registry.load(**config.method)
    except UserError:
        return []  # Whatever is wrong with them, `prepare` reports it.
    ours = found.pop("student")
    return [_tokenizer_check(name, ours, theirs, method) for name, theirs in found.items()]


def _tokenizer_check(name: str, ours: object, theirs: object, method: Method) -> Check:
    check = "tokenizer" if name == "teacher" else f"tokenizer of {name}"
    try:
        shared = align_ids(ours, theirs)  # type: ignore[arg-type]
    except UserError as error:
        text, _, remedy = str(error).rpartition(". ")
        needs = needs_ids(method, name)
        if isinstance(error, OtherTokenizer) and needs is None:
            return Check(check, "ok", f"{text}; method '{method.name}' compares units of the same bytes", _SPANS_WHY)
        text = f"{text}; {needs}" if needs and text else text
        if isinstance(error, OtherTokenizer):
            remedy = f"{remedy}: {', '.join(registry.for_two_tokenizers())}"
        return Check(check, "fatal", text or str(error), _TOKENIZER_WHY, remedy)
    what = f"tokens have other ids for the {name}" if isinstance(shared, IdMap) else "ids are the same token to both"
    return Check(check, "ok", f"{shared.vocab:,} {what}, and probes are cut alike", _TOKENIZER_WHY)


def _refused(message: str) -> Check:
    """The finding for an error that keeps the run from starting."""
    saw, _, remedy = message.rpartition("; ")
    name = "stop token" if " stop" in message and "id" in message else "setup"
    return Check(name, "fatal", saw or message, "a run with these settings would not start", remedy if saw else "")
