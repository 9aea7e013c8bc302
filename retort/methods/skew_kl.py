"""DistiLLM: skewed KL divergences."""

from typing import Literal

from retort.controllers.off_policy import adaptive_share
from retort.divergences import reverse_kl, skew_forward_kl, skew_reverse_kl
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import Replay, RolloutPlan


@method(
    paper=Paper(
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        authors="Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
        year=2024,
        arxiv="2402.03898",
        venue="ICML 2024",
    ),
    status="faithful",
)
def skew_kl(
    *,
    direction: Literal["forward", "reverse"] = "forward",
    skew: float = 0.1,
    on_policy_fraction: float | Literal["adaptive"] = "adaptive",
    validate_every: int = 100,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""KL to a mixture of both distributions: bounded, and with gradients that stay small where the two are far apart.

    .. math:: D_{KL}(p_T \Vert a\,p_T + (1-a)\,p_S) \quad \text{or} \quad D_{KL}(p_S \Vert (1-a)\,p_T + a\,p_S)

    The divergence is over the whole vocabulary, in nats, and at most -ln a. It is divided by all counted tokens.

    Args:
        direction: Skewed forward or skewed reverse KL.
        skew: a, 0 <= a < 1. At 0 it is the plain KL.
        on_policy_fraction: Share of prompts with student rollouts; the data's `response` serves the others: `adaptive`
            begins at 0 and rises by a tenth whenever the likelihood of held-out responses has become worse by 0.1 nats,
            and old rollouts are used again more and more, 1,000 of them; or a fixed share, with all rollouts new.
        validate_every: Steps between the validations of `adaptive`; the released code's is an epoch.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.

    Departures from the released code: validation is every so many steps and not every epoch; the teacher's (constant)
    entropy, which it leaves out of the value, is in it (the gradient is the same).

    Example:
        >>> student, teacher = tensor([[1.0, 0.0]]).log(), tensor([[0.0, 1.0]]).log()
        >>> losses = token_losses("skew_kl", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # -ln 0.1, its largest value: the plain forward KL would be infinite
        tensor(2.3026)
    """
    chosen = skew_forward_kl(skew) if direction == "forward" else skew_reverse_kl(skew)
    adaptive = adaptive_share(every=validate_every)
    if on_policy_fraction == "adaptive":
        plan = RolloutPlan(
            samples=samples, temperature=temperature, on_policy_fraction=adaptive.read("share"), replay=Replay()
        )
    else:
        plan = RolloutPlan(samples=samples, temperature=temperature, on_policy_fraction=on_policy_fraction)
    return Method(
        rollout=plan,
        controllers=(adaptive,) if on_policy_fraction == "adaptive" else (),
        terms=(Term("divergence", pathwise(chosen)),),
        limits=(
            Limit({"skew": 0.0}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"skew": 0.0, "direction": "reverse"}, equals=("gkd", {"divergence": "reverse_kl"})),
        ),
        recipe={
            "optimizer": {"learning_rate": 5e-4, "schedule": "cosine", "weight_decay": 0.01},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
