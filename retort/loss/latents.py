"""A method applied to denoising steps: no vocabulary, so no chunks and no head. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort import registry
from retort.core.context import Context
from retort.core.definition import Values
from retort.core.gaussian import Gaussian as GaussianPolicy
from retort.core.losses import TokenLosses
from retort.core.needs import Need, can_meet
from retort.core.parts import Part
from retort.core.signals import Gaussian
from retort.core.steps import NO_TOKEN, Clock, Steps
from retort.errors import UserError
from retort.loss.one_batch import BatchInputs, Loss, OneBatch, Passed
from retort.method import Method


def check_latents(method: Method) -> None:
    """Refuses a method that reads something of a vocabulary, of a teacher or of the student, or of text.

    Every part is held to it by itself: a sum of the needs would hide that one part has a form for Gaussians and another
    has none.

    Raises:
        UserError: One line that says what it reads, and which methods do without.
    """
    lacking = _lacking(method)
    if lacking:
        raise UserError(
            f"method '{method.name}' cannot teach denoising steps, which decide latents and no tokens: it needs "
            f"{' and '.join(lacking)}; methods that can: {', '.join(_able())}"
        )


def for_latents(method: Method) -> Method:
    """The method without those of its curves that a denoising step does not have, such as the student's entropy.

    Raises:
        UserError: See `check_latents`.
    """
    check_latents(method)
    watch = tuple(own for own in method.watch if not any(_unmet(part.student_needs) for part in _all_parts(own.parts)))
    before = None if method.before is None else (method.before[0], for_latents(method.before[1]))
    return replace(method, watch=watch, before=before)


def _able() -> list[str]:
    """Names of the published methods that can teach denoising steps at their default settings."""
    made = {name: registry.load(name) for name in registry.names()}
    return [name for name, own in made.items() if not _lacking(own) and not _in_words(own)]


def _in_words(method: Method) -> bool:
    """Whether a teacher of it reads or says more than the student's own prompt, in words."""
    return method.grading is not None or any(
        view.render is not None or view.images is not None or view.model == "student" for view in method.views.values()
    )


def _lacking(method: Method) -> list[str]:
    """What a method reads that denoising steps do not have, in words."""
    parts = list(_all_parts([part for term in method.terms for part in term.parts]))
    for controller in method.controllers:
        probed = () if controller.probe is None else controller.probe.parts.values()
        parts += _all_parts([*controller.observes.values(), *probed])
    of_teacher = {need for part in parts for need in _unmet([*part.needs, *(n for v in part.also.values() for n in v)])}
    of_student = {need for part in parts for need in _unmet(part.student_needs)}
    sides = {"from a teacher": of_teacher, "of the student": of_student}
    found = [f"{' and '.join(_said(need) for need in sorted(needs))} {side}" for side, needs in sides.items() if needs]
    if method.temperature != 1.0:
        found.append(f"a temperature of {method.temperature:g}, which divides logits (set method.temperature=1)")
    if any(stat.sentences for part in parts for stat in part.stats):
        found.append("sentences")
    return found


def _said(need: Need) -> str:
    """A need in words, with the reason where that is not plain."""
    why = {
        "dense": "of two Gaussians, only the forward and the reverse KL have a closed form, which gkd offers",
        "entropy": "that of a step is its noise's, whatever a model says",
        "probability": "a latent has a density",
    }
    return f"{need} ({why[need.kind]})" if need.kind in why else str(need)


def _all_parts(parts: Sequence[Part]) -> Iterator[Part]:
    """Parts, and those of the statistics that they read."""
    for part in parts:
        yield part
        yield from _all_parts([stat.part for stat in part.stats if stat.part is not None])


def _unmet(needs: Sequence[Need] | frozenset[Need]) -> list[Need]:
    return [need for need in needs if not can_meet(GaussianPolicy.offers, need)]


@dataclass(frozen=True, eq=False)
class LatentPass:
    """A pass over denoising steps, by plain autograd and all at once.

    Attributes:
        policy: The student's Gaussian at every step, live.
        latents_ND: The next latents that were decided.
        signals: Each view's signal at these steps.
    """

    policy: GaussianPolicy
    latents_ND: Tensor
    signals: Mapping[str, Gaussian]

    def __call__(self, values: Values, steps: Steps, clock: Clock, loss: Loss | None) -> Passed:
        """Evaluates a function of the context at all steps."""
        rows = {name: signal.rows(slice(None)) for name, signal in self.signals.items()}
        found = values(Context(self.policy, rows, steps, clock, latents_ND=self.latents_ND))
        return None if loss is None else loss(found, slice(0, len(steps))), found


def latent_losses(
    method: Method,
    policy: GaussianPolicy,
    latents_ND: Tensor,
    signals: Mapping[str, Gaussian],
    *,
    rollouts: Tensor | None = None,
    groups: Tensor | None = None,
    rewards: Tensor | None = None,
    old_logp: Tensor | None = None,
) -> TokenLosses:
    """Applies a method to denoising steps as one whole optimizer batch, by the code that applies it to tokens.

    Args:
        method: The method.
        policy: The student's Gaussian at every step, live.
        latents_ND: The next latents that were decided.
        signals: The teachers' Gaussians, by view.
        rollouts: Trajectory of each step, [N].
        groups: As in `retort.functional.token_losses`.
        rewards: As there.
        old_logp: The student's log-density of the next latents before the first update on this batch, nats, [N].

    Raises:
        UserError: The method reads what latents do not have, a view's signal is missing, or an input does not fit.
        SignalError: A signal is about other latents.
    """
    check_latents(method)
    tokens_N = torch.full((len(latents_ND),), NO_TOKEN, dtype=torch.long, device=latents_ND.device)
    inputs = BatchInputs(tokens_N, rollouts=rollouts, groups=groups, rewards=rewards, old_logp=old_logp)
    batch = OneBatch.from_inputs(method, inputs, Clock(), None)
    for view in method.views:
        if view not in signals:
            raise UserError(f"method '{method.name}' needs a signal for view '{view}', which was not given")
    for signal in signals.values():
        signal.check_decided(latents_ND)
    return batch.apply(signals, LatentPass(policy, latents_ND, signals))
