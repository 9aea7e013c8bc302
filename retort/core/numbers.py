"""Which numbers a setting may have: finite unless it says otherwise, and of a size that fp32 holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from retort.errors import UserError, quoted

#: A setting that may be infinite, such as a limit or a threshold; every other number must be finite.
Unbounded = Annotated[float, "may be infinite"]
#: Beyond these, a count can only hang or exhaust the memory, and a number is infinity or 0 in fp32.
MOST, LARGEST, SMALLEST = 10**9, 1e30, 1e-30


def number_problem(number: float, *, tiny: bool = False) -> str | None:
    """The reason why a setting's number cannot be used, in words; None where it can.

    Infinity is no problem here; each setting decides whether it may be infinite.

    Args:
        number: The number, of any size.
        tiny: Allow numbers that are 0 in fp32: a method's clip or discount next to 0 is one of its limits.
    """
    if isinstance(number, bool):
        return None
    if isinstance(number, int):
        return f"it must lie within -{MOST} and {MOST}" if abs(number) > MOST else None
    if math.isnan(number):
        return "it must be a number"
    if math.isfinite(number) and abs(number) > LARGEST:
        return f"it must be at most {LARGEST:g} in size, or it is infinity in fp32"
    if not tiny and 0 < abs(number) < SMALLEST:
        return f"it must be 0 or at least {SMALLEST:g} in size, or it is 0 in fp32"
    return None


def numeric(hint: Any) -> bool:
    """Whether a setting with this annotation is a number, and neither true nor false."""
    kinds = {hint, *(kind for own in get_args(hint) for kind in (own, *get_args(own)))}
    return bool(kinds & {int, float}) and bool not in kinds


def refuse_truth(build: Callable[..., object], settings: Mapping[str, Any]) -> None:
    """Raises `UserError` where a numeric setting is given as true or false, which Python takes for 1 and 0."""
    hints = _hints(build)
    for name, value in settings.items():
        if isinstance(value, bool) and numeric(hints.get(name)):
            raise UserError(f"method.{name} is {str(value).lower()}; give a number")


def _hints(build: Callable[..., object]) -> dict[str, Any]:
    try:
        return get_type_hints(build, include_extras=True)
    except NameError:  # its annotations can be resolved only in its author's module
        return {}


def check_numbers(build: Callable[..., object], settings: Mapping[str, Any]) -> None:
    """Refuses NaN and numbers out of all range in any setting, and infinity in those that are not `Unbounded`."""
    refuse_truth(build, settings)
    hints = _hints(build)
    for name, value in settings.items():
        for number in _numbers(value):
            if isinstance(number, float) and math.isnan(number):
                raise UserError(f"method.{name} is nan; give a number")
            problem = number_problem(number, tiny=True)
            if problem is not None:
                raise UserError(f"method.{name}: {problem} (it is {quoted(number)})")
            if isinstance(number, float) and math.isinf(number) and name in hints and not _unbounded(hints[name]):
                raise UserError(f"method.{name} = {number:g}: it must be finite; give a number")


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        yield from (number for own in cast(Mapping[Any, object], value).values() for number in _numbers(own))
    elif isinstance(value, list | tuple):
        yield from (number for own in cast(Sequence[object], value) for number in _numbers(own))


def _unbounded(hint: Any) -> bool:
    """Whether an annotation, or a member of its union, is `Unbounded`; a setting that is no number (a table) may be."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[1:] == get_args(Unbounded)[1:]
    if hint is Any or get_origin(hint) in (Mapping, dict):
        return True
    return any(_unbounded(own) for own in get_args(hint))
