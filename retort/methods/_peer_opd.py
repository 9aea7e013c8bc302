"""The settings of multi-rollout OPD in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from retort.divergences import Tail
from retort.method import Unbounded
from retort.methods._siblings import Divergence as Kind
from retort.teachers.moving import live
from retort.teachers.summaries import summaries, summary_of
from retort.teachers.view import View
from retort.teachers.views import peers


@dataclass(frozen=True)
class Peers:
    """Siblings of a rollout that the teacher is shown.

    Attributes:
        successes: Number of successes shown, the first ones of the group; fewer where there are fewer.
        failures: Number of failures shown, drawn at random (0: the paper's positive-only variant).
        failure_when: Condition for failures: `always`, or only where no success is shown.
        threshold: Reward from which on a rollout is a success. The paper gives none; the code has 0.5 and 1.
        feedback: Condition for the verifier's words on the rollout (code; the paper speaks of peers only).
        thoughts: Show a sibling's `<think>` block, too.
        choice: `random` is the paper's control: as many siblings in the same words, whatever their rewards.
        summaries: Number of further siblings of which a sentence is shown, right or wrong, after the first success.
        summary: Where that sentence is from: an `excerpt` of the sibling, what it marks as `<summary>` or else its
            first 300 characters (code); or `written` by the teacher, who is shown the sibling before it scores.
        summary_tokens: Longest sentence that is written, tokens; null: as long as a completion may be.
    """

    successes: int = 2
    failures: int = 1
    failure_when: Literal["always", "without_success"] = "always"
    threshold: float = 0.5
    feedback: Literal["never", "without_success", "always"] = "without_success"
    thoughts: bool = True
    choice: Literal["graded", "random"] = "graded"
    summaries: int = 0
    summary: Literal["excerpt", "written"] = "excerpt"
    summary_tokens: int | None = None

    def view(self, who: Mapping[str, Any], temperature: float) -> View:
        """The view of a teacher who is shown them.

        Args:
            who: Its `model` and `weights`.
            temperature: Temperature at which it writes sentences.
        """
        settings = {name: value for name, value in vars(self).items() if not name.startswith("summary")}
        draft = None
        if self.summaries and self.summary == "written":
            by = {**who, "weights": live()} if _mixed(who) else who
            draft = summaries(**by, temperature=temperature, max_new_tokens=self.summary_tokens)
        return peers(**settings, summary=partial(summary_of, draft=draft), draft=draft, **who)


def _mixed(who: Mapping[str, Any]) -> bool:
    """Whether a teacher mixes logits of two models, so that it cannot write."""
    weights = who.get("weights")
    return weights is not None and weights.kind == "trust_region"


@dataclass(frozen=True)
class Divergence:
    """The divergence between student and teacher.

    Attributes:
        kind: D: the paper takes `reverse_kl` for mathematics, `jsd` for all else.
        teacher_weight: Weight of the teacher in `jsd`, strictly between 0 and 1.
        top_k: k; null for the whole vocabulary.
        tail: `bucket` (code; not in the paper), or both sides `renormalised` on the k ids.
    """

    kind: Kind = field(default="jsd", metadata={"setting": "divergence"})
    teacher_weight: float = 0.5
    top_k: int | None = 100
    tail: Tail = "bucket"


@dataclass(frozen=True)
class Ratios:
    """Caps on the importance ratios that weigh a token.

    Attributes:
        student: Cap on the detached ratio to the student before the batch (code; the paper has none, and with one
            update per batch it is 1); null for no ratio.
        engine: Cap on the importance ratio of trainer to rollout engine (code); null for none.
    """

    student: Unbounded | None = field(default=2.0, metadata={"setting": "ratio_cap"})
    engine: Unbounded | None = field(default=2.0, metadata={"setting": "truncation"})
