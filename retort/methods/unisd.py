"""UniSD: a student that is shown a demonstration teaches itself, with components to be switched on and off."""

from retort.method import Limit, Method, Paper, Watch, method
from retort.methods._unisd import Agreement, Average, Contrastive, Divergence, Preset, components, curves, terms, views
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan

__all__ = ["Agreement", "Average", "Contrastive", "Divergence", "unisd"]


@method(
    paper=Paper(
        title="UniSD: Towards a Unified Self-Distillation Framework for Large Language Models",
        authors="Jin, Yiqiao and Wang, Yiyang and Fu, Lucheng and Xiao, Yijia and Luo, Yinyi and Liu, Haoxin and "
        "Prakash, B. Aditya and Hester, Josiah and Wang, Jindong and Kumar, Srijan",
        year=2026,
        arxiv="2605.06597",
        url="https://github.com/Ahren09/UniSD",
    ),
    status="faithful",
)
def unisd(
    *,
    preset: Preset = "star",
    divergence: Divergence = Divergence(),
    agreement: Agreement = Agreement(),
    teacher: Average = Average(),
    contrastive: Contrastive = Contrastive(),
    matching_coef: float | None = None,
    samples: int = 1,
    temperature: float = 0.7,
) -> Method:
    r"""A student shown a demonstration teaches itself: trusted where it agrees with itself, led away from wrong ones.

    .. math:: L = \sum_t a_t \min(D_t, c) + \lambda_c \sum_t \max(0, m + |s_t - g_t| - |s_t - n_t|)
              + \lambda_h \sum_t \lVert h^S_t - h^T_t \rVert^2 / D

    D_t is over the whole vocabulary, nats; a the agreement of K auxiliary contexts; s, g and n the log-probs of the
    generated token under the student and under the teacher with a right and with a wrong demonstration, nats; h last
    hidden states. First term: mean over rollouts of the mean over their tokens; the other two: mean over all tokens.

    Args:
        preset: Values of the settings that are null: one component, or all (`star`, UniSD* as in the code; `star_clip`,
            as in the paper, which counts the clip in).
        divergence: D, its coefficient and its cap.
        agreement: a: its unit, its measure and the denominator.
        teacher: Moving average of the student.
        contrastive: lambda_c and m.
        matching_coef: lambda_h; 0 switches it off.
        samples: Rollouts per prompt.
        temperature: Temperature of sampling and of all distributions.

    Departures: likeness is the cosine of the texts' words (tf-idf), in the code of the embeddings of a sentence model;
    the teacher writes the instructions of `induced` contexts itself, before it scores; no two contexts of a rollout
    show the same problem, and where the data have too few others there is no context. The log-probs of contexts are
    at `temperature`, in the code at 1; weights of a rollout that add up to less than 1 divide as they are. The teacher
    moves under LoRA, too, which in the code it does not. The map from disagreement to a is the code's; the paper has
    none.

    Example:
        >>> logits, apart = tensor([[0.5, 0.5]] * 2).log(), tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> agreement = {"level": "token", "contexts": 2, "gamma": 1.0}
        >>> method = retort.load("unisd", preset="base", agreement=agreement)
        >>> given = {"tokens": tensor([0, 0]), "extra_views": {"context_0": logits, "context_1": apart}}
        >>> losses = token_losses(method, student_logits=logits, teacher_logits=logits, **given)
        >>> losses.terms["divergence"].weight  # 1 where the contexts agree, 1 / (1 + 1 / 0.95) where they are apart
        tensor([1.0000, 0.4872])
    """
    on = components(
        preset,
        divergence=divergence,
        agreement=agreement,
        teacher=teacher,
        contrastive=contrastive,
        matching_coef=matching_coef,
    )
    off = {"agreement": "none", "contrastive_coef": 0.0, "matching_coef": 0.0, "update_rate": 0.0}
    base = ("unisd", {"preset": "base"})
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        views=views(on, agreement, temperature),
        terms=terms(on, divergence, agreement),
        limits=(
            Limit(off, equals=base),
            Limit({"preset": "token_agreement", "gamma": 0.0}, equals=base),
            Limit({"preset": "sequence_agreement", "divided_by": "weights", "gamma": 9.0}, equals=base),
            Limit({"preset": "clip", "cap": float("inf")}, equals=base),
        ),
        recipe={
            "rollout": {"prompts": 16, "max_new_tokens": 2048, "max_prompt_tokens": 1024},
            "optimizer": {"learning_rate": 2e-5, "schedule": "cosine", "updates": 1, "grad_clip": 1.0},
        },
        watch=(
            Watch("student_entropy", student_entropy()),
            Watch("teacher_entropy", teacher_entropy()),
            *curves(on, divergence.cap_quantile),
        ),
    )
