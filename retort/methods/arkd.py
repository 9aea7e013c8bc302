"""ARKD: a small policy, taught by reward as the run goes, sets the balance of forward and reverse KL."""

from typing import Literal

from retort.controllers.balance import balance
from retort.core.schedules import ScalarOrSchedule, line
from retort.divergences import forward_kl, reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan

Mode = Literal["bandit", "bernoulli", "paper", "greedy_min", "static", "linear_to_reverse", "linear_to_forward"]


@method(
    paper=Paper(
        title="ARKD: Adaptive Reinforcement Learning-Guided Bidirectional KL Divergence Distillation for Text "
        "Generation",
        authors="Liu and Zhang and Xing and Qiao and Wang and Jiao",
        year=2026,
        arxiv="2606.29869",
    ),
    status="reconstructed",
)
def arkd(
    *,
    mode: Mode = "bandit",
    forward_weight: float = 0.5,
    policy_learning_rate: float = 1e-4,
    baseline_decay: float = 0.99,
    entropy_coef: float = 0.01,
    on_policy_fraction: float = 0.0,
    loss_temperature: float = 2.0,
    samples: int = 1,
) -> Method:
    r"""Forward and reverse KL in a balance that a policy network learns during the run.

    .. math:: L = v\,D_{KL}(p_T \Vert p_S) + (1-v)\,D_{KL}(p_S \Vert p_T), \quad v = \pi_\phi(s) \in (0, 1)

    Both KLs are over the whole vocabulary, at the loss temperature, in nats, and divided by all counted tokens. v is
    one number per batch and takes no gradient from the loss. The state s holds six means over the batch before its
    first update: both entropies, the variance over the vocabulary of both models' probabilities, and both KLs. The
    policy is LayerNorm(6), Linear 6-64, ReLU, Linear 64-1 (525 parameters), with an Adam of its own.

    The published update is no policy gradient: v is the network's output and not a draw, so :math:`-A \log v` raises v
    whenever the reward is above its running mean, whichever KL is the larger; and its reward, minus the loss, contains
    v. `bandit` repairs both and is *ours*: the logit of v is drawn from a normal distribution around the network's
    output, and the reward is by how much the update lowered the Jensen-Shannon divergence on the same tokens, a measure
    that v is no part of. REINFORCE with a running mean as baseline, the advantage divided by its running size.

    Args:
        mode: `bandit`; `bernoulli`, the same with v drawn as 0 or 1 (as the authors' code skeleton draws it);
            `paper`, the published update, for study; the paper's baselines `greedy_min` (1 where forward KL is the
            smaller), `static`, `linear_to_reverse` (v from 1 to 0) and `linear_to_forward`.
        forward_weight: v of `static`; no other mode uses it.
        policy_learning_rate: Learning rate of the policy's Adam.
        baseline_decay: gamma of the running mean of rewards, which starts at the first one (reconstructed).
        entropy_coef: beta_H, weight of the policy's entropy, nats.
        on_policy_fraction: Share of prompts with student rollouts. The paper learns from the data's responses only, so
            the data needs a `response` column; 1 makes it on-policy.
        loss_temperature: Temperature of both distributions. No squared temperature multiplies the loss (the paper does
            not say).
        samples: Rollouts per prompt, where the student generates.

    Departures from the paper, besides the default mode: its language-model loss on a separate corpus (weight 0.1;
    which corpus is not named) is left out. Reconstructed: the variance, the division by tokens; in `bandit` and
    `bernoulli` running normalisation of s and a policy that begins undecided; in `bandit` the spread of its draw
    (learnt, 0.5 at first). Not taken from the skeleton: its ROUGE reward on a validation set.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.9, 0.1]]).log()
        >>> method = retort.load("arkd", mode="greedy_min", loss_temperature=1.0)
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # the forward KL, 0.9 ln 1.8 + 0.1 ln 0.2, because the reverse KL is larger (0.5108)
        tensor(0.3681)
    """
    if not 0 <= forward_weight <= 1:
        raise UserError(f"forward_weight must lie in [0, 1], not {forward_weight}")
    policy = None
    forward: ScalarOrSchedule = forward_weight
    reverse: ScalarOrSchedule = 1.0 - forward_weight
    if mode in ("linear_to_reverse", "linear_to_forward"):
        ends = (1.0, 0.0) if mode == "linear_to_reverse" else (0.0, 1.0)
        forward, reverse = line(*ends), line(*ends[::-1])
    elif mode != "static":
        policy = balance(
            mode, learning_rate=policy_learning_rate, baseline_decay=baseline_decay, entropy_coef=entropy_coef
        )
        forward, reverse = policy.read("forward"), policy.read("reverse")
    forward_only = {"mode": "static", "forward_weight": 1.0, "loss_temperature": 1.0}
    return Method(
        rollout=RolloutPlan(samples=samples, on_policy_fraction=on_policy_fraction),
        temperature=loss_temperature,
        terms=(
            Term("forward", pathwise(forward_kl()), coef=forward),
            Term("reverse", pathwise(reverse_kl()), coef=reverse),
        ),
        controllers=(policy,) if policy else (),
        limits=(
            Limit(forward_only, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({**forward_only, "forward_weight": 0.0}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({**forward_only, "forward_weight": 0.3}, equals=("decoupled_kl", {"reverse_weight": 0.7})),
        ),
        recipe={
            "rollout": {"prompts": 16, "max_new_tokens": 512},
            "optimizer": {"learning_rate": 5e-5, "schedule": "constant", "updates": 1, "grad_clip": 1.0},
            "eval": {"samples": 5, "top_p": 0.9, "max_new_tokens": 256},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("forward_kl", forward_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
