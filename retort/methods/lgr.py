"""LGR: a reward for tokens after which the teacher knows how to go on."""

from retort.advantages.lookahead import log_ratio_and_lookahead, lookahead_reward, looked_at
from retort.estimators import score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Your Teacher Can't Help You Here: Combating Supervision Fidelity Decay in On-Policy Distillation",
        authors="Liu, Yanjiang and Lou, Jie and Guan, Xinyan and Ji, Yuqiu and Lin, Hongyu and He, Ben and "
        "Han, Xianpei and Sun, Le and Yu, Xing and Lu, Yaojie",
        year=2026,
        arxiv="2605.30833",
    ),
    status="partial",
)
def lgr(
    *,
    coef: float = 1.0,
    top_k: int = 8,
    entropy_threshold: Unbounded = 0.2,
    clip: float | None = None,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Sampled reverse KL, and where the student is uncertain a reward for tokens after which the teacher is sure.

    .. math:: A_t = \log\frac{p_T(y_t)}{p_{old}(y_t)} + \gamma\,[H(p_S) > \tau]\,\frac{c_{y_t} - \bar c}{s_c + 10^{-6}},
              \quad c_v = \max_w p_T(w \mid x, y_{<t}, v)

    The teacher reads each of the student's k most likely ids in place of the token, and c is its largest probability
    one token later; mean and deviation are over the k. The policy gradient is in nats (the reward has no unit), divided
    by all counted tokens. The longer a student's own text, the less sure a teacher becomes of what follows, and the
    less its word is worth; the reward leads back to where it can help.

    Each token above the threshold costs k further positions of the teacher. A completion is read once, and all of its
    candidates beside it in the same row, where the model can do that; what that costs is measured in
    docs/performance.md. A teacher in this process or behind `retort serve` can be asked so (a server reads every branch
    from its beginning); servers of completions cannot.

    Args:
        coef: gamma; the paper has 1 to 1.5 (0.1 does nothing, 10 repeats tokens). 0 is `opd`.
        top_k: k, at least 2.
        entropy_threshold: tau, nats, against the student's entropy; strictly greater looks ahead. With the paper's 0.2
            it looks at 15 to 25 % of its tokens early and 10 % later. Infinity is `opd`.
        clip: PPO's epsilon on the ratio to the student before the batch; null for none.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Formula and settings are from notes on the full text and its appendix. Departures: a token outside of the k has no
    reward (the paper asks the teacher after whatever was sampled), and the deviation is that of the population, which
    the notes do not say. After a token that ends the completion the teacher is asked as after any other.

    Example:
        >>> from retort.core.signals import Ahead, Dense
        >>> logits, tokens = tensor([[0.4, 0.4, 0.2]] * 2).log(), tensor([0, 1])
        >>> sure = tensor([[0.9, 0.3]] * 2)  # after ids 0 and 1
        >>> teacher = Ahead.beside(Dense.of(logits, tokens), tensor([[0, 1]] * 2), sure)
        >>> method = retort.load("lgr", top_k=2)
        >>> losses = token_losses(method, student_logits=logits, teacher_logits=teacher, tokens=tokens)
        >>> losses.terms["reverse"].value  # a deviation above and below the mean, at an entropy of 1.05 nats
        tensor([-1.0000,  1.0000])
    """
    score = score_function(log_ratio_and_lookahead(coef, top_k, entropy_threshold), clip=clip)
    watch = (
        Watch("reverse_kl", sampled_reverse_kl()),
        Watch("student_entropy", student_entropy()),
        Watch("teacher_entropy", teacher_entropy()),
        Watch("clip_fraction", score.clipped("reverse")),
    )
    if coef != 0.0:
        looked, reward = looked_at(top_k, entropy_threshold), lookahead_reward(top_k, entropy_threshold)
        watch = (*watch, Watch("looked_ahead", looked), Watch("lookahead_reward", reward))
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        terms=(Term("reverse", score),),
        limits=(
            Limit({"coef": 0.0}, equals=("opd", {})),
            Limit({"entropy_threshold": float("inf")}, equals=("opd", {})),
        ),
        recipe={"optimizer": {"updates": 1}},
        watch=watch,
    )
