"""The optional term on the decision to stop, of methods for two tokenizers."""

from __future__ import annotations

from retort.divergences import stop_forward_kl
from retort.estimators import pathwise
from retort.method import Term


def stop_terms(coef: float) -> tuple[Term, ...]:
    """The term `stop`, or none where its coefficient is 0."""
    return (Term("stop", pathwise(stop_forward_kl()), coef=coef),) if coef else ()
