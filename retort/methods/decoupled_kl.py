"""Prefixes and the direction of the KL, chosen separately; with KL mixing and a length curriculum."""

from typing import Literal

from retort.advantages import log_ratio
from retort.controllers.lengths import length_stages
from retort.divergences import forward_kl, negative_log_likelihood, reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.method import Limit, Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan


@method(
    paper=Paper(
        title="Decoupling KL and Trajectories: A Unified Perspective for SFT, DAgger, Offline RL, and OPD in LLM "
        "Distillation",
        authors="Zhao and Xin and Fan and Tong and Li and Shen",
        year=2026,
        arxiv="2605.16826",
    ),
    status="partial",
)
def decoupled_kl(
    *,
    prefix: Literal["student", "teacher", "dataset"] = "student",
    reverse_weight: float = 0.2,
    estimator: Literal["exact", "sampled"] = "exact",
    lengths: tuple[int, ...] | None = None,
    min_entropy: Unbounded | None = None,
    entropy_share: float = 0.5,
    on_failure: Literal["hold", "terminate"] = "hold",
    probe_every: int = 30,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 0.95,
) -> Method:
    r"""Prefixes of student or teacher, forward or reverse KL or a mix of both, and completions that grow in stages.

    .. math:: L = \lambda\,D_{KL}(p_S \Vert p_T) + (1-\lambda)\,D_{KL}(p_T \Vert p_S), \quad
              \text{at prefixes } c_t \sim d_S \text{ or } d_T

    KLs are over the whole vocabulary, in nats, divided by all counted tokens; prefixes take no gradient. The corners
    are soft-label SFT (teacher, forward), offline-RL style (teacher, reverse), DAgger style (student, forward) and OPD
    (student, reverse).

    Args:
        prefix: Source of the completions. `teacher` generates one for every prompt, which is used whenever the run
            returns to it; `dataset` takes the column `response`.
        reverse_weight: lambda (Eq. 4), from 0 to 1. The paper recommends "forward-heavy" without a number; 0.2 is the
            only such mix it tried (reconstructed). It tried mixes on student prefixes only.
        estimator: `exact`; or `sampled`, from the generated token alone: the score function for reverse KL on student
            prefixes, the likelihood for forward KL on others (appendix D). Mixes and the other two cells have none. Its
            gradient is unbiased at `top_p` 1 only: set that.
        lengths: Longest completions L_0 < L_1 < ... of the curriculum (section 5.2), tokens; null for none. The paper
            gives no ladder; it studied 128 and 4096, and to double from the one to the other is our suggestion.
        min_entropy: H_min, nats: a stage is left only if the student's entropy on held-out prompts is at least that.
            The paper gives no number. Null: `entropy_share` of the entropy at the first probe.
        entropy_share: Share for `min_entropy` = null (reconstructed).
        on_failure: At the first failure, `hold` stays at its length, `terminate` ends the run; the paper allows both.
        probe_every: Batches between probes (reconstructed: at each of the paper's evaluations).
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.
        top_p: Top-p of sampling. 0.95 is the paper's for teacher prefixes; for student prefixes it says nothing.

    Departures: the paper also cuts teacher rollouts to the top 20 ids, and keeps the teacher's logits (here made anew);
    it writes a sum (the authors' related trainer divides); probes are made on prompts kept out of the training data.

    Example:
        >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[0.9, 0.1]]).log()
        >>> losses = token_losses("decoupled_kl", student_logits=student, teacher_logits=teacher, tokens=tensor([0]))
        >>> losses.loss  # 0.2 of the reverse KL, 0.5108, and 0.8 of the forward KL, 0.3681
        tensor(0.3966)
    """
    if not 0 <= reverse_weight <= 1:
        raise UserError(f"reverse_weight must lie in [0, 1], not {reverse_weight}")
    reverse, forward = pathwise(reverse_kl()), pathwise(forward_kl())
    if estimator == "sampled":
        if reverse_weight != (1.0 if prefix == "student" else 0.0):
            raise UserError(
                "estimator=sampled takes reverse_weight=1 with prefix=student, or reverse_weight=0 with another "
                "prefix: the generated token is a sample of nothing else"
            )
        reverse, forward = score_function(log_ratio()), pathwise(negative_log_likelihood())
    stages = None
    if lengths is not None:
        stages = length_stages(
            lengths, min_entropy=min_entropy, share=entropy_share, on_failure=on_failure, every=probe_every
        )
    terms = (Term("reverse", reverse, coef=reverse_weight), Term("forward", forward, coef=1.0 - reverse_weight))
    return Method(
        rollout=RolloutPlan(
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            on_policy_fraction=1.0 if prefix == "student" else 0.0,
            off_policy="dataset" if prefix == "dataset" else "teacher",
            keep=prefix == "teacher",
            horizon=stages.read("horizon") if stages else None,
        ),
        terms=tuple(term for term in terms if term.coef != 0),
        controllers=(stages,) if stages else (),
        limits=(
            Limit({"reverse_weight": 1.0}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"reverse_weight": 0.0}, equals=("gkd", {"divergence": "forward_kl"})),
            Limit({"reverse_weight": 1.0, "estimator": "sampled"}, equals=("opd", {})),
        ),
        recipe={
            "rollout": {"prompts": 32, "max_new_tokens": 4096},
            "optimizer": {"learning_rate": 5e-7, "schedule": "constant", "warmup": 50},
            "eval": {"samples": 5, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 8192},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("forward_kl", forward_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
        ),
    )
