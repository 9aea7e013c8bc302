"""TCOD: a horizon of turns that grows with the run, from the front of an episode or from its end."""

from typing import Literal

from retort.advantages import log_ratio
from retort.core.reduce import tokens, turn_means
from retort.divergences import forward_kl
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy
from retort.rollout.plan import RolloutPlan, TurnCurriculum


@method(
    paper=Paper(
        title="TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents",
        authors="Wang, Jiaqi and Zhang, Wenhao and Shi, Weijie and Li, Yaliang and Cheng, James",
        year=2026,
        arxiv="2604.24005",
        venue="COLM 2026",
    ),
    status="faithful",
)
def tcod(
    *,
    curriculum: Literal["forward", "backward"] | None = "forward",
    start: int = 1,
    every: int = 2,
    kl: Literal["sampled", "forward"] = "sampled",
    coef: float = 1.0,
    clip: float | None = 0.2,
    reduction: Literal["tokens", "turns"] = "tokens",
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""OPD in episodes of many turns, at first of few turns, and of one more every so many batches.

    .. math:: k(n) = \min\big(k_{start} + \lfloor n / \eta \rfloor,\ T\big), \quad
              A_t = c\,[\log p_T(y_t) - \log p_{old}(y_t)]

    in PPO's clipped loss. Small agents drift from the teacher turn by turn; a horizon of turns keeps them where the
    teacher knows its way until they do, too. `forward`: the student plays the first k turns, and T is the most turns of
    an episode. `backward`: an expert's way of L turns is played up to its last k, without loss and without a token of
    either model, and the student goes on from there to the end; T is L. With the whole horizon both are OPD. Evaluation
    always plays whole episodes.

    Args:
        curriculum: Which turns the student plays; `backward` needs an environment with an expert. Null: all.
        start: k at the first batch, turns.
        every: eta, batches from one further turn to the next.
        kl: `sampled`: the sampled reverse KL (the released code, whose curves the paper shows). `forward`: the forward
            KL over the whole vocabulary, which the paper writes.
        coef: c, dimensionless.
        clip: PPO's epsilon on both sides, of `sampled`; null for none.
        reduction: `tokens`: all tokens count alike. `turns`: the mean over turns of the mean over their tokens, which
            the released code takes in some settings, to keep turns from getting shorter.
        samples: Episodes per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures: an episode is one growing conversation, where the released code renders each turn anew with the last two
    pairs of observation and action, as `rollout.history=2` does; its asynchronous replay is left out.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 3).log(), tensor([[0.8, 0.2]] * 3).log()
        >>> given = {"tokens": tensor([0, 1, 1]), "turns": tensor([0, 1, 1])}
        >>> method = retort.load("tcod", reduction="turns")
        >>> token_losses(method, student_logits=student, teacher_logits=teacher, **given).loss  # (-0.47 + 0.916) / 2
        tensor(0.2231)
    """
    score = score_function(log_ratio(), clip=clip)
    divided = tokens() if reduction == "tokens" else turn_means()
    term = Term("reverse", score, coef=coef, denominator=divided)
    if kl == "forward":
        term = Term("forward", pathwise(forward_kl()), coef=coef, denominator=divided)
    plan = None if curriculum is None else TurnCurriculum(curriculum, start, every)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, curriculum=plan),
        temperature=temperature,
        terms=(term,),
        limits=(
            Limit({"curriculum": None}, equals=("opd", {"clip": 0.2})),
            Limit({"curriculum": None, "kl": "forward"}, equals=("gkd", {"divergence": "forward_kl"})),
        ),
        recipe={
            "rollout": {"prompts": 16, "max_prompt_tokens": 10240, "max_new_tokens": 512},
            "optimizer": {"learning_rate": 1e-6, "grad_clip": 1.0},
            "eval": {"temperature": 0.4},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            *((Watch("clip_fraction", score.clipped("reverse")),) if kl == "sampled" else ()),
        ),
    )
