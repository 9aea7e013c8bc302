"""A teacher as it is behind a wire: it says a few numbers about each token, and never a whole distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from retort.core.needs import DENSE, NeedKind
from retort.core.rollouts import Group
from retort.core.signals import Candidates, Sampled, TeacherSignal
from retort.teachers.base import Read, ScoreRequest
from retort.teachers.view import View


class RemoteTeacher:
    """Says what another teacher says, as far as a server does: of written tokens, and of ids that it is given."""

    capabilities: frozenset[NeedKind] = frozenset({"sampled", "logp_at", "temperature"})

    def __init__(self, behind: Any) -> None:
        self.behind = behind
        self.name = f"{behind.name}, far away"
        self.asked: list[ScoreRequest] = []

    def read(self, groups: Sequence[Group], view: View) -> Read:
        return self.behind.read(groups, view)

    def score(self, groups: Sequence[Group], ask: ScoreRequest) -> TeacherSignal:
        """Plain numbers on the CPU, whatever `behind` computes on; of no step without context."""
        assert {need.kind for need in ask.needs} <= self.capabilities, "it is asked for what it can give"
        self.asked.append(ask)
        known = self.behind.score(groups, replace(ask, needs=frozenset({DENSE}), student_ids_NK=None))
        rows, ids_NK = known.rows(slice(None)), ask.student_ids_NK
        tokens_N, sampled_N = known.tokens_N.cpu(), rows.sampled_logp_N.cpu()
        rest: Any = {"valid_N": None if known.valid_N is None else known.valid_N.cpu(), "counts": known.counts}
        if ids_NK is None:
            return Sampled(tokens_N, self.name, sampled_N, **rest)
        logp_NK = rows.logp_at(ids_NK.to(known.tokens_N.device)).cpu()
        return Candidates(tokens_N, self.name, ids_NK.clone(), logp_NK, sampled_N, **rest)
