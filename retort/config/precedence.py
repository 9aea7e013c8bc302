"""Precedence of settings: the user's, then those of the method's paper, then the defaults; all nested."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from retort import registry

__all__ = ["FOLLOWS", "flat", "leave_open", "merge"]

#: A setting of a paper -> one on which it depends. Where the user gives the latter, the paper's number is about another
#: run than the user's and gives way to the default, which follows what the user gave.
FOLLOWS = {"eval.max_new_tokens": "rollout.max_new_tokens"}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested settings, those of `above` winning. Another method's name drops the settings of the one below."""
    merged = dict(below)
    for key, given in above.items():
        old = merged.get(key)
        if key == "method" and isinstance(given, str | Mapping):
            value = {"name": given} if isinstance(given, str) else given
            merged[key] = _method(old if isinstance(old, Mapping) else {}, value)
        else:
            both = isinstance(given, Mapping) and isinstance(old, Mapping)
            merged[key] = merge(old, given) if both else given  # type: ignore[arg-type]
    return merged


def _method(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The name and the settings of a method, each by its own name."""
    before, name = below.get("name"), above.get("name", below.get("name"))
    below, above = registry.spread(str(before or name), below), registry.spread(str(name), above)
    if below and name != before:
        # Only what the other method also understands is carried over (say, the number of samples).
        known = registry.defaults(str(name))
        below = {key: setting for key, setting in below.items() if key in known}
    return {**below, **above}


def leave_open(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Selects what is taken from a paper's recipe beside what the user gave.

    Args:
        recipe: How the paper trained, nested.
        given: The user's settings, nested.

    Returns:
        The recipe without what the user gave, and without what depends on something that the user gave (`FOLLOWS`).
    """
    return _without(recipe, set(flat(given)))


def _without(recipe: Mapping[str, Any], given: Collection[str], before: str = "") -> dict[str, Any]:
    left: dict[str, Any] = {}
    for name, value in recipe.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping):
            left[name] = _without(value, given, f"{key}.")
        elif key not in given and FOLLOWS.get(key) not in given:
            left[name] = value
    return left


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flattens nested settings to their full names, such as `rollout.prompts`."""

    def leaves() -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{before}{name}.").items()
            else:
                yield f"{before}{name}", value

    return dict(leaves())
