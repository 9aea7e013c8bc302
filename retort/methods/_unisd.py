"""UniSD's settings in groups, what its presets stand for, and what its components are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retort.core import parts
from retort.core.reduce import rollout_means, weighted_rollout_means
from retort.divergences import forward_kl, jsd, reverse_kl
from retort.divergences.guarded import capped, contrastive_hinge
from retort.errors import UserError
from retort.estimators import match_hidden, pathwise
from retort.method import Term, Unbounded, Watch
from retort.quantities import stored_quantity
from retort.teachers.induced import induced
from retort.teachers.moving import Weights, ema, frozen
from retort.teachers.others import MostAlike, at_random
from retort.teachers.view import View
from retort.teachers.views import examples, privileged
from retort.weights.agreement import Spread, agreement

Level = Literal["none", "token", "sequence"]
Divided = Literal["steps", "weights"]
Context = Literal["random", "retrieved", "induced"]
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
class Divergence:
    """The first term of the loss.

    Attributes:
        teacher_weight: w of D: 0 is the forward KL (the code's default), 1 the reverse KL, between them JSD.
        coef: Coefficient of the first term; 0 leaves it out.
        cap: c, nats, after the sum over the vocabulary; infinite for none.
        cap_quantile: Quantile of D over the batch that c is, instead of `cap`.
    """

    teacher_weight: float = 0.0
    coef: float | None = field(default=None, metadata={"setting": "divergence_coef"})
    cap: Unbounded | None = None
    cap_quantile: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Weight of a token or a rollout by the teacher's agreement with itself in other contexts.

    Attributes:
        level: Unit that a is measured on and holds for.
        spread: Spread of the K log-probs: their variance or their range.
        contexts: K.
        context: What each of them shows: other problems, solved, drawn at `random`, or `retrieved`, whose texts are
            most like the prompt; or an instruction that the teacher writes from problems drawn at random (`induced`).
        demonstrations: Other problems, solved, in each auxiliary context, or that an instruction is written from.
        instruction_tokens: Longest instruction, tokens; null: as long as a completion may be.
        gamma: Strength of disagreement; 0 is a = 1.
        divided_by: `steps` or `weights` of the rollout. Null: weights for tokens, as published; steps for sequences,
            because there the published weight cancels and does nothing.
    """

    level: Level | None = field(default=None, metadata={"setting": "agreement"})
    spread: Spread = "variance"
    contexts: int | None = None
    context: Context | None = None
    demonstrations: int = 1
    instruction_tokens: int | None = None
    gamma: float | None = None
    divided_by: Divided | None = None


@dataclass(frozen=True)
class Average:
    """The teacher as a moving average of the student.

    Attributes:
        rate: Share of the student that goes into the teacher, 1 - beta; 0 keeps it as before training.
        every: Optimizer steps between two moves of the teacher.
    """

    rate: float | None = field(default=None, metadata={"setting": "update_rate"})
    every: int | None = field(default=None, metadata={"setting": "update_every"})


@dataclass(frozen=True)
class Contrastive:
    """The second term of the loss.

    Attributes:
        coef: lambda_c; 0 switches it off.
        margin: m, nats.
    """

    coef: float | None = field(default=None, metadata={"setting": "contrastive_coef"})
    margin: float | None = field(default=None, metadata={"setting": "contrastive_margin"})


@dataclass(frozen=True)
class Components:
    """What is switched on, and how strongly: the settings of `unisd` that a preset says."""

    agreement: Level = "none"
    contexts: int = 3
    context: Context = "random"
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
    context="retrieved",
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


def components(
    preset: Preset,
    *,
    divergence: Divergence,
    agreement: Agreement,
    teacher: Average,
    contrastive: Contrastive,
    matching_coef: float | None,
) -> Components:
    """A preset with some settings changed: those that are not None.

    Raises:
        UserError: A coefficient out of range, or settings that leave nothing to learn.
    """
    changed: dict[str, Any] = {
        "agreement": agreement.level,
        "contexts": agreement.contexts,
        "context": agreement.context,
        "gamma": agreement.gamma,
        "update_rate": teacher.rate,
        "update_every": teacher.every,
        "contrastive_coef": contrastive.coef,
        "contrastive_margin": contrastive.margin,
        "matching_coef": matching_coef,
        "divergence_coef": divergence.coef,
        "cap": divergence.cap,
    }
    found = replace(PRESETS[preset], **{name: value for name, value in changed.items() if value is not None})
    coefs = {name: float(getattr(found, name)) for name in ("contrastive_coef", "matching_coef", "divergence_coef")}
    for name, coef in coefs.items():
        if coef < 0:
            raise UserError(f"unisd: {name} must not be negative, but is {coef}")
    if found.contexts > _MOST_CONTEXTS:
        raise UserError(f"unisd: contexts must be at most {_MOST_CONTEXTS}, but is {found.contexts}")
    if not any(coefs.values()):
        raise UserError("unisd: all components are switched off, so nothing would be learnt")
    return found


def views(on: Components, settings: Agreement, temperature: float) -> dict[str, View]:
    """The teacher's, that of the wrong example, and the auxiliary ones; all have the same weights.

    Args:
        on: What is switched on.
        settings: What the auxiliary ones show.
        temperature: Temperature at which instructions are written.
    """
    weights = ema(on.update_rate, on.update_every) if on.update_rate else frozen()
    found = {"teacher": privileged("demonstration", weights=weights)}
    if on.contrastive_coef:
        found["wrong"] = privileged("wrong", weights=weights)
    return found | dict(zip(_auxiliary(on), _contexts(on, settings, weights, temperature), strict=True))


def _contexts(on: Components, settings: Agreement, weights: Weights, temperature: float) -> list[View]:
    places, count = range(len(_auxiliary(on))), settings.demonstrations
    if not places:
        return []
    if on.context == "induced":
        longest = settings.instruction_tokens
        return induced(len(places), count, weights=weights, temperature=temperature, max_new_tokens=longest)
    choose = at_random if on.context == "random" else MostAlike(count * len(places))
    return [examples(count, place, choose=choose, weights=weights) for place in places]


def terms(on: Components, divergence: Divergence, settings: Agreement) -> tuple[Term, ...]:
    """Those that are switched on."""
    found: list[Term] = []
    if on.divergence_coef:
        weight, over = None, rollout_means()
        if on.agreement != "none":
            weight = agreement(_auxiliary(on), level=on.agreement, gamma=on.gamma, spread=settings.spread)
            if (settings.divided_by or ("weights" if on.agreement == "token" else "steps")) == "weights":
                over = weighted_rollout_means("agreement")
        estimator = pathwise(_divergence(on, divergence.teacher_weight, divergence.cap_quantile))
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


def _divergence(on: Components, teacher_weight: float, cap_quantile: float | None) -> parts.Divergence:
    ends = {0.0: forward_kl, 1.0: reverse_kl}
    whole = ends[teacher_weight]() if teacher_weight in ends else jsd(teacher_weight)
    if cap_quantile is not None:
        if math.isfinite(on.cap):
            raise UserError("unisd: cap and cap_quantile exclude each other; set cap = inf, or leave one out")
        return capped(whole, cap_quantile, quantile=True)
    return whole if math.isinf(on.cap) else capped(whole, on.cap)


def _auxiliary(on: Components) -> list[str]:
    return [] if on.agreement == "none" else [f"context_{place}" for place in range(on.contexts)]
