"""Mixtures of teachers, token by token. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from retort.core.chunked import block_rows
from retort.core.rollouts import Group
from retort.core.signals import Dense, TeacherSignal, all_valid, arithmetic, disagreement, listed
from retort.errors import UserError
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.itself import mix
from retort.teachers.several import SeveralTeachers, as_asked, spoken


class MixtureTeacher(SeveralTeachers):
    r"""One distribution of several: :math:`\sum_i w_i p_i`, or :math:`\prod_i p_i^{w_i}` renormalised.

    Both are exact over all ids, and computed for a few steps at a time. The arithmetic one needs no whole
    distributions: of given ids its log-probs follow from theirs. It is theirs at each one's own temperature. Teachers
    of weight 0 are never asked, and one alone is as it is, to the bit.
    """

    # From the lists of two teachers no list of the mixture follows, and no entropy.
    listed = ("sampled", "logp_at", "temperature")

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        weights: Sequence[float] | None = None,
        *,
        mean: Literal["arithmetic", "geometric"] = "arithmetic",
    ) -> None:
        """Builds the mixture.

        Args:
            teachers: The teachers by name.
            weights: w, at least 0; divided by their sum. None: all alike.
            mean: The mean that is taken of probabilities.

        Raises:
            UserError: A weight is no weight, or a geometric mean is asked of a teacher without whole distributions.
        """
        self.how = "mixed" if mean == "arithmetic" else "multiplied"
        super().__init__(teachers, weights)
        self.mean = mean
        lacking = [name for name, own in self._speaking() if "dense" not in own.capabilities]
        if mean == "geometric" and lacking:
            raise UserError(
                f"teachers.combine = product: {lacking[0]} does not give whole distributions, without which a product "
                "cannot be normalised; use combine = mixture or route"
            )

    def _speaking(self) -> list[tuple[str, Teacher]]:
        pairs = zip(self.teachers.items(), self.weights, strict=True)
        return [named for named, weight in pairs if weight > 0]

    def combined(
        self, groups: Sequence[Group], request: ScoreRequest, known: Mapping[str, Dense] | None = None
    ) -> TeacherSignal:
        """See `SeveralTeachers`."""
        names = [name for name, _ in self._speaking()]
        weights = [weight for weight in self.weights if weight > 0]
        if len(names) == 1:
            found = self.teachers[names[0]].score(groups, request) if known is None else known[names[0]]
            return as_asked(found, request)
        if "dense" not in self.capabilities:
            signals = [self.teachers[name].score(groups, request) for name in names]
            return listed(signals, weights, self.name)
        dense = [self.whole(name, groups, request) if known is None else known[name] for name in names]
        made = arithmetic(dense, weights) if self.mean == "arithmetic" else mix(dense, weights)
        counts = dict(dense[0].counts)
        if known is not None and self.mean == "arithmetic":
            rows = block_rows(made.width, made.tokens_N.device)
            counts |= spoken(names, disagreement(dense, weights, rows)[1], all_valid(dense))
        return as_asked(replace(made, source=self.name, valid_N=all_valid(dense), counts=counts), request)
