"""A method applied to steps: the code that `retort.functional` and the trainer share, so that they cannot differ.

`term_values` evaluates the terms on a chunk, `batch_scales` turns their denominators into loss scales, and `losses`
makes a scalar of both (`retort.core.reduce`). `stored_values` gives what the score pass stores: the old log-probs
(`old_logp`), baselines and weights. Axis letters: see `retort.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from retort.core import reduce
from retort.core.context import Context
from retort.core.losses import TokenLoss, times
from retort.core.needs import GAUSSIAN, SAMPLED, TEMPERATURE, Capability, Need, NeedKind, can_meet, listed
from retort.core.parts import Part, per_step
from retort.core.policy import Policy
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.method import Method, Term, Watch
from retort.registry import served_by

#: Ends the name of the column with a view's units, see `Units.sizes_C`; only of a teacher with another tokenizer.
UNITS = "_units"


def check_needs(method: Method, offers: Mapping[str, frozenset[Capability]]) -> None:
    """Raises `UserError` unless every view's teacher can meet the method's needs.

    The message lists the methods that the teacher serves as it is.
    """
    for view in method.views:
        if view not in offers:
            raise UserError(f"method '{method.name}' needs a signal for view '{view}', which was not given")
        missing = sorted(need for need in method.needs(view) if not can_meet(offers[view], need))
        if missing:
            wants = " and ".join(str(need) for need in missing)
            why = "it has another tokenizer" if "spans" in offers[view] else "choose another teacher or one of these"
            if GAUSSIAN in missing:
                why = "the student, too, must be a flow model: it decides latents, not tokens"
            raise UserError(
                f"method '{method.name}' needs {wants} from '{view}'; that teacher gives only: {listed(offers[view])} "
                f"({why}; methods that it serves: {', '.join(served_by(offers[view])) or 'none'})"
            )


def check_temperature(method: Method, able: Mapping[str, frozenset[Capability]]) -> None:
    """Raises `UserError` if the method's distributions have a temperature at which a view's teacher gives nothing."""
    for view, capabilities in able.items():
        if method.temperature != 1.0 and method.needs(view) and not can_meet(capabilities, TEMPERATURE):
            raise UserError(
                f"method '{method.name}' compares distributions at temperature {method.temperature:g}, and the teacher "
                f"of '{view}' gives log-probs at 1 only (of the ids that it names, not of all); set "
                "method.temperature=1"
            )


def wanted(method: Method, view: str, capabilities: frozenset[Capability], step: int = 0) -> frozenset[Need]:
    """The needs to request from a teacher at a step: those of the method, and those of its curves that it can meet."""
    return method.needs(view) | {need for need in method.optional_needs(view, step) if can_meet(capabilities, need)}


def term_values(method: Method) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives `<term>.value` and `<term>.weight`, [C] each, of terms that read logits."""
    return _values_of([term for term in method.terms if not term.estimator.reads_hidden])


def hidden_values(
    method: Method,
    student_ND: Tensor | None,
    signals: Mapping[str, TeacherSignal],
    steps: Steps,
    clock: Clock,
) -> dict[str, Tensor]:
    """The same, [N] each, of the terms that compare hidden states; by plain autograd, outside of the loss core.

    Args:
        method: The method.
        student_ND: The student's last hidden states at some steps, live.
        signals: The views' signals at the same steps.
        steps: The table of these steps.
        clock: The progress of the run.
    """
    terms = [term for term in method.terms if term.estimator.reads_hidden]
    if terms and student_ND is None:
        raise UserError(f"method '{method.name}' needs student_hidden (term '{terms[0].name}'), which was not given")
    rows = {term.against: signals[term.against].hidden_rows() for term in terms}
    return _values_of(terms)(Context(Policy(), rows, steps, clock, student_ND))


def _values_of(terms: Sequence[Term]) -> Callable[[Context], dict[str, Tensor]]:
    def values(context: Context) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for term in terms:
            weight_C = None
            if term.weight is not None:
                weight_C = context.steps.stored.get(f"{term.name}.weight")
                weight_C = (term.weight.at(context, term.against) if weight_C is None else weight_C).detach()
            value_C, weight_C = term.estimator.token_loss(context, term.against, term.name, weight_C)
            if context.clock.at(term.coef) == 0:
                value_C = _switched_off(value_C, context)
            values[f"{term.name}.value"] = per_step(f"the estimator of term '{term.name}'", value_C, context.steps)
            values[f"{term.name}.weight"] = per_step(f"the weight of term '{term.name}'", weight_C, context.steps)
        return values

    return values


def _switched_off(value_C: Tensor, context: Context) -> Tensor:
    """The value of a term whose coefficient is 0: to be seen, with a gradient of 0 even where the value is infinite.

    That gradient exists, so that a step at which all terms are off has a loss to differentiate, too.
    """
    live_C = context.student_logp_N if context.student_hidden_ND is None else context.student_hidden_ND.sum(-1)
    return value_C.detach() + times(0.0, live_C).to(value_C.dtype)


def stored_values(method: Method, *, weights_only: bool = False) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives the values that the score pass stores, [C] each, detached."""

    def values(context: Context) -> dict[str, Tensor]:
        found = {
            name: part.at(context, view).detach()
            for name, (part, view) in method.stored.items()
            if not weights_only or name.endswith(".weight")
        }
        return found if weights_only else {"old_logp": context.student_logp_N.detach(), **found}

    return values


def watch_values(watches: Iterable[Watch]) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives watched numbers, NaN on steps that a curve leaves out, [C] each, detached."""

    def values(context: Context) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for watch in watches:
            value_C = watch.part.at(context, watch.against).detach()
            if watch.where is not None:
                in_C = watch.where.at(context, watch.against) != 0
                value_C = value_C.masked_fill(~in_C, float("nan"))
            found[f"watch.{watch.name}"] = value_C
        return found

    return values


