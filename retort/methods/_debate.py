"""What methods of several teachers share: their settings in groups, terms, views and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retort.core import parts
from retort.core.reduce import Denominator, rollout_means, tokens
from retort.core.rollouts import Rollout
from retort.divergences import clipped, teacher_top
from retort.errors import UserError
from retort.estimators import pathwise
from retort.method import Paper, Term, Watch
from retort.quantities import sampled_reverse_kl, student_entropy, teacher_entropy
from retort.teachers.debate import debate as debate_of
from retort.teachers.debate import debated
from retort.teachers.view import View
from retort.weights.debate import SOMEBODY, teacher_share

PAPER = Paper(
    title="MAD-OPD: Breaking the Ceiling in On-Policy Distillation via Multi-Agent Debate",
    authors="Wang, Jianze and Liu, Ying and Chen, Jinlong and Hu, Xuchun and Zhang, Qilong and Cao, Yu and Wang, Jun "
    "and Yang, Hua and Xie, Yong and Chen, Qianglong",
    year=2026,
    arxiv="2605.01347",
    url="https://github.com/chiefovoavicii/MAD-OPD",
)

Kind = Literal["jsd", "forward_kl", "reverse_kl"]
Reduction = Literal["rollout_means", "token_mean"]


@dataclass(frozen=True)
class Divergence:
    """The divergence of each teacher.

    Attributes:
        kind: D: `jsd` for agents, `reverse_kl` for code, as in the paper.
        teacher_weight: w of `jsd`, on the teacher, strictly between 0 and 1.
        top_k: Both sides renormalised on the teacher's so many most likely ids; null for the whole vocabulary.
    """

    kind: Kind = field(default="jsd", metadata={"setting": "divergence"})
    teacher_weight: float = 0.5
    top_k: int | None = None

    def part(self) -> parts.Divergence:
        """The divergence itself.

        Raises:
            UserError: A weight outside of its range, or one id that is renormalised.
        """
        if self.top_k == 1:
            raise UserError("method.top_k = 1: renormalised on one id both sides are 1, so nothing would be learnt")
        w = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.teacher_weight}[self.kind]
        if self.kind == "jsd" and not 0 < w < 1:
            raise UserError(f"method.teacher_weight must lie strictly between 0 and 1 for jsd, not {w}")
        return clipped(None, w, None if self.top_k is None else teacher_top(self.top_k))


@dataclass(frozen=True)
class Debate:
    """How the teachers debate, and what becomes of it.

    Attributes:
        rounds: R; in the first round no answer of another is in sight.
        transcript: Whether each teacher scores with the transcript in sight; else the debate only gives weights.
        weights: a_k, by how sure each teacher says to be (`confidence`), or `equal`.
        weights_temperature: tau of the confidences; a smaller one follows the surest more.
        temperature: Temperature at which teachers write.
        top_p: Top-p at which teachers write.
        tokens: Longest text of a teacher in a round; null: as long as the student's completions may be.
    """

    rounds: int = 2
    transcript: bool = True
    weights: Literal["confidence", "equal"] = "confidence"
    weights_temperature: float = 1.0
    temperature: float = field(default=0.7, metadata={"setting": "debate_temperature"})
    top_p: float = field(default=0.8, metadata={"setting": "debate_top_p"})
    tokens: int | None = field(default=None, metadata={"setting": "debate_tokens"})


def views(
    names: Sequence[str],
    debate: Debate,
    leaves_out: Callable[[Rollout], bool] | None,
    per: Literal["visit", "step"] = "visit",
) -> dict[str, View]:
    """The views of teachers who debate, or who read the student's own prompt where nothing of a debate is used.

    Args:
        names: The teachers.
        debate: How they debate.
        leaves_out: See `View`.
        per: See `retort.teachers.debate.debate`.
    """
    by_confidence = debate.weights == "confidence"
    if not (debate.transcript or by_confidence):
        return {name: View(model=name, leaves_out=leaves_out) for name in names}
    draft = debate_of(
        names,
        rounds=debate.rounds,
        temperature=debate.temperature,
        top_p=debate.top_p,
        max_new_tokens=debate.tokens,
        confidence=by_confidence,
        per=per,
    )
    return {
        name: debated(name, place, draft, shown=debate.transcript, leaves_out=leaves_out)
        for place, name in enumerate(names)
    }


def denominator(reduction: Reduction) -> Denominator:
    """Of each teacher's term: over the rollouts about which some teacher says something, or over all tokens."""
    return rollout_means(among=SOMEBODY) if reduction == "rollout_means" else tokens()


def terms(
    names: Sequence[str],
    divergence: Divergence,
    over: Denominator,
    *,
    fixed: Sequence[float] | None = None,
    temperature: float | None = None,
) -> tuple[Term, ...]:
    """One term for each teacher, of its name; their weights are `fixed`, or those of confidences at a temperature."""
    return tuple(
        Term(
            name,
            pathwise(divergence.part()),
            against=name,
            weight=teacher_share(name, names, fixed=fixed, temperature=temperature),
            denominator=over,
        )
        for name in names
    )


def curves(names: Sequence[str], weights: Mapping[str, parts.Part]) -> tuple[Watch, ...]:
    """The curves of the paper: how far each teacher is, what weight it has, and how sure it is of itself."""
    found = [Watch("student_entropy", student_entropy())]
    for name in names:
        end = name.removeprefix("teacher")
        found += [
            Watch(f"reverse_kl{end}", sampled_reverse_kl(), against=name),
            Watch(f"teacher_entropy{end}", teacher_entropy(), against=name),
            Watch(f"weight{end}", weights[name], against=name),
        ]
    return tuple(found)


def recipe(*, prompt: int, completion: int) -> dict[str, Any]:
    """The paper's training settings.

    Args:
        prompt: Longest prompt, tokens.
        completion: Longest completion, tokens.
    """
    return {
        "rollout": {"prompts": 128, "max_new_tokens": completion, "max_prompt_tokens": prompt},
        "optimizer": {
            "learning_rate": 1e-5,
            "schedule": "cosine",
            "weight_decay": 0.01,
            "beta2": 0.999,
            "updates": 1,
            "grad_clip": 1.0,
        },
        "eval": {"samples": 16, "temperature": 0.7, "top_p": 0.8},
    }
