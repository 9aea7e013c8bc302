"""What became of the completions of a batch that did not end within a budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retort.core.rollouts import Rollout


@dataclass(frozen=True)
class Unended:
    """Completions that did not end in a batch; None each where there is no such budget.

    Attributes:
        dropped: Those that were left out: prompt, visit, member, tokens, and the version of the weights.
        tokens: The budget after which they were.
        going_on: Number of those that go on in the next batch.
        awaiting_group: Number of those that have ended and wait for another one of their group.
    """

    dropped: tuple[Mapping[str, Any], ...] | None = None
    tokens: int | None = None
    going_on: int | None = None
    awaiting_group: int | None = None

    @staticmethod
    def without(dropped: Sequence[Rollout], tokens: int) -> Unended:
        """Of a batch that leaves some completions out, after so many tokens."""
        return Unended(dropped=tuple(_named(own) for own in dropped), tokens=tokens)

    @staticmethod
    def restored(plain: Mapping[str, Any]) -> Unended:
        """The way back from `plain`; with nothing, that of a batch without a budget."""
        dropped = plain.get("dropped")
        return Unended(**{**plain, "dropped": None if dropped is None else tuple(dropped)})

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def problem(self) -> str:
        """Why nothing of a batch may be left, in words; empty where nothing was left out."""
        if not self.dropped:
            return ""
        return (
            f"none of the {len(self.dropped)} completions ended within rollout.segment_tokens={self.tokens} tokens, so "
            "there is nothing to learn; give them more, or set rollout.partial=resume"
        )

    def metrics(self) -> dict[str, float]:
        """Counts by the name of a metric."""
        counts = {
            "partial/dropped": None if self.dropped is None else len(self.dropped),
            "partial/open": self.going_on,
            "partial/waiting": self.awaiting_group,
        }
        return {name: count for name, count in counts.items() if count is not None}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Lines of `dropped.jsonl` for the step that learns from the batch, from 1: what was left out of it."""
        return [{"step": step, **own} for own in self.dropped or ()]


def _named(own: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": own.prompt.id,
        "visit": own.visit,
        "member": own.member,
        "policy_version": own.policy_version,
        "tokens": own.steps,
    }
