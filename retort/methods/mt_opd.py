"""Distillation from several teachers at once, each with a fixed weight."""

from retort.method import Limit, Method, method
from retort.methods._debate import PAPER, Divergence, Reduction, curves, denominator, recipe, terms
from retort.rollout.plan import RolloutPlan
from retort.teachers.debate import repeats, teacher_names
from retort.teachers.view import View

__all__ = ["Divergence", "mt_opd"]


@method(paper=PAPER, status="faithful")
def mt_opd(
    *,
    teachers: int = 2,
    weights: tuple[float, ...] | None = None,
    divergence: Divergence = Divergence(),
    reduction: Reduction = "rollout_means",
    repetition_limit: float = 0.6,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.8,
    loss_temperature: float = 1.0,
) -> Method:
    r"""A divergence from each of several teachers on the student's own completions, added up with fixed weights.

    .. math:: L = \frac{1}{B} \sum_i \sum_k a_k \frac{1}{T_{ik}} \sum_{t \le T_{ik}} D\big(p_S, p_k\big)

    in nats. The teachers are the models `teacher`, `teacher_2` and so on (`models.teacher_2.path=DIR`). Each has a
    number of tokens of its own, so one that reads less of a rollout changes nothing of the others; where a teacher has
    no context its weight goes to the others, and a rollout without any is not in B. It is the baseline of `mad_opd`: in
    the paper it is often worse than its best teacher alone.

    Args:
        teachers: K.
        weights: a, one positive number for each teacher, divided by their sum; null: all equal.
        divergence: D.
        reduction: `rollout_means` as above; `token_mean`: all tokens count alike, each teacher's divided by its own.
        repetition_limit: A completion of whose runs of three words a larger share is repeated is left out; 1: none is.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling.
        top_p: Top-p of sampling.
        loss_temperature: Temperature of all distributions. The released code leaves it at 1 here, and divides by 0.7
            in the baseline with one teacher, which makes the two not comparable.

    Departures: sampling is not cut to 20 ids and has no penalty for repetition; a rollout on which all agree counts,
    with a loss of 0 (in the code it is skipped).

    Example:
        >>> student, one, two = (tensor([[p, 1 - p]]).log() for p in (0.5, 0.9, 0.2))
        >>> given = {"tokens": tensor([0]), "extra_views": {"teacher_2": two}}
        >>> losses = token_losses("mt_opd", student_logits=student, teacher_logits=one, **given)
        >>> losses.loss  # half of 0.1017 and half of 0.0507
        tensor(0.0762)
    """
    names = teacher_names(teachers)
    own = terms(names, divergence, denominator(reduction), fixed=weights)
    alone = {"teachers": 1, "reduction": "token_mean"}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views={name: View(model=name, leaves_out=repeats(repetition_limit)) for name in names},
        temperature=loss_temperature,
        terms=own,
        limits=(
            Limit(alone, equals=("gkd", {})),
            Limit({**alone, "divergence": "reverse_kl"}, equals=("gkd", {"divergence": "reverse_kl"})),
            Limit({"weights": (3.0, 3.0)}, equals=("mt_opd", {})),
            Limit({"top_k": 10**9}, equals=("mt_opd", {})),
        ),
        recipe=recipe(prompt=16384, completion=4096),
        watch=curves(names, {term.against: term.weight for term in own if term.weight is not None}),
    )
