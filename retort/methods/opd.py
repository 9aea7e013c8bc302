"""On-policy distillation: the sampled reverse KL."""

from typing import Literal

from retort.advantages import log_ratio
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights import effective_sample_size, engine_correction


@method(
    paper=Paper(
        title="On-Policy Distillation",
        authors="Lu, Kevin and {Thinking Machines Lab}",
        year=2025,
        url="https://thinkingmachines.ai/blog/on-policy-distillation/",
    ),
    status="faithful",
)
def opd(
    *,
    coef: float = 1.0,
    clip: float | None = None,
    correction: Literal["token", "token_mask", "sequence", "sequence_mask", "geometric"] | None = None,
    correction_low: float | None = None,
    correction_high: Unbounded | None = None,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL: the log-ratio of the generated token is its advantage.

    .. math:: \ell_t = -\rho_t A_t, \quad A_t = \log p_T(y_t) - \log p_{old}(y_t),
              \quad \rho_t = p_S(y_t) / p_{old}(y_t)

    In expectation over the student's tokens, and with one update per batch, its gradient is that of the reverse KL
    :math:`D_{KL}(p_S \Vert p_T)` at each prefix. The loss is in nats and divided by all counted tokens.

    From a teacher with another tokenizer, y is a unit: the shortest run of tokens that both tokenizations bound. The
    ratio is the product over its tokens, the log-ratio is of their sums, and the value is at its first token. For units
    that are given, the gradient is exactly that of the reverse KL of the text in units. Approximate are that a text
    counts in the one tokenization that was generated, not in all of them, and that a tokenizer looks ahead, so where a
    unit ends may depend on later text.

    Args:
        coef: Weight of the term (`kl_penalty_coef`), dimensionless.
        clip: PPO's epsilon on the ratio; the recipe has none.
        correction: Weight by the trainer's probability over the rollout engine's, where the two are not the same
            program: `token` (truncated), `token_mask` (IcePop), `sequence` (its product, truncated), `sequence_mask`
            (or left out), `geometric` (the rollout is left out unless its mean ratio is near 1). Null: none. The
            denominator counts what is left out.
        correction_low: Bound from below of `token_mask` (null: 0.5) and `geometric` (0.999).
        correction_high: Bound from above: null for 2, of `token_mask` 5, of `geometric` 1.001.
        samples: Rollouts per prompt. The recipe has 4; its published code subtracts no mean over them.
        temperature: Temperature of sampling and of both distributions.

    Departures from the recipe: the ratio and the advantage are against the trainer's own log-probs before the first
    update on the batch, where the recipe takes the sampler's; the discounted future sum (its default is none) is not
    offered.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.8, 0.2]]).log()
        >>> losses = token_losses("opd", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # -(ln 0.8 - ln 0.5): the teacher gives the token more than the student does
        tensor(-0.4700)
    """
    if correction is None and (correction_low is not None or correction_high is not None):
        raise UserError("method.correction_low and correction_high bound a correction; name one in method.correction")
    weight = None
    if correction is not None:
        weight = engine_correction(correction, low=correction_low, high=correction_high)
    watched: tuple[Watch, ...] = ()
    if weight is not None:
        watched = (Watch("importance", weight), Watch("ess", weight, summed_up=effective_sample_size))
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("reverse", score := score_function(log_ratio(), clip=clip), weight=weight, coef=coef),),
        limits=(Limit({"correction": "token"}, equals=("opd", {})),),
        recipe={
            "rollout": {"prompts": 512, "max_new_tokens": 16384},
            "optimizer": {"learning_rate": 5e-5, "schedule": "constant", "updates": 1},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("clip_fraction", score.clipped("reverse")),
            *watched,
        ),
    )
