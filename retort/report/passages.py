"""Texts that models wrote before a teacher scored, as the page's script shows them beside a rollout.

They are as hostile as any text of a model, and the files may be damaged: what does not fit is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retort.report.episodes import cut_text
from retort.report.read import as_list, number

#: Most texts shown of one rollout.
MOST_PASSAGES = 64


def passages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The texts that were written about a rollout, in order.

    Args:
        row: A line of `rollouts.jsonl`.

    Returns:
        Of each `text`, and in `about` in words what it is, who wrote it, in which round, about which turn of an
        episode, how sure its author says to be, and whether it was cut at its longest length.
    """
    found = [
        own for own in as_list(row.get("passages")) if isinstance(own, Mapping) and isinstance(own.get("text"), str)
    ]
    return [{"text": cut_text(own["text"]), "about": _about(own)} for own in found[:MOST_PASSAGES]]


def _about(own: Mapping[str, Any]) -> str:
    round_, step, sure = (number(own.get(name)) for name in ("round", "step", "confidence"))
    words = [
        str(own.get("of", "")),
        str(own.get("model", "")),
        None if round_ is None else f"round {round_ + 1:g}",
        None if step is None else f"before turn {step + 1:g}",
        None if sure is None else f"{sure:g} % sure",
        "cut at its longest length" if own.get("cut") is True else None,
    ]
    return " · ".join(word for word in words if word)
