"""CL-EGRSD: EGRSD that forgives a teacher's doubt where it is soon resolved."""

from typing import Literal

from retort.method import Limit, Method, Paper, Watch, method
from retort.methods._egrsd import Baseline, Teacher, gated
from retort.rollout.plan import RolloutPlan
from retort.weights import Confidence
from retort.weights.confidence import Scale


@method(
    paper=Paper(
        title="Respecting Self-Uncertainty in On-Policy Self-Distillation for Efficient LLM Reasoning",
        authors="Ke, Junlong and Wen, Zichen and Li, Weijia and He, Conghui and Zhang, Linfeng",
        year=2026,
        arxiv="2605.13255",
    ),
    status="faithful",
)
def cl_egrsd(
    *,
    gate: float = 0.3,
    window: int = 3,
    scale: Scale = "raw",
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
    r"""EGRSD whose gate looks at the surest of the next few tokens: a doubt that is soon resolved costs little.

    .. math:: \hat H_t = \min_{t \le j \le \min(t+W, T)} H_j \,/\, \max(\max_{batch} H, 1)

    in place of EGRSD's :math:`\hat H_t`, with all else as there: see `egrsd`. The minimum is over the tokens of one
    completion, so the weight is never below EGRSD's, and equal to it where entropies do not change.

    Args:
        gate: gamma (the paper's for 4B; for 8B it has 1, with a window of 5).
        window: W, tokens; 0 is EGRSD.
        scale: Entropies whose largest in the batch divides: the `raw` ones, as in the paper's equation, or the
            `smoothed` ones (the minima), as in its Algorithm 1.
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

    Departures: those of `egrsd`. The curve `restored` is the part of a token's weight that is due to the window; the
    paper splits it by regimes of entropy, whose thresholds it does not give.

    Example:
        >>> logits, given = tensor([[0.5, 0.5], [1.0, 0.0]]).log(), {"tokens": tensor([0, 0]), "rewards": tensor([1.0])}
        >>> losses = token_losses("cl_egrsd", student_logits=logits, teacher_logits=logits, longest=2, **given)
        >>> losses.terms["outcome"].weight  # 1 where `egrsd` has 0.7921: the next token resolves the doubt
        tensor([1., 1.])
    """
    confidence = Confidence(gate, floor=floor, window=window, scale=scale)
    return gated(
        confidence,
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
            Limit({"window": 0}, equals=("egrsd", {})),
            Limit({"window": 0, "scale": "smoothed"}, equals=("egrsd", {})),
            Limit({"gate": 0.0}, equals=("egrsd", {"gate": 0.0})),
        ),
        watch=(Watch("restored", confidence.restored()),),
    )
