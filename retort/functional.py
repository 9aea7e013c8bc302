"""The losses, for use in other trainers. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from retort.core.head import Head
from retort.core.losses import TokenLosses
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock
from retort.errors import UserError
from retort.loss.one_batch import BatchInputs, OneBatch, as_head
from retort.method import Method

__all__ = ["Head", "linear_token_losses", "token_losses"]


def token_losses(
    method: Method | str,
    *,
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherSignal | None = None,
    tokens: Tensor,
    mask: Tensor | None = None,
    turns: Tensor | None = None,
    rollouts: Tensor | None = None,
    groups: Tensor | None = None,
    rewards: Tensor | None = None,
    old_logp: Tensor | None = None,
    engine_logp: Tensor | None = None,
    longest: int | None = None,
    extra_views: Mapping[str, Tensor | TeacherSignal] | None = None,
    student_hidden: Tensor | None = None,
    step: int = 0,
    total_steps: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> TokenLosses:
    """Applies a method to plain logits as one whole optimizer batch: the definition that all else must equal.

    Row n holds the distributions from which token n was (or could have been) sampled: in a padded batch that is
    `logits[:, :-1]` against `tokens[:, 1:]`, flattened.

    Args:
        method: A `Method`, or a name for the paper's defaults.
        student_logits: [N, V], any float dtype; softmax is in fp32 (float64 stays float64).
        teacher_logits: [N, V'] under the view `teacher`, or a `TeacherSignal` (sampled, top-k, candidates). V' may
            differ from V: the ids that both have are shared, the others are padding and get no probability.
        tokens: Ids that were generated, [N], int64.
        mask: Steps that count, [N], bool; all by default. Rows outside it are never read.
        turns: Turn of each step, [N].
        rollouts: Rollout of each step, [N], int64 from 0; one rollout by default.
        groups: Prompt of each rollout, [R], or repeated per step, [N]; for methods that compare siblings.
        rewards: Reward of each rollout, [R], or repeated per step, [N]; for methods that learn from rewards. Those of a
            rollout that is masked as a whole enter no mean of its group.
        old_logp: The student's log-probs of `tokens` before the first update on this batch, nats, [N]. Without it the
            batch counts as strictly on-policy.
        engine_logp: Log-probs that the rollout engine reported, nats, [N]; NaN where it reported none.
        longest: The longest completion allowed, tokens; for methods that reward short ones. By default, the longest of
            the batch.
        extra_views: Further views by name: logits [N, V'] or a `TeacherSignal`.
        student_hidden: The student's last hidden states [N, D], for methods that compare them; the teacher's are then
            given with its logits, as `Dense.of(logits, tokens, hidden_ND=...)`.
        step: Batches of rollouts done, for schedules.
        total_steps: Batches of the run, for schedules.
        state: State of the method's stateful parts from the previous call (`TokenLosses.state`); by default, that at
            the start of a run. A controller that observes the batch again after the update observes it before the
            update only: call its own `learn` for the rest.

    Returns:
        `TokenLosses`; per-step values are 0 outside the mask.

    Raises:
        UserError: Shapes that do not fit, ids outside the vocabulary, or an input that the method needs is missing.
        SignalError: A teacher's signal is misaligned or not finite.
    """
    inputs = BatchInputs(tokens, mask, turns, rollouts, groups, rewards, old_logp, engine_logp)
    batch = OneBatch.from_inputs(method, inputs, Clock(step, total_steps, longest=longest), state)
    batch.check_rows("student_logits", student_logits, 2)
    if student_hidden is not None:
        batch.check_rows("student_hidden", student_hidden, 2)
    views: dict[str, Tensor | TeacherSignal] = {} if teacher_logits is None else {"teacher": teacher_logits}
    signals = {name: batch.signal(name, view) for name, view in (views | dict(extra_views or {})).items()}
    states_ND = None if student_hidden is None else student_hidden[batch.kept_N]
    width, chunk = student_logits.shape[-1], len(tokens) or 1
    return batch.evaluate(student_logits[batch.kept_N], None, width, signals, chunk, states_ND)


def linear_token_losses(
    method: Method | str,
    *,
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | Head | None = None,
    tokens: Tensor,
    chunk: int | None = None,
    mask: Tensor | None = None,
    turns: Tensor | None = None,
    rollouts: Tensor | None = None,
    groups: Tensor | None = None,
    rewards: Tensor | None = None,
    old_logp: Tensor | None = None,
    engine_logp: Tensor | None = None,
    longest: int | None = None,
    extra_views: Mapping[str, tuple[Tensor, Tensor | Head] | TeacherSignal] | None = None,
    step: int = 0,
    total_steps: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> TokenLosses:
    """Equals `token_losses` on the products of hidden states and heads, without ever holding an [N, V] tensor.

    Args:
        method: As in `token_losses`, as are all arguments not named here.
        student_hidden: [N, D].
        student_head: Weight [V, D], or a `Head` with bias, scale and soft-cap.
        teacher_hidden: [N, D'].
        teacher_head: Weight [V', D'], or a `Head`.
        tokens: Ids that were generated, [N], int64.
        chunk: Steps per chunk; None for as many as fit into `retort.core.per_token.CHUNK_ELEMENTS` logits.
        mask: Steps that count; rows outside it are never projected.
        turns: As in `token_losses`.
        rollouts: As in `token_losses`.
        groups: As in `token_losses`.
        rewards: As in `token_losses`.
        old_logp: As in `token_losses`.
        engine_logp: As in `token_losses`.
        longest: As in `token_losses`.
        extra_views: Further views: pairs of hidden states and head, or a `TeacherSignal`.
        step: As in `token_losses`.
        total_steps: As in `token_losses`.
        state: As in `token_losses`.

    Returns:
        `TokenLosses`, equal to those of `token_losses` in value and gradient.

    Raises:
        UserError: As in `token_losses`.
        SignalError: As in `token_losses`.
    """
    inputs = BatchInputs(tokens, mask, turns, rollouts, groups, rewards, old_logp, engine_logp)
    batch = OneBatch.from_inputs(method, inputs, Clock(step, total_steps, longest=longest), state)
    batch.check_rows("student_hidden", student_hidden, 2)
    views: dict[str, tuple[Tensor, Tensor | Head] | TeacherSignal] = dict(extra_views or {})
    if teacher_hidden is not None:
        if teacher_head is None:
            raise UserError("teacher_hidden was given without teacher_head")
        views["teacher"] = (teacher_hidden, teacher_head)
    head = as_head(student_head)
    signals = {
        name: batch.signal(name, view) if isinstance(view, TeacherSignal) else batch.linear_signal(name, *view)
        for name, view in views.items()
    }
    hidden_ND = student_hidden[batch.kept_N]
    return batch.evaluate(hidden_ND, head, head.width, signals, chunk, hidden_ND)
