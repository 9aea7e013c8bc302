"""VA-OPD: a teacher's divergence, weighted by what it owes to the image."""

from retort.core.reduce import weighted
from retort.divergences import reverse_kl
from retort.estimators import pathwise
from retort.method import Method, Paper, Term, Unbounded, Watch, method
from retort.quantities import stored_quantity, student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.image_views import pixelated
from retort.teachers.view import View
from retort.weights.visual import VisualWeights, least, most

_POOR = "pixelated"


@method(
    paper=Paper(
        title="Visual-Advantage On-Policy Distillation for Vision-Language Models",
        authors="Liu, Ruiqi and Lv, Xiaolei and Li, Gengsheng and Zhu, Ximo and Wang, Zhiheng and others",
        year=2026,
        arxiv="2605.21924",
        url="https://github.com/handsome-rich/VA-OPD",
    ),
    status="faithful",
)
def va_opd(
    *,
    weight_temperature: Unbounded = 1.0,
    high_share: float = 0.2,
    high_weight: float = 0.5,
    ratio: float = 0.1,
    samples: int = 4,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> Method:
    r"""Exact reverse KL, most of it on rollouts and tokens whose probability the teacher owes to the image.

    .. math:: L = \frac1B \sum_b \sum_k a_k \Big[ \frac{\lambda}{|Hi|} \sum_{t \in Hi} D_t
              + \frac{1 - \lambda}{|Lo|} \sum_{t \in Lo} D_t \Big], \qquad D_t = D_{KL}(p_S \Vert p_T)

    D is over the whole vocabulary, at temperature 1, in nats. The teacher reads the same tokens twice, after the image
    and after a pixelated one: :math:`v_t = \max(0, \log p_T(y_t | image) - \log p_T(y_t | pixelated))`. The pixelated
    view is never learnt from. :math:`a_k = \mathrm{softmax}(z_k / \tau)` over the K rollouts of a prompt, z being the
    mean v of a rollout, standardised among them (population deviation plus 1e-6). Hi are the
    :math:`\lceil p_v T \rceil` tokens of a rollout with the largest v, Lo the others; ties go to the earlier token. The
    weights of a prompt add up to 1, and each of the B prompts counts alike. Weights carry no gradient; they are those
    of the student before the first update on a batch.

    Args:
        weight_temperature: tau, dimensionless; infinity: all rollouts of a prompt count alike.
        high_share: p_v, the share of a rollout's tokens in Hi. The product is exact, 0.2 of 35 tokens is 7.
        high_weight: lambda. 1 leaves out Lo. Where Lo is empty, Hi has all.
        ratio: Pixels of a side that pixelation leaves, as a share (`retort.views.pixelate`).
        samples: K, rollouts per prompt.
        temperature: Temperature of sampling alone.
        top_p: Top-p of sampling alone.

    Rounding up and ties are those of the released code; the paper says nothing of them. A prompt without an image has
    no pixelated view, and its rollouts are left out; data in which no prompt has one are refused. Equal advantages do
    not make it plain OPD: lambda must also be the share of tokens in Hi. In the paper (Geometry3K, Qwen3-VL 8B to 2B)
    averages on mathematical and on visual benchmarks are 48.3 and 66.1, of plain OPD 45.4 and 64.6, of GRPO 44.5 and
    65.4; on MMMU GRPO is ahead.

    Departures from the released code: advantages are compared in the precision in which the teacher computes. A token
    that the pixelated view alone rules out has an advantage of 100 nats, where the code stops.

    Example:
        >>> logits = tensor([[0.5, 0.5]] * 5).log()
        >>> poor = tensor([[0.1, 0.9], [0.4, 0.6], [0.5, 0.5], [0.5, 0.5], [0.6, 0.4]]).log()
        >>> given = {"tokens": tensor([0] * 5), "groups": tensor([0]), "extra_views": {"pixelated": poor}}
        >>> losses = token_losses("va_opd", student_logits=logits, teacher_logits=logits, **given)
        >>> losses.terms["distillation"].weight  # one token of five is in Hi, and has half of the weight
        tensor([0.5000, 0.1250, 0.1250, 0.1250, 0.1250])
    """
    visual = VisualWeights(temperature=weight_temperature, high_share=high_share, high_weight=high_weight, poor=_POOR)
    # Weights of a prompt add up to 1, so their sum is the number of prompts.
    over = weighted(f"{visual.name}.weight")
    rollout_weight = stored_quantity(f"{visual.name}.rollout")
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views={"teacher": View.same_prompt(), _POOR: pixelated(ratio)},
        terms=(Term("distillation", pathwise(reverse_kl()), weight=visual.weight(), denominator=over),),
        recipe={
            "rollout": {"prompts": 16, "max_new_tokens": 4096, "max_prompt_tokens": 8192},
            "optimizer": {
                "learning_rate": 1e-6,
                "schedule": "cosine",
                "updates": 1,
                "beta2": 0.95,
                "weight_decay": 0.1,
                "grad_clip": 1.0,
            },
            "eval": {"samples": 8},
        },
        watch=(
            Watch("reverse_kl", reverse_kl()),
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            Watch("visual_advantage", stored_quantity(f"{visual.name}.advantage"), against=_POOR),
            Watch("visual_high_share", stored_quantity(f"{visual.name}.high_share"), against=_POOR),
            Watch("visual_high_zero", visual.without_advantage(), where=visual.high(), against=_POOR),
            Watch("rollout_weight_min", rollout_weight, against=_POOR, summed_up=least),
            Watch("rollout_weight_max", rollout_weight, against=_POOR, summed_up=most),
        ),
    )
