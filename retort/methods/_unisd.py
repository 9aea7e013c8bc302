"""What UniSD's presets stand for, one component each or all of them, and what the components are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from retort.core.parts import Divergence
from retort.core.reduce import rollout_means, weighted_rollout_means
from retort.divergences import forward_kl, jsd, reverse_kl
from retort.divergences.guarded import capped, contrastive_hinge
from retort.errors import UserError
from retort.estimators import match_hidden, pathwise
from retort.method import Term, Watch
from retort.quantities import stored_quantity
from retort.teachers.moving import ema, frozen
from retort.teachers.view import View
from retort.teachers.views import examples, privileged
from retort.weights.agreement import Spread, agreement

Level = Literal["none", "token", "sequence"]
Divided = Literal["steps", "weights"]
Preset = Literal[
    "base",
    "token_agreement",
    "sequence_agreement",
    "ema",
    "contrastive",
    "joint_matching",
    "matching_only",
    "clip",
    "star",
    "star_clip",
]


#: Each auxiliary context is a pass of the teacher over the whole batch; more can only hang.
_MOST_CONTEXTS = 1000


@dataclass(frozen=True)
class Components:
    """What is switched on, and how strongly. See the arguments of `unisd`, whose names these are."""

    agreement: Level = "none"
    contexts: int = 3
    gamma: float = 0.01
    update_rate: float = 0.0
    update_every: int = 10
    contrastive_coef: float = 0.0
    contrastive_margin: float = 0.5
    matching_coef: float = 0.0
    divergence_coef: float = 1.0
    cap: float = math.inf


_STAR = Components(
    agreement="token",
    gamma=0.001,
    update_rate=0.02,
    contrastive_coef=0.01,
    contrastive_margin=0.1,
    matching_coef=0.01,
)

PRESETS: Mapping[Preset, Components] = {
    "base": Components(),
    "token_agreement": Components(agreement="token"),
    "sequence_agreement": Components(agreement="sequence"),
    "ema": Components(update_rate=0.1),
    "contrastive": Components(contrastive_coef=0.1),
    "joint_matching": Components(matching_coef=0.1),
    "matching_only": Components(matching_coef=1.0, divergence_coef=0.0),
    "clip": Components(cap=10.0),
    # UniSD* of the code, and of the paper, which says that the clip is among all components.
    "star": _STAR,
    "star_clip": replace(_STAR, cap=10.0),
}


def components(preset: Preset, **changed: Level | float | None) -> Components:
    """A preset with some settings changed: those that are not None.

    Raises:
        UserError: A coefficient out of range, or settings that leave nothing to learn.
    """
    found = replace(PRESETS[preset], **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]
    coefs = {name: float(getattr(found, name)) for name in ("contrastive_coef", "matching_coef", "divergence_coef")}
    for name, coef in coefs.items():
        if coef < 0:
            raise UserError(f"unisd: {name} must not be negative, but is {coef}")
    if found.contexts > _MOST_CONTEXTS:
        raise UserError(f"unisd: contexts must be at most {_MOST_CONTEXTS}, but is {found.contexts}")
    if not any(coefs.values()):
        raise UserError("unisd: all components are switched off, so nothing would be learnt")
    return found


def views(on: Components, demonstrations: int) -> dict[str, View]:
    """The teacher's, that of the wrong example, and the auxiliary ones; all have the same weights."""
    weights = ema(on.update_rate, on.update_every) if on.update_rate else frozen()
    found = {"teacher": privileged("demonstration", weights=weights)}
    if on.contrastive_coef:
        found["wrong"] = privileged("wrong", weights=weights)
    for place, name in enumerate(_auxiliary(on)):
        found[name] = examples(demonstrations, place, weights=weights)
    return found


def terms(
    on: Components, teacher_weight: float, spread: Spread, divided_by: Divided | None, cap_quantile: float | None
) -> tuple[Term, ...]:
    """Those that are switched on."""
    found: list[Term] = []
    if on.divergence_coef:
        weight, over = None, rollout_means()
        if on.agreement != "none":
            weight = agreement(_auxiliary(on), level=on.agreement, gamma=on.gamma, spread=spread)
            if (divided_by or ("weights" if on.agreement == "token" else "steps")) == "weights":
                over = weighted_rollout_means("agreement")
        estimator = pathwise(_divergence(on, teacher_weight, cap_quantile))
        found.append(Term("divergence", estimator, weight=weight, coef=on.divergence_coef, denominator=over))
    if on.contrastive_coef:
        hinge = contrastive_hinge(on.contrastive_margin)
        found.append(Term("contrastive", pathwise(hinge), coef=on.contrastive_coef))
    if on.matching_coef:
        found.append(Term("matching", match_hidden(), coef=on.matching_coef))
    return tuple(found)


def curves(on: Components, cap_quantile: float | None) -> tuple[Watch, ...]:
    """What the components store."""
    stored = ["agreement", "agreement.apart"] if on.agreement != "none" and on.divergence_coef else []
    stored += ["cap"] if cap_quantile is not None and on.divergence_coef else []
    return tuple(Watch(name.replace(".", "_"), stored_quantity(name)) for name in stored)


def _divergence(on: Components, teacher_weight: float, cap_quantile: float | None) -> Divergence:
    ends = {0.0: forward_kl, 1.0: reverse_kl}
    whole = ends[teacher_weight]() if teacher_weight in ends else jsd(teacher_weight)
    if cap_quantile is not None:
        if math.isfinite(on.cap):
            raise UserError("unisd: cap and cap_quantile exclude each other; set cap = inf, or leave one out")
        return capped(whole, cap_quantile, quantile=True)
    return whole if math.isinf(on.cap) else capped(whole, on.cap)


def _auxiliary(on: Components) -> list[str]:
    return [] if on.agreement == "none" else [f"context_{place}" for place in range(on.contexts)]
