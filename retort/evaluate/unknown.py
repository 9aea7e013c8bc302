"""Why `retort trust` could not tell anything, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def why_unknown(found: Mapping[str, Any]) -> list[str]:
    """Sentences about the columns of `trust.json` that hold no AUROC for any predictor; none where each holds some.

    Args:
        found: Contents of `trust.json`; what is missing or odd in it is passed over.
    """
    predictors = found.get("predictors")
    rows = [row for row in predictors if isinstance(row, Mapping)] if isinstance(predictors, list) else []
    empty = [name for name in ("viable", "helps") if rows and all(row.get(name) is None for row in rows)]
    viable, alone, differing = (_number(found.get(name)) for name in ("viable", "alone", "differing"))
    count = _number(found.get("branches"))
    of = "" if not count else f" from {count:,.0f} forced tokens"
    sentences: list[str] = []
    if "viable" in empty and viable == 0:
        also = ", nor one that the student generated alone" if alone == 0 else ""
        sentences.append(
            f"No AUROC of “right in the end”{of}: no completion after a forced token is right{also}. Take a student "
            "that solves some of these problems, easier ones, or more problems and places"
        )
    elif "viable" in empty and viable == 1:
        sentences.append(
            f"No AUROC of “right in the end”{of}: every completion after a forced token is right. Take harder problems"
        )
    if "helps" in empty and differing == 0:
        sentences.append(
            f"No AUROC of “makes the difference”{of}: with the forced token and without it, each completion ends alike"
        )
    elif "helps" in empty and differing:
        sentences.append(
            f"No AUROC of “makes the difference”{of}: in all {differing:,.0f} pairs that differ it is "
            "the same side that is right"
        )
    return sentences


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 else None
