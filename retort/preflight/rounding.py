"""How far frozen models in fewer bits are from what their files hold. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from retort.core.needs import DENSE
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, in_groups
from retort.core.signals import TeacherSignal
from retort.preflight.findings import Check
from retort.preflight.trial import Trial
from retort.teachers.base import ScoreRequest
from retort.teachers.local import LocalTeacher
from retort.teachers.spanned import SpanTeacher
from retort.teachers.view import View
from retort.train.models.models import bits_of, load, local_teacher
from retort.train.setup.prepare import Prepared

#: Share of what there is to learn from which the rounding gets a warning.
FELT = 0.1


def rounding_checks(prepared: Prepared, trial: Trial) -> list[Check]:
    """Measures the rounding of every model in fewer bits, on what the student wrote; loads the whole model again."""
    found: list[Check] = []
    for name, teacher in prepared.teachers.models.items():
        bits = bits_of(prepared.config, name)
        if bits is None or not isinstance(teacher, LocalTeacher) or isinstance(teacher, SpanTeacher):
            continue
        plain = {**prepared.config.models, name: prepared.config.models[name].model_copy(update={"bits": None})}
        config = prepared.config.model_copy(update={"models": plain})
        whole = local_teacher(config, prepared.student, load(config, config.model_paths[name], name))
        groups = in_groups(list(trial.pack.rollouts))
        vocab = prepared.learner.vocab
        noise = divergence(_said(whole.for_vocab(vocab), groups), _said(teacher, groups), vocab)
        found.append(_check(name, bits, noise, trial.mean("reverse_kl") if "reverse_kl" in trial.values else math.nan))
    return found


def divergence(whole: TeacherSignal, rounded: TeacherSignal, vocab: int) -> float:
    """The mean KL of a whole model to the same one rounded, nats a token."""
    total = 0.0
    for one, other in zip(in_blocks(whole, vocab), in_blocks(rounded, vocab), strict=True):
        logp_CV = one.logp_NV
        gap_CV = (logp_CV - other.logp_NV).masked_fill(logp_CV == -math.inf, 0.0)
        total += float((logp_CV.exp() * gap_CV).sum().double())
    return total / max(1, whole.steps)


def _said(teacher: LocalTeacher, groups: Sequence[Group]) -> TeacherSignal:
    return teacher.score(groups, ScoreRequest(View(), frozenset({DENSE})))


def _check(name: str, bits: int, noise: float, apart: float) -> Check:
    why = "a rounded teacher teaches its rounding, too; what the student learns of it is no better than that"
    saw = f"in {bits} bits the {name} is {noise:.1e} nats a token from itself"
    known = math.isfinite(apart) and apart > 0
    saw += f", and {apart:.3f} from the student" if known else ""
    values = (("rounding", noise), ("reverse_kl", apart))
    check = f"rounding of the {name}"
    if not known or noise < FELT * apart:
        return Check(check, "ok", saw, why, values=values)
    remedy = f"set models.{name}.bits={8 if bits == 4 else 'null'}, or choose a teacher that differs by more"
    return Check(check, "warn", saw, why, remedy, values)
