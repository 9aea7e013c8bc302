"""Multi-rollout OPD: the teacher is shown what a rollout's siblings got right, and what they got wrong."""

from typing import Literal

from retort.core.reduce import rollout_sums, tokens
from retort.divergences import Tail
from retort.errors import UserError
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.methods._siblings import Divergence, Teacher, disagreement, ratios, who
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.views import peers


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
    successes: int = 2,
    failures: int = 1,
    failure_when: Literal["always", "without_success"] = "always",
    threshold: float = 0.5,
    feedback: Literal["never", "without_success", "always"] = "without_success",
    thoughts: bool = True,
    choice: Literal["graded", "random"] = "graded",
    divergence: Divergence = "jsd",
    teacher_weight: float = 0.5,
    top_k: int | None = 100,
    tail: Tail = "bucket",
    reduction: Literal["token_mean", "rollout_sums"] = "token_mean",
    teacher: Teacher = "ema",
    update_rate: float = 0.05,
    ratio_cap: Unbounded | None = 2.0,
    truncation: Unbounded | None = 2.0,
    samples: int = 8,
    temperature: float = 1.0,
) -> Method:
    r"""Distillation towards a teacher that is shown two siblings of a rollout that succeeded and one that failed.

    .. math:: L = \frac{1}{T} \sum_{i,t} D\big(p_S(\cdot | x, y^i_{<t}),\, p_T(\cdot | x, C_i, y^i_{<t})\big), \quad
              C_i = \text{successes} \oplus \text{failures among } y^{j \ne i}

    on the student's k most likely ids and one bucket with all others, nats. A rollout is never shown to its own
    teacher, though a sibling may have written the same. One with nothing to show is left out, also of T. With one
    success and no failure it is `sdpo`. The paper calls it MOPD, as others call distillation from several teachers.

    Args:
        successes: How many, the first ones of the group; fewer where there are fewer.
        failures: How many, drawn at random. (0: the paper's positive-only variant.)
        failure_when: `always`, or only where no success is shown.
        threshold: Reward from which on a rollout is a success. The paper gives none; the code has 0.5 and 1.
        feedback: When the verifier's words on the rollout are shown (code; the paper speaks of peers only).
        thoughts: Whether a sibling's `<think>` block is shown, too.
        choice: `random` is the paper's control: as many siblings in the same words, whatever their rewards.
        divergence: D: the paper takes `reverse_kl` for mathematics, `jsd` for all else.
        teacher_weight: Of `jsd`, strictly between 0 and 1.
        top_k: k; null for the whole vocabulary.
        tail: `bucket` (code; not in the paper), or both sides `renormalised` on the k ids.
        reduction: T: all tokens of the step (code), or with `rollout_sums` all rollouts (the paper's equation). The two
            differ by a factor, the mean length of the step's rollouts.
        teacher: The student's moving average (code; the paper gives no rule), its `trust_region` (frozen and live
            logits mixed by `update_rate`), its first weights, its `live` ones, or an `outside` model.
        update_rate: u; the average moves by it after each optimizer step.
        ratio_cap: Cap on the detached ratio to the student before the batch (code; the paper has none, and with one
            update per batch it is 1); null for no ratio.
        truncation: Cap on the importance ratio of trainer to rollout engine (code); null for none.
        samples: Rollouts per prompt.
        temperature: Of sampling and of both distributions.

    Departures from the released code: its variants with one-sentence summaries of siblings, with the peers of other
    prompts, and with the loss averaged over paragraphs (which changes nothing where the ratios are 1) are not offered;
    the words around what is shown are Retort's (`templates`).
    """
    if successes < 0 or failures < 0:
        raise UserError("method.successes and method.failures must not be negative")
    if successes == failures == 0 and feedback == "never":
        raise UserError("method.successes and method.failures are 0 and feedback is never shown: nothing to learn from")
    ratio = ratios(ratio_cap, truncation)
    view = peers(
        successes=successes,
        failures=failures,
        threshold=threshold,
        feedback=feedback,
        failure_when=failure_when,
        thoughts=thoughts,
        choice=choice,
        **who(teacher, update_rate),
    )
    loss = disagreement(divergence, teacher_weight, top_k, tail)
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
