"""W2S-OPD: a target beyond the student, composed of models that are weaker than it."""

from typing import Literal

from retort.divergences import reverse_kl
from retort.divergences.composed import composed_entropy, composed_reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Limit, Method, Paper, Term, Watch, method
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.debate import teacher_names
from retort.teachers.view import View


@method(
    paper=Paper(
        title="Weak-to-Strong On-Policy Distillation",
        authors="Yu, Fangxu and Lin, Zinan and Liu, Xiaodong and Xu, Weijia and Xu, Michael and Zhou, Tianyi and "
        "Gao, Jianfeng",
        year=2026,
        arxiv="2607.26246",
    ),
    status="faithful",
)
def w2s_opd(
    *,
    alpha: float = 1.0,
    minus: Literal["teacher_minus", "base"] = "teacher_minus",
    pairs: int = 1,
    samples: int = 1,
    temperature: float = 1.0,
) -> Method:
    r"""Reverse KL to the first student, moved by what a better weak model has over a worse one; no strong teacher.

    .. math:: D_{KL}\Big(p_S \,\Big\Vert\, \mathrm{softmax}\big(z_B + \alpha \sum_k (z_k^+ - z_k^-)\big)\Big)

    over the whole vocabulary, in nats, divided by all counted tokens. B is the model `base` of a run, by default the
    student before it. The better model of the first pair is the model `teacher`, the worse one `teacher_minus`
    (`models.teacher_minus.path=DIR`); further pairs are `teacher_2` and `teacher_2_minus` and so on. A pair are two
    sizes of a family, a model after and before its post-training, or one that reads a hint and one that does not. All
    need the student's ids, and none has to be better than the student: only what sets the two apart is learnt.

    Args:
        alpha: Weight of the differences. 0 is self-distillation: nothing is learnt.
        minus: `base`: the worse model of a single pair is `base` itself. The target is then
            :math:`p_T^\alpha p_B^{1-\alpha}`, normalised, the optimum of `exopd` with `reward_weight` = alpha, in
            closed form instead of sampled; at 1 it is the teacher.
        pairs: Number of pairs.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    A public re-run on GSM8K (adapters, a student of 8B) has it above distillation from the strong model itself (84.8
    after 82.6), but not above the untouched student (84.8). It took the target's 32 most likely ids; here all ids
    count, as in the paper. The claim is open: compare with the student before the run.

    Example:
        >>> student, base, plus, minus = (tensor([[p, 1 - p]]).log() for p in (0.5, 0.5, 0.6, 0.4))
        >>> views = {"base": base, "teacher_minus": minus}
        >>> given = {"student_logits": student, "teacher_logits": plus, "tokens": tensor([0]), "extra_views": views}
        >>> token_losses("w2s_opd", **given).loss  # odds of (6 / 4) / (4 / 6) = 9 / 4: the target is (9, 4) / 13
        tensor(0.0800)
    """
    if pairs < 1 or (pairs > 1 and minus == "base"):
        raise UserError(f"method.pairs must be at least 1, and 1 where method.minus=base; it is {pairs}")
    better = teacher_names(pairs)
    worse = ["base"] if minus == "base" else [f"{name}_minus" for name in better]
    views = {name: View.same_prompt() if name == "teacher" else View(model=name) for name in better}
    own = tuple((plus, other, alpha) for plus, other in zip(better, worse, strict=True))
    target = composed_reverse_kl("base", own)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        views={**views, **{name: View(model=name) for name in worse}, "base": View.base()},
        temperature=temperature,
        terms=(Term("divergence", pathwise(target)),),
        limits=(Limit({"minus": "base"}, equals=("gkd", {"divergence": "reverse_kl"})),),
        recipe={"optimizer": {"learning_rate": 4e-6, "updates": 1}},
        watch=(
            Watch("composed_reverse_kl", target),
            Watch("composed_entropy", composed_entropy("base", own)),
            Watch("reverse_kl", reverse_kl()),
            Watch("reverse_kl_base", reverse_kl(), against="base"),
            Watch("student_entropy", student_entropy()),
        ),
    )
