"""On-policy distillation of agents, step by step: the teachers debate every step of an episode."""

from typing import Literal

from retort.core.reduce import turn_means, turn_sums
from retort.method import Limit, Method, method
from retort.methods._debate import PAPER, Debate, Divergence, curves, recipe, terms, views
from retort.rollout.plan import RolloutPlan
from retort.teachers.debate import repeats, teacher_names
from retort.weights.debate import SOMEBODY

__all__ = ["Debate", "Divergence", "opad"]


@method(paper=PAPER, status="faithful")
def opad(
    *,
    teachers: int = 2,
    debate: Debate = Debate(),
    divergence: Divergence = Divergence(),
    reduction: Literal["turn_sums", "turn_means"] = "turn_sums",
    repetition_limit: float = 0.6,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.8,
    loss_temperature: float = 1.0,
) -> Method:
    r"""`mad_opd` for agents: a debate about every step of an episode, and the sum of the means over its steps.

    .. math:: L = \frac{1}{B} \sum_i \sum_m \frac{1}{|a_m|} \sum_{t \le |a_m|} \sum_k a_{km}
              D\big(p_S(\cdot | s_m, a_{m,<t}),\, p_k(\cdot | s_m, H_m^R, a_{m,<t})\big)

    in nats. A step is a turn of the student, :math:`s_m` the conversation before it, which the teachers debate without
    the turn itself. Long episodes do not thin out a step's gradient: each keeps its own 1/|a_m|. Steps come from
    episodes of an environment, whose turns must be sequences of their own (set `rollout.history`), or from histories
    that are given: a row whose `messages` hold earlier turns is one step, its next turn, and with `data_turns = each`
    every turn of the assistant in a row is a step of its own, after the given turns before it. With steps that are
    whole rollouts it is `mad_opd`.

    Args:
        teachers: K; the models `teacher`, `teacher_2` and so on.
        debate: R, and how the teachers write.
        divergence: D.
        reduction: `turn_sums` as above (the paper's Eq. 10); `turn_means`: the mean over all steps of the batch (code).
        repetition_limit: An episode of whose runs of three words a larger share is repeated is left out; 1: none is.
        samples: Episodes per prompt.
        temperature: Temperature of sampling.
        top_p: Top-p of sampling.
        loss_temperature: Temperature of all distributions.

    Departures: as `mad_opd`. The steps of a given conversation are shuffled like any other prompts; in the code they
    stay together, and in the paper's equation their losses add up. Repetition is looked for in the whole episode, in
    the code in a step.

    Example:
        >>> student, one, two = (tensor([[p, 1 - p]] * 3).log() for p in (0.5, 0.9, 0.2))
        >>> given = {"tokens": tensor([0, 0, 0]), "turns": tensor([0, 1, 1]), "extra_views": {"teacher_2": two}}
        >>> losses = token_losses("opad", student_logits=student, teacher_logits=one, **given)
        >>> losses.loss  # two steps of 0.0762 each, however many tokens they have
        tensor(0.1524)
    """
    names = teacher_names(teachers)
    tau = debate.weights_temperature if debate.weights == "confidence" else None
    over = turn_sums(SOMEBODY) if reduction == "turn_sums" else turn_means(SOMEBODY)
    own = terms(names, divergence, over, temperature=tau)
    alone = {"transcript": False, "weights": "equal", "teachers": 1, "reduction": "turn_means"}
    forward = {"kl": "forward", "reduction": "turns"}
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature, top_p=top_p),
        views=views(names, debate, repeats(repetition_limit), per="step"),
        temperature=loss_temperature,
        terms=own,
        limits=(
            Limit({**alone, "divergence": "forward_kl"}, equals=("tcod", forward)),
            Limit({"weights_temperature": 1e9}, equals=("opad", {"weights": "equal"})),
        ),
        recipe=recipe(prompt=16384, completion=4096),
        watch=curves(names, {term.against: term.weight for term in own if term.weight is not None}),
    )
