"""Multi-rollout OPD: the teacher is shown what a rollout's siblings got right, and what they got wrong."""

from typing import Literal

from retort.core.reduce import rollout_sums, tokens
from retort.errors import UserError
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.methods._peer_opd import Divergence, Peers, Ratios
from retort.methods._siblings import Teacher, disagreement, who
from retort.methods._siblings import ratios as importance
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan

__all__ = ["Divergence", "Peers", "Ratios", "peer_opd"]


@method(
    paper=Paper(
        title="Multi-Rollout On-Policy Distillation via Peer Successes and Failures",
        authors="Yu, Weichen and Li, Xiaomin and Zhao, Yizhou and Liu, Xiaoze and others",
        year=2026,
        arxiv="2605.12652",
    ),
    status="faithful",
)
def peer_opd(
    *,
    peers: Peers = Peers(),
    divergence: Divergence = Divergence(),
    reduction: Literal["token_mean", "rollout_sums"] = "token_mean",
    teacher: Teacher = "ema",
    update_rate: float = 0.05,
    ratios: Ratios = Ratios(),
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""Distillation towards a teacher that is shown two siblings of a rollout that succeeded and one that failed.

    .. math:: L = \frac{1}{T} \sum_{i,t} D\big(p_S(\cdot | x, y^i_{<t}),\, p_T(\cdot | x, C_i, y^i_{<t})\big), \quad
              C_i = \text{successes} \oplus \text{failures among } y^{j \ne i}

    on the student's k most likely ids and one bucket with all others, in nats. A rollout is never shown to its own
    teacher, though a sibling may have the same text. A rollout with nothing to show is left out, also of T. With one
    success and no failure it is `sdpo`. The paper calls it MOPD, as others call distillation from several teachers.

    Args:
        peers: Siblings that the teacher is shown.
        divergence: D, k and the treatment of the other ids.
        reduction: T: all tokens of the step (code), or with `rollout_sums` all rollouts (the paper's equation). The two
            differ by a factor, the mean length of the step's rollouts.
        teacher: The student's moving average (code; the paper gives no rule), its `trust_region` (frozen and live
            logits mixed by `update_rate`), its first weights, its `live` ones, or an `outside` model.
        update_rate: u; the average moves by it after each optimizer step.
        ratios: Caps on the importance ratios that weigh a token.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of both distributions.

    Departures from the released code: its variants with the peers of other prompts, and with the loss of a token
    replaced by the mean over its paragraph, are not offered. The latter leaves the sum over a rollout as it is, so that
    it changes nothing where the ratios are 1, as in the first update of a batch. The words around what is shown are
    Retort's (`templates`). A `trust_region`, which mixes logits, has the student as it is write summaries.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]] * 4).log(), tensor([[0.9, 0.1]] * 4).log()
        >>> method, given = retort.load("peer_opd", reduction="rollout_sums"), {"rewards": tensor([1.0, 0.0])}
        >>> given |= {"tokens": tensor([0, 0, 0, 0]), "rollouts": tensor([0, 1, 1, 1])}
        >>> losses = token_losses(method, student_logits=student, teacher_logits=teacher, **given)
        >>> losses.loss  # four tokens of 0.1017 over two rollouts; the mean over tokens is 0.1017
        tensor(0.2035)
    """
    if min(peers.successes, peers.failures, peers.summaries) < 0:
        raise UserError("method.successes, method.failures and method.summaries must not be negative")
    if peers.successes == peers.failures == peers.summaries == 0 and peers.feedback == "never":
        raise UserError("method.successes and method.failures are 0 and feedback is never shown: nothing to learn from")
    ratio = importance(ratios.student, ratios.engine)
    view = peers.view(who(teacher, update_rate), temperature)
    loss = disagreement(divergence.kind, divergence.teacher_weight, divergence.top_k, divergence.tail)
    denominator = tokens() if reduction == "token_mean" else rollout_sums()
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={"teacher": view},
        temperature=temperature,
        terms=(Term("distillation", loss, weight=ratio, denominator=denominator),),
        limits=(
            Limit({"successes": 1, "failures": 0, "thoughts": False}, equals=("sdpo", {})),
            Limit({"top_k": None, "ratio_cap": None}, equals=("gkd", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 4096, "max_prompt_tokens": 2048, "max_view_tokens": 10240},
            "optimizer": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 10, "updates": 1},
            "eval": {"samples": 8},
        },
        watch=(
            Watch("reverse_kl", sampled_reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            *([] if ratio is None else [Watch("importance", ratio)]),
        ),
    )
