"""The teacher's distribution over the student's tokens, by the bytes that they begin with. Axis letters: `retort.core`.

R counts the steps at which it can be formed; F as in `Units`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.distribution import Distribution
from retort.core.needs import SPANS, require_finite
from retort.core.parts import Divergence
from retort.core.signals import PrefixTable, TeacherTokens, Units
from retort.divergences.kl import kl_values
from retort.divergences.units import stop_or_go
from retort.errors import SignalError, UserError

Direction = Literal["forward_kl", "reverse_kl", "jsd"]


def byte_prefix(
    divergence: Direction = "forward_kl", *, teacher_weight: float = 0.5, whitespace: bool = False
) -> Divergence:
    r"""Divergence from the teacher's distribution over the student's tokens, nats, at every token (arXiv 2607.22334).

    .. math:: (1-\rho)\, D(\bar t \Vert p_S), \quad
              t(u) = \frac{1}{\pi(c)} \sum_{v:\ c \preceq b(v),\ \phi_c(v) = u} p_T(v), \quad
              \pi(c) = \sum_{v:\ c \preceq b(v)} p_T(v)

    c are the bytes of the teacher's token that are already written where the student's token begins (none at a common
    boundary), b(v) a token's bytes, and :math:`\phi_c(v)` the longest token of the student's that b(v) begins with
    behind c. What has none is the residual :math:`\rho`; :math:`\bar t` is t over the rest. So the gradient of the
    forward KL is that of :math:`\sum_u t(u) \log (t(u) / p_S(u))`. Where the student's written token goes on behind the
    teacher's, to the end of the unit, the teacher's probability of all its tokens up to there is moved to it from the
    token that its first one means.

    With one tokenizer this is the divergence over the whole vocabulary. The value is 0 outside of units, at tokens
    without bytes and stops, at those that end inside of a later token of the teacher's, and at whitespace.

    Args:
        divergence: D. Only the ids with t above 0 count in the reverse KL, which the student is renormalised on.
        teacher_weight: The teacher's weight in `jsd`, strictly between 0 and 1.
        whitespace: Whether tokens that are whitespace only count. The two tokenizers cut runs of it differently, and
            the paper's students lost their code's indentation by that.

    Raises:
        UserError: A teacher's weight outside of (0, 1).
    """
    if not 0.0 < teacher_weight < 1.0:
        raise UserError(
            f"byte_prefix: teacher_weight must lie strictly between 0 and 1, not {teacher_weight}: jsd vanishes at the "
            "ends; set divergence=forward_kl (for 0) or divergence=reverse_kl (for 1)"
        )

    def between(student: Distribution, teacher: Distribution) -> Tensor:
        if divergence == "jsd":
            return student.jsd(teacher, teacher_weight)
        if divergence == "reverse_kl":
            return student.reverse_kl(teacher)
        return student.forward_kl(teacher)

    def value(context: Context, view: str) -> Tensor:
        units = context.signal(view).units
        if units.shared is None:
            return between(context.student, units.teacher)
        table, theirs = prefix_table(units)
        rows = _rows(context, units, table, whitespace)
        if not rows.begun:
            return torch.where(torch.zeros_like(context.student_logp_N, dtype=torch.bool), context.student_logp_N, 0.0)
        teacher = theirs.distribution(rows.at_R)
        require_finite("a logit (or the sum of all)", teacher.normaliser_C, units.source)
        logits_RV = context.whole_student.logits_CV[rows.step_R]
        target_RV = projected(teacher, rows.begun, table, theirs, rows.at_R, rows.ids_R)
        t_RV = torch.nn.functional.pad(target_RV[:, :-1], (0, logits_RV.shape[1] - table.residual))
        placed_R = t_RV.sum(-1)
        if divergence == "reverse_kl":
            logits_RV = logits_RV.masked_fill(t_RV <= 0, -math.inf)
        # A row without any counterpart has nothing to be compared with: its weight is 0, and its target is any.
        sure_RV = torch.where((placed_R > 0)[:, None], t_RV / placed_R[:, None], 1.0)
        found_R = between(Distribution(logits_RV), Distribution(sure_RV.log()))
        found_R = torch.where(placed_R > 0, found_R * placed_R, 0.0)
        return found_R.new_zeros(len(context.steps)).index_copy(0, rows.step_R, found_R)

    return Divergence(f"byte_prefix({divergence})", value, frozenset({SPANS}))


def stop_bridge() -> Divergence:
    r"""Forward KL of the decision to stop or to go on, nats, where the student stopped; 0 elsewhere.

    .. math:: D_{KL}(b_T \Vert b_S)

    of the probabilities of all ids that end a completion: a stop spells no bytes, so `byte_prefix` has nothing to say
    there. With one tokenizer, or where the stops are not known, there is nothing to bridge, and it is 0.
    """

    def value(context: Context, view: str) -> Tensor:
        units, logp_C = context.signal(view).units, context.student_logp_N
        nothing_C = torch.where(torch.zeros_like(logp_C, dtype=torch.bool), logp_C, 0.0)
        if units.shared is None or units.stops is None:
            return nothing_C
        their_first_F, theirs = units.their_tokens()
        own_S, their_S = units.stops
        index_G = torch.isin(context.steps.tokens_N[units.first_F], own_S).nonzero().squeeze(-1)
        if not len(index_G):
            return nothing_C
        step_G = units.first_F[index_G]
        teacher = theirs.distribution(their_first_F[index_G])
        require_finite("a logit (or the sum of all)", teacher.normaliser_C, units.source)
        student = Distribution(context.student.logits_CV[step_G], context.student.shard)
        return nothing_C.index_copy(0, step_G, kl_values(stop_or_go(teacher, their_S), stop_or_go(student, own_S)))

    return Divergence("stop_bridge", value, frozenset({SPANS}))


@dataclass(eq=False)
class _Rows:
    """The steps that can be compared.

    Attributes:
        begun: The bytes that the teacher has written there, and, where the student's token goes beyond the teacher's,
            the number of the teacher's tokens up to the end of the unit (0 elsewhere).
        step_R: Index of the step in the block.
        at_R: Index of the teacher's token.
        ids_R: The student's id that was written.
    """

    begun: list[tuple[bytes, int]]
    step_R: Tensor
    at_R: Tensor
    ids_R: Tensor


def _lists(*columns: Tensor) -> tuple[list[int], ...]:
    return tuple(column.tolist() for column in columns)  # pyright: ignore


def _rows(context: Context, units: Units, table: PrefixTable, whitespace: bool) -> _Rows:
    their_first_F, theirs = units.their_tokens()
    tokens_C = context.steps.tokens_N
    stops = set[int]() if units.stops is None else set(_lists(units.stops[0])[0])
    (ids,) = _lists(tokens_C)
    begun: list[tuple[bytes, int]] = []
    steps: list[int] = []
    at: list[int] = []
    columns = (units.first_F, units.own_F, their_first_F, units.theirs_F)
    firsts, owns, places, counts = _lists(*columns)
    low = min(places, default=0)
    (read,) = _lists(theirs.tokens_M[low : max((p + n for p, n in zip(places, counts, strict=True)), default=0)])
    for first, own, place, others in zip(firsts, owns, places, counts, strict=True):
        found = table.positions(ids[first : first + own], read[place - low : place - low + others])
        for step, here in enumerate(found, first):
            token = ids[step]
            if here is None or token in stops or (not whitespace and table.is_whitespace(token)):
                continue
            begun.append((here.prefix, others - here.token if here.beyond else 0))
            steps.append(step)
            at.append(place + here.token)
    step_R, at_R = (torch.tensor(x, dtype=torch.long, device=tokens_C.device) for x in (steps, at))
    return _Rows(begun, step_R, at_R, tokens_C[step_R])


def projected(
    teacher: Distribution,
    begun: list[tuple[bytes, int]],
    table: PrefixTable,
    theirs: TeacherTokens,
    at_R: Tensor,
    ids_R: Tensor,
) -> Tensor:
    """The teacher's probabilities of the student's ids and, last, of none of them: [R, V_S + 1], adding up to 1.

    Args:
        teacher: The teacher's distribution at each row's token.
        begun: For each row, the bytes of that token that are already written, and the number of the teacher's tokens
            that the student's written token stands for, where those are several; else 0.
        table: What the teacher's tokens mean.
        theirs: The teacher's tokens.
        at_R: Index of each row's token among them.
        ids_R: The student's written ids.
    """
    device = at_R.device
    target_RV = teacher.p_CV.new_zeros(len(begun), table.residual + 1)
    behind: dict[bytes, list[int]] = {}
    for row, (prefix, _) in enumerate(begun):
        behind.setdefault(prefix, []).append(row)
    for prefix, rows in behind.items():
        index_K = torch.tensor(rows, device=device)
        if prefix:
            ids_I, meant_I = (x.to(device) for x in table.inside(prefix))
            p_KI, pi_K = _conditional(teacher.logp_CV[index_K][:, ids_I])
        else:
            meant_I, pi_K = table.root_V.to(device), None
            p_KI = teacher.p_CV[index_K]
        target_RV[index_K] = p_KI.new_zeros(len(rows), table.residual + 1).index_add_(1, meant_I, p_KI)
        for order, row in enumerate(rows):
            count = begun[row][1]
            if count:
                logp = theirs.total(at_R[row : row + 1], torch.tensor([count], device=device))[0]
                moved = (logp if pi_K is None else logp - pi_K[order]).exp()
                first = table.meaning(prefix, int(theirs.tokens_M[at_R[row]]))
                moved = torch.minimum(moved, target_RV[row, first])  # more by rounding only
                target_RV[row, first] -= moved
                target_RV[row, ids_R[row]] += moved
    return target_RV


def _conditional(logp_KI: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities given that one of these ids is written, [K, I], and the log-prob of that, nats, [K]."""
    pi_K = logp_KI.logsumexp(-1)
    return (logp_KI - pi_K[:, None]).exp(), pi_K


def prefix_table(units: Units) -> tuple[PrefixTable, TeacherTokens]:
    """What the teacher's tokens mean in the student's, and those.

    Raises:
        SignalError: It is not known.
    """
    theirs = units.their_tokens()[1]
    get: Callable[[], PrefixTable] | None = theirs.prefixes
    if get is None:
        raise SignalError(f"{units.source}: its signal does not say which bytes its tokens spell, which is needed here")
    return get(), theirs