def part_values(parts: Mapping[str, Part], view: str) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives some parts by name, [C] each, detached."""
    return lambda context: {name: part.at(context, view).detach() for name, part in parts.items()}


def recorded_values(
    method: Method, offers: Mapping[str, frozenset[NeedKind]]
) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives the columns of the per-token record only, [C] each, detached.

    These are both sides' log-probs of the sampled token, what a term's estimator shows (`<term>.advantage`), and the
    units of a teacher with another tokenizer (`<view>_units`, see `Units.sizes_C`).
    """

    def values(context: Context) -> dict[str, Tensor]:
        values = {"student_logp": context.student_logp_N.detach()}
        for view, kinds in offers.items():
            if can_meet(kinds, SAMPLED):
                rows = context.signal(view)  # the log-prob of a unit is spread over its tokens, whose sum it is
                values[f"{view}_logp"] = rows.per_step(rows.sampled_logp_N)
                if rows.by_unit:
                    values[f"{view}{UNITS}"] = rows.units.sizes_C
        for term in method.terms:
            for name, value_C in term.estimator.shown(context, term.against, term.name).items():
                values[f"{term.name}.{name}"] = value_C
        return values

    return values


def counted(method: Method, valid: Mapping[str, Tensor | None], steps: int) -> dict[str, Tensor]:
    """The steps that count in each term, bool [N]: those that are valid for every view that it reads.

    Args:
        method: The method.
        valid: Each view's `TeacherSignal.valid_N`.
        steps: N, the number of steps.
    """
    counted_N: dict[str, Tensor] = {}
    for term in method.terms:
        requested = [valid_N for view, valid_N in valid.items() if valid_N is not None and term.needs_of(view)]
        counted_N[term.name] = torch.stack(requested).all(0) if requested else torch.ones(steps, dtype=torch.bool)
    return counted_N


def batch_scales(method: Method, steps: Steps, counted_N: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss scales of each term, [N] each.

    Args:
        method: The method.
        steps: The steps of one optimizer step.
        counted_N: The steps that count in each term, see `counted`.
    """
    return {
        term.name: reduce.loss_scales(
            term.denominator,
            counted_N=counted_N[term.name],
            rollout_N=steps.rollout_N,
            weight_N=_summed(term, steps.stored),
            turn_N=steps.turns().number_N if term.denominator.kind in ("turns", "turn_sums") else None,
            among_N=None if term.denominator.among is None else steps.stored[term.denominator.among],
        )
        for term in method.terms
    }


def _summed(term: Term, stored: Mapping[str, Tensor]) -> Tensor | None:
    """The weights that a weighted denominator sums, or the stored value that says which steps count."""
    name = term.denominator.by
    if name is None and term.denominator.kind in ("rollouts", "sums", "turns", "turn_sums"):
        return None
    name = name or f"{term.name}.weight"
    return stored[name].abs() if name in stored else None


def stat_values(method: Method) -> Callable[[Context], dict[str, Tensor]]:
    """The function of a chunk that gives the inputs of `finish_stats`, [C] each, detached."""

    def values(context: Context) -> dict[str, Tensor]:
        return {
            name: stat.part.at(context, view).detach()
            for name, (stat, view) in method.stats.items()
            if stat.part is not None
        }

    return values


def finish_stats(
    method: Method,
    values: Mapping[str, Tensor],
    steps: Steps,
    clock: Clock,
    valid: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """The statistics of the whole batch, from the values of all its steps; `valid` is as in `counted`."""
    stored: dict[str, Tensor] = {}
    for name, (stat, view) in method.stats.items():
        values_N = values.get(name, torch.zeros(len(steps), device=steps.rollout_N.device))
        requested = [
            valid_N
            for other, valid_N in (valid or {}).items()
            if valid_N is not None and stat.part is not None and stat.part.needs_of(other, view)
        ]
        here = steps.with_stored(stored | _contexts(stat.contexts, valid or {}, steps))
        if requested:
            index_N = torch.stack(requested).all(0).nonzero().squeeze(-1)
            values_N, here = values_N[index_N], here.select(index_N)
        # A batch without a step has no largest number and no mean; its stored values are empty, too.
        finished = stat.finish(values_N, here, clock).detach() if len(values_N) else values_N
        per_step(f"statistic '{name}'", finished, here)
        if requested:
            finished = finished.new_zeros(len(steps)).index_copy_(0, index_N, finished)
        stored[name] = finished
    return stored


def _contexts(views: Sequence[str], valid: Mapping[str, Tensor | None], steps: Steps) -> dict[str, Tensor]:
    """Of some views, at which steps they say something, as `context.<view>`, bool [N]."""
    found, everywhere_N = {view: valid.get(view) for view in views}, torch.ones_like(steps.tokens_N, dtype=torch.bool)
    return {
        f"context.{view}": everywhere_N if valid_N is None else valid_N.to(everywhere_N.device)
        for view, valid_N in found.items()
    }


def losses(
    method: Method,
    values: Mapping[str, Tensor],
    clock: Clock,
    *,
    counted_N: Mapping[str, Tensor],
    scale_N: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, TokenLoss]]:
    """The scalar loss of these steps, and the terms behind it for which there are values."""
    terms = {
        term.name: TokenLoss(values[f"{term.name}.value"], values[f"{term.name}.weight"], counted_N[term.name])
        for term in method.terms
        if f"{term.name}.value" in values
    }
    coefs = {term.name: clock.at(term.coef) for term in method.terms}
    return reduce.scalar(terms, scale_N, coefs), terms
