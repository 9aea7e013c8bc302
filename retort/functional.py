"""The losses, for use in other trainers. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from retort import flows
from retort.align.spans import Mode
from retort.core.distribution import as_compute
from retort.core.gaussian import Gaussian as GaussianPolicy
from retort.core.head import Head
from retort.core.losses import TokenLosses
from retort.core.signals import Gaussian, TeacherSignal
from retort.core.steps import Clock
from retort.errors import UserError
from retort.loss.latents import latent_losses
from retort.loss.one_batch import BatchInputs, Confidences, OneBatch, as_head
from retort.loss.two_tokenizers import TwoTokenizations
from retort.method import Method
from retort.registry import load

__all__ = ["Head", "cross_token_losses", "flow_losses", "linear_token_losses", "token_losses"]


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
    confidences: Confidences | None = None,
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
        confidences: How sure each of K teachers said to be, 0 to 100, in the order of their views: [K] for all
            rollouts, or [R, K]; None or NaN where one said nothing. For methods that weigh teachers by it.
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
    inputs = replace(inputs, confidences=confidences)
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
    confidences: Confidences | None = None,
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
        confidences: As in `token_losses`.
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
    inputs = replace(inputs, confidences=confidences)
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


def cross_token_losses(
    method: Method | str,
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    student_pieces: Sequence[bytes],
    teacher_pieces: Sequence[bytes],
    shared: Sequence[tuple[int, int]],
    student_rollouts: Tensor | None = None,
    teacher_rollouts: Tensor | None = None,
    segmentation: Mode = "minimal",
    stops: tuple[Sequence[int], Sequence[int]] | None = None,
    vocabularies: tuple[Sequence[bytes], Sequence[bytes]] | None = None,
    old_logp: Tensor | None = None,
    step: int = 0,
    total_steps: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> TokenLosses:
    """Applies a method to two models with different tokenizers, which both read the same completions.

    Both sides' tokens are cut into units that are the same bytes (`retort.align.spans.units`). A term's value is at the
    first of the student's tokens of each unit, and 0 at the others; its gradient reaches all tokens of the unit. The
    loss is the sum over units, divided by the mean of both token counts. (A run divides by the student's tokens that
    lie in units, which needs no count of another model's.)

    Args:
        method: A `Method`, or a name for the paper's defaults: `simct`, `strict_ct`, `uld` and the like, and methods of
            the sampled token such as `opd`, `power_opd` and `vopd`, which then read the log-ratio of each unit. It has
            one view, `teacher`.
        student_logits: [N, V_S], any float dtype; softmax is in fp32 (float64 stays float64). Row n holds the
            distribution from which token n was generated.
        teacher_logits: [M, V_T] at the teacher's own tokens, in the same way.
        student_tokens: The student's ids, [N], int64.
        teacher_tokens: The teacher's ids of the same completions, [M], int64.
        student_pieces: The bytes that each of the student's N tokens writes. Tokens that write none, such as a stop,
            have a piece that no text holds, the same on both sides where they mean the same.
        teacher_pieces: The bytes that each of the teacher's M tokens writes.
        shared: Pairs of a student's id and a teacher's id that are the same bytes; no id is in two of them.
        student_rollouts: Rollout of each of the student's tokens, [N], int64 from 0, each rollout's in a row; one
            rollout by default.
        teacher_rollouts: Rollout of each of the teacher's tokens, [M], numbered as the student's.
        segmentation: `minimal` units, or those of an `anchor`, as in SimCT's released code.
        stops: The ids that end a completion, the student's and the teacher's; for terms on the stop decision.
        vocabularies: The bytes of every id, [V_S] of the student's and [V_T] of the teacher's, b"" for control tokens;
            for `bpm`, which needs them unless each of the teacher's ids is in a pair.
        old_logp: As in `token_losses`.
        step: As in `token_losses`.
        total_steps: As in `token_losses`.
        state: As in `token_losses`.

    Returns:
        `TokenLosses` on the student's N steps; steps outside of all units do not count.

    Raises:
        UserError: Shapes that do not fit, ids outside of a vocabulary, bytes that differ between the two sides, or a
            method that needs what spans cannot give.
        SignalError: The teacher's logits are not finite.

    Example:
        >>> from retort.functional import cross_token_losses
        >>> from torch import tensor
        >>> losses = cross_token_losses(
        ...     "opd",
        ...     student_logits=tensor([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]).log(),
        ...     teacher_logits=tensor([[0.4, 0.6]]).log(),
        ...     student_tokens=tensor([0, 1]),
        ...     teacher_tokens=tensor([1]),
        ...     student_pieces=[b"a", b"b"],
        ...     teacher_pieces=[b"ab"],
        ...     shared=[],
        ... )
        >>> losses.loss  # -(ln 0.6 - ln 0.5 - ln 0.4): one unit, over 1.5 tokens
        tensor(-0.7324)
    """
    both = TwoTokenizations.of(
        (student_tokens, teacher_tokens),
        (student_pieces, teacher_pieces),
        (student_rollouts, teacher_rollouts),
        shared,
        stops,
        segmentation,
        vocabularies,
    )
    found = both.divided(load(method) if isinstance(method, str) else method)
    inputs = BatchInputs(student_tokens, rollouts=student_rollouts, old_logp=old_logp)
    batch = OneBatch.from_inputs(found, inputs, Clock(step, total_steps), state)
    batch.check_rows("student_logits", student_logits, 2)
    width = student_logits.shape[1]
    own_S = both.shared[0]
    if len(own_S) and not 0 <= int(own_S.min()) <= int(own_S.max()) < width:
        raise UserError(f"shared hold ids outside the student's vocabulary of {width}")
    signals = {"teacher": both.spans(teacher_logits, found.temperature, width)}
    return batch.evaluate(student_logits, None, width, signals, len(student_tokens) or 1, None)


def flow_losses(
    method: Method | str,
    *,
    student_velocity: Tensor,
    teacher_velocity: Tensor | None = None,
    latents: Tensor,
    next_latents: Tensor,
    sigmas: Tensor,
    next_sigmas: Tensor,
    sampler: flows.Sampler = "sde",
    noise_level: float,
    sigma_max: float | None = None,
    rollouts: Tensor | None = None,
    groups: Tensor | None = None,
    rewards: Tensor | None = None,
    old_logp: Tensor | None = None,
    extra_views: Mapping[str, Tensor] | None = None,
) -> TokenLosses:
    """Applies a method to the denoising steps of a flow-matching model: the next latent takes the place of a token.

    Row n is one step of a trajectory of the student: from `latents[n]` at `sigmas[n]` it arrived at `next_latents[n]`.
    Both models' velocities are predicted at `latents`, with the same prompt and guidance. The sampler makes a Gaussian
    of each (`retort.flows.denoising_step`); their log-densities and their KL are summed over the elements of a latent,
    in float64, with no hidden scale.

    Any method that reads no vocabulary works, by the same code as for tokens. `opd` takes the log-ratio of the latent
    that was decided. `gkd` with `divergence=reverse_kl` differentiates the KL in closed form; with `forward_kl` it is
    the same number, since both sides have the sampler's deviation. `flow_opd` and `diffusion_opd` have one term,
    `distillation`, whose value is the true KL in nats.

    Args:
        method: A `Method`, or a name for the paper's defaults.
        student_velocity: [N, ...], live, any float dtype; computed in fp32 (float64 stays float64).
        teacher_velocity: Of the same shape, under the view `teacher`; no gradient reaches it.
        latents: Latents at which the velocities were predicted, of the same shape.
        next_latents: Latents that the student arrived at, of the same shape.
        sigmas: Noise level of `latents`, [N], more than 0 and at most 1.
        next_sigmas: That of `next_latents`, [N], at least 0 and below `sigmas`. 0 is refused under `cps`, which adds no
            noise there; the other two do.
        sampler: By which the student arrived at them: `sde` (Flow-GRPO), `cps` or `dance_sde`.
        noise_level: The sampler's noise, dimensionless, positive: without noise the KL is infinite.
        sigma_max: The schedule's second sigma, which `sde` needs where a sigma is 1.
        rollouts: Trajectory of each step, [N], int64 from 0; one trajectory by default.
        groups: Prompt of each trajectory, [R], or repeated per step, [N].
        rewards: Reward of each trajectory, [R], or repeated per step, [N].
        old_logp: The student's log-densities of `next_latents` before the first update on this batch, nats, [N].
        extra_views: Velocities of further models by view, such as `base` or `anchor`.

    Returns:
        `TokenLosses`, one row per step; values are float64.

    Raises:
        UserError: The method reads what latents do not have (a vocabulary, text), inputs do not fit, or a step is
            certain.
        SignalError: A velocity or a latent is not finite.

    Example:
        >>> from torch import tensor
        >>> from retort.functional import flow_losses
        >>> losses = flow_losses(
        ...     "flow_opd",
        ...     student_velocity=tensor([[1.0, 0.0]]),
        ...     teacher_velocity=tensor([[0.0, 0.0]]),
        ...     latents=tensor([[0.0, 0.0]]),
        ...     next_latents=tensor([[0.1, 0.2]]),
        ...     sigmas=tensor([0.5]),
        ...     next_sigmas=tensor([0.25]),
        ...     noise_level=0.5,
        ... )
        >>> losses.loss  # (0.25 / 2) * (1 / 0.5 + 0.5 / 2)^2
        tensor(0.6328, dtype=torch.float64)
    """
    if isinstance(method, str):
        method = load(method)
    views = ({} if teacher_velocity is None else {"teacher": teacher_velocity}) | dict(extra_views or {})
    if next_latents.shape != latents.shape:
        raise UserError(f"next_latents must be {tuple(latents.shape)} as latents are, not {tuple(next_latents.shape)}")

    def step(velocity: Tensor) -> flows.DenoisingStep:
        return flows.denoising_step(sampler, velocity, latents, sigmas, next_sigmas, noise_level, sigma_max=sigma_max)

    mean, std_N = step(student_velocity)
    decided_ND = as_compute(next_latents.detach()).flatten(1).to(mean.dtype)
    taught = {name: step(velocity.detach()) for name, velocity in views.items()}
    signals = {
        name: Gaussian.of(mean.flatten(1), std_N, decided_ND, source=name) for name, (mean, std_N) in taught.items()
    }
    policy = GaussianPolicy(mean.flatten(1), std_N, "student")
    return latent_losses(
        method, policy, decided_ND, signals, rollouts=rollouts, groups=groups, rewards=rewards, old_logp=old_logp
    )
