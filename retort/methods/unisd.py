"""UniSD: a student that is shown a demonstration teaches itself, with components to be switched on and off."""

from retort.method import Limit, Method, Paper, Unbounded, Watch, method
from retort.methods._unisd import Divided, Level, Preset, components, curves, terms, views
from retort.quantities import student_entropy, teacher_entropy
from retort.rollout.plan import RolloutPlan
from retort.weights.agreement import Spread


@method(
    paper=Paper(
        title="UniSD: Towards a Unified Self-Distillation Framework for Large Language Models",
        authors="Jin, Yiqiao and Wang, Yiyang and Fu, Lucheng and Xiao, Yijia and Luo, Yinyi and Liu, Haoxin and "
        "Prakash, B. Aditya and Hester, Josiah and Wang, Jindong and Kumar, Srijan",
        year=2026,
        arxiv="2605.06597",
        url="https://github.com/Ahren09/UniSD",
    ),
    status="partial",
)
def unisd(
    *,
    preset: Preset = "star",
    teacher_weight: float = 0.0,
    agreement: Level | None = None,
    spread: Spread = "variance",
    contexts: int | None = None,
    demonstrations: int = 1,
    gamma: float | None = None,
    divided_by: Divided | None = None,
    update_rate: float | None = None,
    update_every: int | None = None,
    contrastive_coef: float | None = None,
    contrastive_margin: float | None = None,
    matching_coef: float | None = None,
    divergence_coef: float | None = None,
    cap: Unbounded | None = None,
    cap_quantile: float | None = None,
    samples: int = 1,
    temperature: float = 0.7,
) -> Method:
    r"""A student shown a demonstration teaches itself: trusted where it agrees with itself, led away from wrong ones.

    .. math:: L = \sum_t a_t \min(D_t, c) + \lambda_c \sum_t \max(0, m + |s_t - g_t| - |s_t - n_t|)
              + \lambda_h \sum_t \lVert h^S_t - h^T_t \rVert^2 / D

    D_t is over the whole vocabulary, nats; a the agreement of K auxiliary contexts; s, g and n the log-probs of the
    token written under the student and under the teacher with a right and with a wrong demonstration, nats; h last
    hidden states. First term: mean over rollouts of the mean over their tokens; the other two: mean over all tokens.

    Args:
        preset: What the settings below are where they are null: one component, or all (`star`, UniSD* as in the code;
            `star_clip`, as in the paper, which counts the clip in).
        teacher_weight: w of D: 0 is the forward KL (the code's default), 1 the reverse KL, between them JSD.
        agreement: What a is measured on and holds for.
        spread: Of the K log-probs: their variance or their range.
        contexts: K.
        demonstrations: Other problems, solved, in each auxiliary context.
        gamma: How much disagreement counts; 0 is a = 1.
        divided_by: `steps` or `weights` of the rollout. Null: weights for tokens, as published; steps for sequences,
            because there the published weight cancels and does nothing.
        update_rate: Share of the student that goes into the teacher, 1 - beta; 0 keeps it as before training.
        update_every: Optimizer steps between two moves of the teacher.
        contrastive_coef: lambda_c; 0 switches it off.
        contrastive_margin: m, nats.
        matching_coef: lambda_h; 0 switches it off.
        divergence_coef: Of the first term; 0 leaves it out.
        cap: c, nats, after the sum over the vocabulary; infinite for none.
        cap_quantile: Instead of `cap`: which quantile of D over the batch is c.
        samples: Rollouts per prompt.
        temperature: Of sampling and of all distributions.

    Departures: the auxiliary contexts are drawn at random, not retrieved, so that on few rows two may be alike;
    their log-probs are at `temperature`, in the code at 1; weights of a rollout that add up to less than 1 divide
    as they are. The teacher moves under LoRA, too, which in the code it does not. The map from disagreement to a is
    the code's; the paper has none.
    """
    on = components(
        preset,
        agreement=agreement,
        contexts=contexts,
        gamma=gamma,
        update_rate=update_rate,
        update_every=update_every,
        contrastive_coef=contrastive_coef,
        contrastive_margin=contrastive_margin,
        matching_coef=matching_coef,
        divergence_coef=divergence_coef,
        cap=cap,
    )
    off = {"agreement": "none", "contrastive_coef": 0.0, "matching_coef": 0.0, "update_rate": 0.0}
    base = ("unisd", {"preset": "base"})
    return Method(
        rollout=RolloutPlan(samples=samples, temperature=temperature),
        temperature=temperature,
        views=views(on, demonstrations),
        terms=terms(on, teacher_weight, spread, divided_by, cap_quantile),
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
            *curves(on, cap_quantile),
        ),
    )
