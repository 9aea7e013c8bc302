"""Methods that students of flow matching are compared with, and that are no paper's of distillation."""

from __future__ import annotations

from retort.advantages import group_advantage
from retort.divergences import reverse_kl
from retort.errors import UserError
from retort.estimators import pathwise, score_function
from retort.method import Method, Term
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View


def grpo_mix(*, samples: int = 16, reference_coef: float = 0.0, clip: float | None = None) -> Method:
    """Flow-GRPO on all rewards at once: a sample is worth what its rewards come to, and no teacher is asked.

    The advantage of a trajectory is its reward against the others of its prompt, over their deviation, and is that of
    all its steps. What the rewards of a sample come to is the grader's matter, which gives one number.

    Args:
        samples: Images per prompt.
        reference_coef: Of the KL to the view `base`, the student before training (0.04 in Flow-GRPO); 0: none.
        clip: PPO's epsilon, for more than one update on a batch. The ratio is one of whole latents; released code
            takes the mean over their elements, and so has 1e-4.

    Raises:
        UserError: A negative coefficient.
    """
    if reference_coef < 0:
        raise UserError(f"reference_coef must be at least 0, not {reference_coef:g}")
    kept, view = reference_coef > 0, "base" if reference_coef else "teacher"
    reward = Term("reward", score_function(group_advantage(), clip=clip), against=view)
    reference = (Term("reference", pathwise(reverse_kl()), against=view, coef=reference_coef),) if kept else ()
    return Method(
        name="grpo_mix",
        rollout=RolloutPlan(samples=samples),
        views={"base": View(model="base")} if kept else {},
        terms=(reward, *reference),
    )
