"""What a method needs where another program than the trainer writes its rollouts."""

from __future__ import annotations

from dataclasses import replace

from retort.method import Method, Term, Watch
from retort.weights import both, effective_sample_size, engine_correction


def corrected_for_engine(method: Method) -> Method:
    r"""The method with every policy gradient weighed by :math:`\min(p_{old}(y_t) / p_{engine}(y_t), 2)`.

    A policy gradient is an expectation over what was sampled, and the engine's rounding (other kernels, another
    precision) makes that another distribution than the trainer's. The weight is that of truncated importance sampling
    per token (:func:`retort.weights.engine_correction`). Terms that correct for the engine by themselves stay as they
    are, and so do divergences in closed form, which are right at every prefix. `importance` and `ess` are watched.

    Args:
        method: Any method.
    """
    weight, made = engine_correction(), method.made_of
    changed = tuple(_corrected(term) for term in method.terms)
    before = None if method.before is None else (method.before[0], corrected_for_engine(method.before[1]))
    if changed == method.terms:
        return replace(method, before=before)
    known = {watch.name for watch in method.watch}
    curves = (Watch("importance", weight), Watch("ess", weight, summed_up=effective_sample_size))
    added = tuple(curve for curve in curves if curve.name not in known)
    if method.parts_as_published:  # the engine is no part of what a paper says
        made = (made[0], changed, *made[2:])
    return replace(method, terms=changed, made_of=made, watch=(*method.watch, *added), before=before)


def uncorrected(method: Method) -> str | None:
    """The first term that is a policy gradient and does not correct for the engine; None where there is none."""
    return next((term.name for term in method.terms if _corrected(term) is not term), None)


def on_policy_only(method: Method) -> str | None:
    """Why a method may learn from nothing but what its student writes as it is; None for one that may.

    A weight per token makes a policy gradient right, up to its bound, for rollouts of an older student; a divergence in
    closed form is right at every prefix. What remains are estimates from the sampled token that count on who drew it.

    Args:
        method: Any method, without what comes before it.
    """
    if method.needs_latents:
        return "its student decides denoising steps, which are made in this process"
    for term in method.terms:
        for part in term.parts:
            if part.whole_support or part.from_sample:
                return f"'{part.name}' (term '{term.name}') is right only for tokens that the student drew as it is"
    return None


def _corrected(term: Term) -> Term:
    own = term.weight is not None and term.weight.corrects_engine
    if own or not term.estimator.uses_old_logp:
        return term
    weight = engine_correction()
    return replace(term, weight=weight if term.weight is None else both(term.weight, weight))
