"""Score-function estimator: a policy gradient on the sampled token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.needs import Need
from retort.core.parts import Advantage, Baseline, Part, Quantity
from retort.core.signals import SignalRows
from retort.errors import UserError


@dataclass(frozen=True)
class ScoreFunction:
    """Policy gradient with an optional baseline, importance ratio and PPO clip; `score_function` makes it."""

    advantage: Advantage
    baseline: Baseline | None
    baseline_coef: float
    clip: float | tuple[float, float] | None
    clip_by: Advantage | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that it evaluates."""
        return (self.advantage, *(part for part in (self.baseline, self.clip_by) if part is not None))

    @property
    def needs(self) -> frozenset[Need]:
        """Its needs of the teacher."""
        return frozenset[Need]().union(*(part.needs for part in self.parts))

    @property
    def stored(self) -> Mapping[str, Part]:
        """Parts, by name, whose values must be taken before the first update on a batch."""
        found: dict[str, Part] = {"baseline": self.baseline} if self.baseline else {}
        return {**found, "advantage": self.advantage} if self.advantage.reads_student else found

    @property
    def uses_old_logp(self) -> bool:
        """Whether it compares with the student before the first update: advantage and ratio do."""
        return True

    def advantage_N(self, context: Context, view: str, term: str) -> Tensor:
        """Advantage minus baseline, nats, detached."""
        advantage_N = context.steps.stored.get(f"{term}.advantage")
        if advantage_N is None:
            advantage_N = self.advantage.at(context, view)
        if self.baseline is not None and self.baseline_coef != 0:  # an infinite baseline times 0 is NaN
            baseline_N = context.steps.stored.get(f"{term}.baseline")
            if baseline_N is None:
                baseline_N = self.baseline.at(context, view)
            # A token that the teacher rules out is infinitely bad, and no baseline (infinite, too) makes it less so.
            lower_N = advantage_N - self.baseline_coef * baseline_N
            advantage_N = torch.where(advantage_N.isinf(), advantage_N, lower_N)
        return advantage_N.detach()

    def _rows(self, context: Context, view: str) -> SignalRows:
        """The signal whose units decide what a ratio is about; every token where no teacher is read."""
        return context.signal(view) if self.needs else SignalRows()

    def _ratio_N(self, context: Context, view: str) -> Tensor:
        return self._rows(context, view).over_unit(context.student_logp_N - context.old_logp_N).exp()

    @property
    def reads_hidden(self) -> bool:
        """False: it reads logits."""
        return False

    def token_loss(self, context: Context, view: str, term: str, weight_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the clipped surrogate at each step, and the size of its weight.

        The weight multiplies the advantage *before* the clip: a negative weight flips the sign of the advantage, and so
        the side of the clip that binds. Only then does the weight's size scale the result.

        Against a teacher with another tokenizer the surrogate is that of a unit: the ratio is the product of its
        tokens', and the value (with the weight and the baseline of its first step) is at its first step, 0 at the
        others. Its gradient reaches all of the unit's tokens, each with the unit's whole advantage.
        """
        weight_N = torch.ones_like(context.student_logp_N.detach()) if weight_N is None else weight_N
        advantage_N = self.advantage_N(context, view, term)
        advantage_N = torch.where(weight_N < 0, -advantage_N, advantage_N)
        # Zeroed before the product: an infinite advantage behind a closed gate would leave a NaN gradient.
        advantage_N = torch.where(weight_N == 0, torch.zeros_like(advantage_N), advantage_N)
        advantage_N = self._rows(context, view).first_only(advantage_N)
        ratio_N = self._ratio_N(context, view)
        if self.clip_by is not None:
            binds_N = self._binds(ratio_N, self.clip_by.at(context, view))
            return -advantage_N * torch.where(binds_N, ratio_N.clamp(*self._bounds), ratio_N), weight_N.abs()
        value_N = -advantage_N * ratio_N
        if self.clip is not None:
            value_N = torch.maximum(value_N, -advantage_N * ratio_N.clamp(*self._bounds))
        return value_N, weight_N.abs()

    def _binds(self, ratio_N: Tensor, advantage_N: Tensor) -> Tensor:
        """Whether the clipped loss is the larger one."""
        low, high = self._bounds
        return torch.where(advantage_N > 0, ratio_N > high, ratio_N < low)

    @property
    def _bounds(self) -> tuple[float, float]:
        """Bounds of the ratio, where there is a clip."""
        low, high = self.clip if isinstance(self.clip, tuple) else (self.clip or 0.0, self.clip or 0.0)
        return 1.0 - low, 1.0 + high

    def shown(self, context: Context, view: str, term: str) -> dict[str, Tensor]:
        """Further numbers of each token for the record, [N] each, by name."""
        return {"advantage": self.advantage_N(context, view, term)}

    def clipped(self, term: str) -> Quantity:
        """A quantity to watch: 1 where the clip binds, else 0."""

        def value(context: Context, view: str) -> Tensor:
            ratio_N = self._ratio_N(context, view).detach()
            if self.clip is None:
                return torch.zeros_like(ratio_N)
            advantage_N = self.clip_by.at(context, view) if self.clip_by else self.advantage_N(context, view, term)
            return self._binds(ratio_N, advantage_N).to(ratio_N.dtype)

        also = {view: needs for part in self.parts for view, needs in part.also.items()}
        return Quantity("clip_fraction", value, self.needs, also)


def score_function(
    advantage: Advantage,
    *,
    baseline: Baseline | None = None,
    baseline_coef: float = 1.0,
    clip: float | tuple[float, float] | None = None,
    clip_by: Advantage | None = None,
) -> ScoreFunction:
    r"""The estimator :math:`-A_t \rho_t` with :math:`\rho_t = p_S(y_t) / p_{old}(y_t)`, optionally PPO-clipped.

    With one optimizer step per batch the ratio is identically 1 and its gradient is that of REINFORCE.

    Args:
        advantage: A_t, nats; detached.
        baseline: Subtracted from the advantage, times `baseline_coef`; detached.
        baseline_coef: 1 in the papers; 0 switches the baseline off.
        clip: PPO's epsilon on both sides, or one for below and one for above 1: the loss is the larger of the plain and
            the clipped one. None: no clip.
        clip_by: The advantage by which the clip binds, where several terms share one ratio: their sum
            (`advantage_sum`), so that the sum of the terms is the clipped surrogate of the sum. None: `advantage`.
            Weights of the term must not be negative then.
    """
    if clip is not None and min(clip if isinstance(clip, tuple) else (clip,)) <= 0:
        raise UserError(f"clip must be positive, or none for no clip; it is {clip}")
    return ScoreFunction(advantage, baseline, baseline_coef, clip, clip_by if clip is not None else None)
