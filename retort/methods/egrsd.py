"""EGRSD: rewards give the direction, a teacher that knows the solution the size, its certainty the weight."""

from typing import Literal

from retort.method import Limit, Method, Paper, method
from retort.methods._egrsd import Baseline, Teacher, gated
from retort.rollout.plan import RolloutPlan
from retort.weights import Confidence


@method(
    paper=Paper(
        title="Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
        authors="Ke, Junlong and Wen, Zichen and Li, Weijia and He, Conghui and Zhang, Linfeng",
        year=2026,
        arxiv="2605.13255",
    ),
    status="faithful",
)
def egrsd(
    *,
    gate: float = 0.3,
    floor: float = 0.1,
    bound: float = 0.2,
    length_bonus: float = 0.5,
    baseline: Baseline = "running",
    warmup: int = 10,
    shows: Literal["solution", "answer", "hint"] = "solution",
    teacher: Teacher = "frozen",
    update_rate: float = 0.01,
    copy_every: int = 20,
    samples: int = 1,
    temperature: float = 1.1,
    top_p: float = 0.95,
) -> Method:
    r"""REINFORCE whose size at a token is set by a teacher with the solution, and less where that teacher is unsure.

    .. math:: \hat A_t = A \cdot \mathrm{clip}(e^{\mathrm{sign}(A)\,\delta_t}, 1-\epsilon, 1+\epsilon) \cdot
              \mathrm{clip}(1 - \gamma \hat H_t, c, 1), \quad \hat H_t = H_t / \max(\max_{batch} H, 1)

    with :math:`\delta_t = \log p_T(y_t) - \log p_S(y_t)`, H the entropy of the teacher's whole distribution, nats, and
    A the reward, whitened by the mean and deviation of all batches before. A right completion earns
    :math:`1 + \beta(1 - |y|/L_{max})`, a wrong one 0. The loss is divided by all counted tokens. The sign of A never
    changes.

    Args:
        gate: gamma; 0 for no gate, which is RLSD with lambda 1 and no clip.
        floor: c, the least weight of an unsure token.
        bound: epsilon.
        length_bonus: beta; L_max is the longest completion that a run allows.
        baseline: `running` (all batches so far), or `group` (the prompt's other rollouts: RLSD's, not the paper's).
        warmup: Batches in which A is the reward less 0.5, before `running` has numbers of its own.
        shows: Column of the data that the teacher sees.
        teacher: The student as it was before training; its average (`ema`) or a `hard_copy`, which the paper found
            worse; or an `outside` model.
        update_rate: Update rate of `ema`.
        copy_every: Optimizer steps between two copies of `hard_copy`.
        samples: Rollouts per prompt.
        temperature: Sampling temperature; the loss is taken at 1.
        top_p: Top-p of sampling.

    Departures: the paper also samples from the 20 likeliest tokens only, which is not offered. With several updates on
    a batch the ratio to the student before it comes in, unclipped; the paper makes one. Not stated there, and decided
    here: entropies are at temperature 1, and the batch's largest is that of the whole batch, over all devices.

    Example:
        >>> logits, given = tensor([[0.5, 0.5], [1.0, 0.0]]).log(), {"tokens": tensor([0, 0]), "rewards": tensor([1.0])}
        >>> losses = token_losses("egrsd", student_logits=logits, teacher_logits=logits, longest=2, **given)
        >>> losses.terms["outcome"].weight  # 1 - 0.3 ln 2 where the teacher is unsure, 1 where it is sure
        tensor([0.7921, 1.0000])
    """
    return gated(
        Confidence(gate, floor=floor),
        bound=bound,
        bonus=length_bonus,
        baseline=baseline,
        warmup=warmup,
        shows=shows,
        teacher=teacher,
        update_rate=update_rate,
        copy_every=copy_every,
        plan=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        limits=(
            Limit({"gate": 0.0, **_GROUP}, equals=("rlsd", {"share": 1.0, **_NO_CLIP})),
            Limit({"gate": 0.0, "bound": 0.0, **_GROUP}, equals=("rlsd", {"share": 0.0, **_NO_CLIP})),
        ),
    )


_GROUP = {"baseline": "group", "length_bonus": 0.0}
_NO_CLIP = {"clip_low": None, "clip_high": None}
