"""ATOD: turns on which the models differ or the student is unsure count for more; the teacher gives way to rewards."""

from typing import Literal

from retort.advantages import Summand, advantage_sum, group_advantage, log_ratio
from retort.core.reduce import rollout_means, tokens
from retort.core.schedules import Schedule
from retort.errors import UserError
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights.turns import TurnGaps


@method(
    paper=Paper(
        title="ATOD: Annealed Turn-aware On-policy Distillation for Multi-turn Autonomous Agents",
        authors="Tan and Zong and Li and Chen and others",
        year=2026,
        arxiv="2606.27814",
    ),
    status="partial",
)
def atod(
    *,
    coef_start: float = 1.0,
    coef_end: float = 0.1,
    outcome_start: float = 1.0,
    outcome_end: float = 2.0,
    anneal_steps: int = 80,
    weighting: Literal["turns", "none"] = "turns",
    clip: float | None = 0.2,
    reduction: Literal["rollouts", "tokens"] = "rollouts",
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL with a weight by turn, and the group's reward; the one fades while the other grows.

    .. math:: A_t = \kappa(s)\,a_{k(t)}\,[\log p_T(y_t) - \log p_{old}(y_t)] + \rho(s)\,A^{GRPO}, \quad
              a_k = 1 - (1 - \tilde d_k)(1 - \tilde h_k)

    in PPO's clipped loss. Over the tokens of a turn, d is the mean of :math:`|\log p_T - \log p_{old}|` and h that of
    :math:`-\log p_{old}`, both in nats and moved to [0, 1] by their least and largest value in the rollout (0.5 where
    these are equal, so that a single turn has weight 0.75). The weight is the teacher's term's alone. kappa and rho
    move in straight lines over the first batches and then stay. The loss is the mean over rollouts of the mean over
    their tokens.

    Args:
        coef_start: kappa at the first batch, dimensionless.
        coef_end: kappa from `anneal_steps` on; above 0 the teacher stays an anchor.
        outcome_start: rho at the first batch.
        outcome_end: rho from `anneal_steps` on. With both 0 no rewards are needed.
        anneal_steps: Batches over which both move.
        weighting: `none`: a is 1.
        clip: PPO's epsilon on both sides; null for none. The paper gives only the symbol.
        reduction: `tokens`: all tokens count alike. The paper's equations have the one, its algorithm the other.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Reconstructed: the clip, the deviation of the reward's advantage (that of a sample, plus 1e-6) and the reduction. Of
    two turns one has weight 0 wherever it is the lower one in both numbers.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 3).log(), tensor([[0.5, 0.5], [0.1, 0.9], [0.4, 0.6]]).log()
        >>> given = {"tokens": tensor([0, 0, 0]), "turns": tensor([0, 1, 2])}
        >>> method = retort.load("atod", outcome_start=0.0, outcome_end=0.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.terms["distillation"].weight  # h is the same in all turns, which counts as 0.5
        tensor([0.5000, 1.0000, 0.5693])
    """
    if anneal_steps < 1:
        raise UserError(f"method.anneal_steps must be at least 1, not {anneal_steps}")
    teaching, grading = (coef_start, coef_end) != (0, 0), (outcome_start, outcome_end) != (0, 0)
    if not teaching and not grading:
        raise UserError("method: coef_start, coef_end, outcome_start and outcome_end are all 0, so nothing is learnt")
    turns = TurnGaps()
    weight = turns.gap_or_surprise() if weighting == "turns" else None
    taught = Summand(log_ratio(), _moving(coef_start, coef_end, anneal_steps), weight)
    graded = Summand(group_advantage(), _moving(outcome_start, outcome_end, anneal_steps))
    both = advantage_sum(taught, graded) if teaching and grading else None
    divided = (rollout_means if reduction == "rollouts" else tokens)()

    def term(name: str, summand: Summand) -> Term:
        score = score_function(summand.advantage, clip=clip, clip_by=both)
        return Term(name, score, weight=summand.weight, coef=summand.coef, denominator=divided)

    named = (("distillation", taught, teaching), ("outcome", graded, grading))
    terms = tuple(term(name, summand) for name, summand, wanted in named if wanted)
    alone = {"weighting": "none", "reduction": "tokens"}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=terms,
        limits=(
            Limit({**alone, "outcome_start": 0.0, "outcome_end": 0.0}, equals=("opd", {"clip": 0.2})),
            Limit(
                {**alone, "coef_start": 0.0, "coef_end": 0.0},
                equals=("rlsd", {"share": 0.0, "clip_low": 0.2, "clip_high": 0.2}),
            ),
        ),
        recipe={
            "rollout": {"prompts": 16, "max_prompt_tokens": 2048, "max_new_tokens": 512},
            "optimizer": {"learning_rate": 1e-6, "updates": 1},
            "eval": {"temperature": 0.4},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("turn_gap", turns.gap()),
            Watch("turn_surprise", turns.surprise()),
            *((Watch("turn_weight", weight),) if weight is not None else ()),
            Watch("clip_fraction", terms[0].estimator.clipped(terms[0].name)),  # type: ignore[attr-defined]
        ),
    )


def _moving(start: float, end: float, steps: int) -> Schedule:
    """A straight line from `start` at the first batch to `end` after so many, and `end` from there on."""
    return lambda step, _: start + (end - start) * min(1.0, step / steps)
