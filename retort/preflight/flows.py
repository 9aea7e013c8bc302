"""Checks of a run whose student decides denoising steps: are there teachers to learn from, and do they know more?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from retort.core.rollouts import Prompt
from retort.evaluate.flows import FlowEvaluator
from retort.preflight.findings import Check, Examination
from retort.teachers.routed import RoutedTeacher
from retort.train.flows.evaluations import evaluator_of
from retort.train.flows.prepare import FlowPrepared
from retort.train.output import results

#: Most prompts that are looked at.
_PROMPTS = 32


def examine_flow(prepared: FlowPrepared, *, quick: bool = False) -> Examination:
    """Makes the checks of a run whose parts are loaded.

    Args:
        prepared: The parts of the run; nothing of them changes.
        quick: Leave out the checks that denoise.
    """
    checks = [_models(prepared)]
    if not quick:
        prompts = (prepared.held_out or prepared.source.prompts)[:_PROMPTS]
        evaluator = _on(evaluator_of(prepared), prompts)
        checks += [_distance(prepared, evaluator), *_knowing(prepared, evaluator)]
    return Examination(tuple(checks), quick)


def _on(evaluator: FlowEvaluator, prompts: Sequence[Prompt]) -> FlowEvaluator:
    return replace(evaluator, prompts=prompts)


def _models(prepared: FlowPrepared) -> Check:
    """They were compared while they were loaded, and prompts read."""
    identity = "; ".join(f"{name}: {text}" for name, text in prepared.student.of.identity.items())
    others = len(prepared.models) - 1
    return Check(
        "models",
        "ok",
        f"the student and {others} frozen {'model' if others == 1 else 'models'} share it ({identity})",
        "step by step only models of one architecture and one schedule can be compared",
    )


def _distance(prepared: FlowPrepared, evaluator: FlowEvaluator) -> Check:
    """How far student and teacher are apart before the first step."""
    why = "where they agree there is nothing to learn, and where the KL is huge the first updates are, too"
    row = evaluator.evaluate(prepared.student, prepared.teachers.models.get("teacher"))
    cell, steps = row.get("reverse_kl"), row.get("kl_by_step", [])
    if cell is None:
        return Check("distance", "ok", "not looked at: this method compares the student with no teacher", why)
    saw = f"the KL to the teacher is {cell['value']:.3g} nats a denoising step ({steps[0]:.3g} at the first, "
    saw += f"{steps[-1]:.3g} at the last that is decided)"
    values = (("reverse_kl", float(cell["value"])),)
    if cell["value"] < 1e-6:
        return Check("distance", "warn", saw, why, "give another teacher, or another student", values)
    return Check("distance", "ok", saw, why, values=values)


def _knowing(prepared: FlowPrepared, evaluator: FlowEvaluator) -> list[Check]:
    """Whether each expert's samples earn more than the student's on its own prompts."""
    together = prepared.teachers.models.get("teacher")
    if prepared.grader is None or not isinstance(together, RoutedTeacher):
        return []
    why = "a student learns what its teacher does, and not what it was meant to know"
    found: list[Check] = []
    for name in prepared.config.teachers.models:
        own = _on(evaluator, [prompt for prompt in evaluator.prompts if together.route(prompt) == name])
        if not own.prompts:
            saw = f"none of the {len(evaluator.prompts)} prompts that were looked at is its own"
            found.append(Check(f"expert {name}", "warn", saw, why, "is the column `domain` what was meant?"))
            continue
        student = _rewards(own, prepared, None)
        expert = _rewards(own, prepared, name)
        saw = f"its samples earn {expert:.2f} on its own prompts, the student's {student:.2f}"
        values = (("expert", expert), ("student", student))
        verdict = "ok" if expert > student else "warn"
        remedy = "" if expert > student else "look at its samples; is it routed to the prompts that it was made for?"
        found.append(Check(f"expert {name}", verdict, saw, why, remedy, values))
    return found


def _rewards(evaluator: FlowEvaluator, prepared: FlowPrepared, name: str | None) -> float:
    """Mean reward of the student's samples, or of an expert's."""
    scores: Mapping[str, float] = results.scores(evaluator.evaluate(prepared.models[name or "student"]))
    return scores[f"avg@{evaluator.samples}"]
