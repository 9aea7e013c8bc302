"""ROPD: a rubric, drawn from the texts of a teacher that only talks, by which a judge grades the student's."""

from typing import Literal

from retort.advantages import group_advantage
from retort.core.grading import RubricPlan
from retort.core.reduce import rollout_means, tokens
from retort.divergences import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View
from retort.weights import truncated_rollout_ratio


@method(
    paper=Paper(
        title="Rubric-based On-policy Distillation",
        authors="Fang and Hong and Zheng and Song and Li and Jiang and Zhang and Guo and Wang and Chua",
        year=2026,
        arxiv="2605.07396",
    ),
    status="faithful",
)
def ropd(
    *,
    normalisation: Literal["none", "population", "sample"] = "none",
    reduction: Literal["tokens", "rollouts"] = "tokens",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    truncation: float | None = 2.0,
    kl_coef: float = 0.0,
    rubric: RubricPlan = RubricPlan(),
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""GRPO on the share of a rubric's points that each completion earns; the teacher gives texts, and no log-probs.

    .. math:: r_i = \frac{\sum_k a_k v_{i,k}}{\sum_k a_k + \epsilon}, \quad A_i = r_i - \bar r, \quad
              v_{i,k} \in \{0, 1\},\ a_k \in \{1, \dots, 5\}

    in PPO's clipped loss, the same advantage at all tokens of a completion, with a truncated importance ratio of
    trainer to rollout engine. For each prompt a model that talks (`judge.model`) draws one rubric of 4 to 12 criteria
    from the answers of the teacher and of the student, and then decides for every answer which criteria hold. It sees
    all answers in random order and not whose they are. The teacher's scores are recorded, not learnt from. A group
    without a usable verdict has reward 0 throughout, and so no advantage.

    Args:
        normalisation: What an advantage is divided by: nothing (the code), or the deviation of the group's rewards, of
            the population (the paper) or of a sample.
        reduction: `tokens`: all tokens count alike (the code). `rollouts`: the mean over completions of the mean over
            their tokens (the paper).
        clip_low: PPO's epsilon below 1; null for no clip, then on neither side.
        clip_high: PPO's epsilon above 1.
        truncation: Largest importance ratio of trainer to rollout engine; null for no correction.
        kl_coef: beta of the reverse KL to the student as it was before training, over the whole vocabulary, nats; 0:
            none, and no second model (the code). The paper has such a term and does not say how large.
        rubric: What the judge is asked.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of the student's distribution.

    Departures: the prompts are Retort's (`templates.rubric`, `templates.verdicts`). The rubricator is not asked for the
    pass rate that it expects. `max_fallback_rate`, which the released code has and does not use, stops the run. The
    paper's table has a teacher at temperature 0, whose answers would all be one; here it is 1.

    Example:
        >>> student, given = tensor([[0.5, 0.5]] * 2).log(), {"tokens": tensor([0, 1])}
        >>> given |= {"rollouts": tensor([0, 1]), "groups": tensor([0, 0]), "rewards": tensor([17 / 22, 5 / 22])}
        >>> losses = token_losses("ropd", student_logits=student, **given)
        >>> losses.terms["rubric"].value  # minus the distance from the group's mean of 1/2
        tensor([-0.2727,  0.2727])
    """
    if (clip_low is None) != (clip_high is None):
        raise UserError("method.clip_low and method.clip_high: give both, or null for both")
    if kl_coef < 0:
        raise UserError(f"method.kl_coef must not be negative, but is {kl_coef:g}")
    advantage = group_advantage(std=normalisation != "none", population=normalisation == "population")
    score = score_function(advantage, clip=None if clip_low is None or clip_high is None else (clip_low, clip_high))
    weight = None if truncation is None else truncated_rollout_ratio(truncation)
    over = rollout_means() if reduction == "rollouts" else tokens()
    view = "base" if kl_coef else "teacher"  # the one that there is: a reward needs nothing of it
    terms = (Term("rubric", score, view, weight=weight, denominator=over),)
    if kl_coef:
        terms += (Term("reference", pathwise(reverse_kl()), "base", coef=kl_coef, denominator=over),)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"base": View.base()} if kl_coef else {},
        temperature=temperature,
        terms=terms,
        grading=rubric,
        limits=(Limit({"normalisation": "sample", "clip_high": 0.28, "truncation": None}, ("rlsd", {"share": 0.0})),),
        recipe={
            "rollout": {"prompts": 32, "max_prompt_tokens": 2048, "max_new_tokens": 8192},
            "optimizer": {"learning_rate": 1e-6, "schedule": "constant", "updates": 4},
            "eval": {"samples": 16, "temperature": 1.0, "top_p": 0.95},
            "steps": 500,
        },
        watch=(
            Watch("student_entropy", student_entropy(), against=view),
            Watch("clip_fraction", score.clipped("rubric"), against=view),
        ),
    )
