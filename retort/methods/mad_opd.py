"""Distillation from teachers that debate first, and then score with the transcript in sight."""

from retort.method import Limit, Method, method
from retort.methods._debate import PAPER, Debate, Divergence, Reduction, curves, denominator, recipe, terms, views
from retort.rollout.plan import RolloutPlan
from retort.teachers.debate import repeats, teacher_names

__all__ = ["Debate", "Divergence", "mad_opd"]


@method(paper=PAPER, status="faithful")
def mad_opd(
    *,
    teachers: int = 2,
    debate: Debate = Debate(),
    divergence: Divergence = Divergence(),
    reduction: Reduction = "rollout_means",
    repetition_limit: float = 0.6,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.8,
    loss_temperature: float = 1.0,
) -> Method:
    r"""Teachers debate the prompt, blind to the student; then each scores its tokens with the transcript in sight.

    .. math:: L = \frac{1}{B} \sum_i \sum_k a_{ik} \frac{1}{T_{ik}} \sum_{t \le T_{ik}}
              D\big(p_S(\cdot | x, y_{<t}),\, p_k(\cdot | x, H^R, y_{<t})\big), \quad
              a_{ik} = \frac{\exp(c_{ik} / 100 \tau)}{\sum_j \exp(c_{ij} / 100 \tau)}

    in nats, with H the transcript of R rounds and c how sure each teacher says to be after the last: the number of the
    last tag `<<CONFIDENCE=N>>` that it writes. Where one of them writes none, all weigh the same. Teachers are the
    models `teacher`, `teacher_2` and so on (`models.teacher_2.path=DIR`); each writes and scores. Where a teacher has
    no context, its weight goes to the others.

    Args:
        teachers: K.
        debate: R, and how the teachers write.
        divergence: D.
        reduction: `rollout_means` as above; `token_mean`: all tokens count alike, each teacher's divided by its own.
        repetition_limit: A completion of whose runs of three words a larger share is repeated is left out; 1: none is.
        samples: Rollouts per prompt; all of them share one debate.
        temperature: Temperature of sampling.
        top_p: Top-p of sampling.
        loss_temperature: Temperature of all distributions; the released code leaves it at 1.

    Departures: sampling is not cut to 20 ids and has no penalty for repetition; the words of the prompts are Retort's
    (`templates`), one set for all tasks where the code has three; a rollout on which all agree counts, with a loss of
    0. For code the paper takes `divergence=reverse_kl`.

    Example:
        >>> from retort.teachers import debate_weights
        >>> student, one, two = (tensor([[p, 1 - p]]).log() for p in (0.5, 0.9, 0.2))
        >>> given = {"tokens": tensor([0]), "extra_views": {"teacher_2": two}, "confidences": [95, 90]}
        >>> losses = token_losses("mad_opd", student_logits=student, teacher_logits=one, **given)
        >>> losses.loss  # 0.5125 times 0.1017 and 0.4875 times 0.0507
        tensor(0.0768)
    """
    names = teacher_names(teachers)
    tau = debate.weights_temperature if debate.weights == "confidence" else None
    own = terms(names, divergence, denominator(reduction), temperature=tau)
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views=views(names, debate, repeats(repetition_limit)),
        temperature=loss_temperature,
        terms=own,
        limits=(
            Limit({"transcript": False, "weights": "equal"}, equals=("mt_opd", {})),
            Limit(
                {"transcript": False, "weights": "equal", "teachers": 1, "reduction": "token_mean"},
                equals=("gkd", {}),
            ),
        ),
        recipe=recipe(prompt=16384, completion=4096),
        watch=curves(names, {term.against: term.weight for term in own if term.weight is not None}),
    )
