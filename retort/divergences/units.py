"""The two models' scores of shared ids where aligned units begin. Axis letters: see `retort.core`; F, S as in `Units`.

Every divergence across tokenizers has its value at the first step of each unit, and 0 at the other steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import SPANS
from retort.core.parts import Divergence
from retort.core.signals import Units
from retort.divergences.kl import kl_values


@dataclass(eq=False)
class SharedScores:
    """Both models' log-probs of the shared ids at the beginning of each unit.

    Attributes:
        units: The units.
        student: The student's live distribution at the first step of each, [F, V].
        student_FS: Its log-probs of its shared ids, nats, live; under the whole softmax, not renormalised.
        teacher_FS: The teacher's log-probs of its shared ids, nats.
    """

    units: Units
    student: Distribution
    student_FS: Tensor
    teacher_FS: Tensor


def shared_scores(context: Context, view: str) -> SharedScores:
    """The scores against a view, computed once per block for all parts that read them."""

    def make() -> SharedScores:
        units = context.signal(view).units
        student = units.student(context.student)
        if units.shared is None:
            return SharedScores(units, student, context.student_logp_NV, units.teacher.logp_CV)
        own_FS, their_FS = (ids_S.expand(units.count, -1) for ids_S in units.shared)
        return SharedScores(units, student, student.logp_at(own_FS), units.teacher.logp_at(their_FS))

    return context.once(("shared_scores", view), make)


def renormalised(scores_FS: Tensor) -> Tensor:
    """Log-probs that add up to one in each row, [F, S]; scores may be minus infinity."""
    # Not log_softmax, whose gradient over many ids is less exact in fp32.
    return scores_FS - scores_FS.logsumexp(-1, keepdim=True)


def on_student_top(scores: SharedScores, k: int | None, index_G: Tensor | None = None) -> Tensor:
    """Reverse KL of both models renormalised on the student's `k` most likely shared ids, nats, [G].

    Args:
        scores: The scores.
        k: Number of ids, chosen by the student, detached; None, or more than there are: all shared ids.
        index_G: Indices of the units to compare; None: all.
    """
    student_GS, teacher_GS = scores.student_FS, scores.teacher_FS
    if index_G is not None:
        student_GS, teacher_GS = student_GS[index_G], teacher_GS[index_G]
    if k is not None and k < student_GS.shape[1]:
        place_GK = student_GS.detach().topk(k, dim=-1).indices
        student_GS, teacher_GS = student_GS.gather(-1, place_GK), teacher_GS.gather(-1, place_GK)
    if student_GS.shape[1] == 0:  # nothing is shared, so nothing can be compared
        return student_GS.sum(-1)
    return kl_values(renormalised(student_GS), renormalised(teacher_GS))


def stop_forward_kl() -> Divergence:
    r"""Forward KL of the decision to stop or to go on, nats: :math:`D_{KL}(b_T \Vert b_S)` of two binary events.

    b is the probability of all ids that end a completion, at the first step of each unit, where both models stand at
    the same byte. Reverse KL cannot revive a stop whose probability is near 0; this does.
    """

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        own_S, their_S = units.known_stops()
        student_F2 = stop_or_go(units.student(context.student), own_S)
        return units.at_first(kl_values(stop_or_go(units.teacher, their_S), student_F2))

    return Divergence("stop_forward_kl", value, frozenset({SPANS}))


def stop_or_go(distribution: Distribution, stops_S: Tensor) -> Tensor:
    """Log-probs [F, 2] of the ids that stop, and of all others, nats."""
    ids_FS = stops_S.expand(len(distribution.logits_CV), -1)
    go_F = distribution.logp_outside(ids_FS, torch.ones_like(ids_FS, dtype=torch.bool))
    return torch.stack([distribution.logp_at(ids_FS).logsumexp(-1), go_F], -1)
