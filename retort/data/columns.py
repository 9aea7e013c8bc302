"""Maps columns of a file to Retort's, and makes notes on columns that are not used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from retort.errors import UserError, did_you_mean, shortened

__all__ = ["COLUMNS", "PRIVILEGED", "Seen", "check_mapping", "lookup", "no_prompt"]

#: Columns of texts that only a teacher may see.
PRIVILEGED = ("solution", "hint", "outcome", "demonstration", "wrong")
#: The columns that Retort knows; a note names any other column of a file.
COLUMNS = (
    *("prompt", "messages", "system", "tools", "id", "answer", "response", "clean", "domain", "images"),
    *("teacher_images", *PRIVILEGED),
)

#: Names of the prompt in other data sets; an error suggests them, and they are never guessed.
_PROMPTS = ("problem", "question", "instruction", "query", "input", "text")
#: Names of the reference answer, and of a response to learn from, in other data sets; a note suggests them.
_ANSWERS = ("ground_truth", "final_answer", "expected_answer", "gold", "target", "answer", "label")
_RESPONSES = ("completion", "completions", "output", "chosen", "generation", "generated_solution")

#: The advice for a preference pair, whose turns are in `chosen`.
_PREFERRED = (
    "; for the preferred response map columns.messages=chosen, which reads its turns and the response that ends them "
    "(nothing is learnt from the rejected one)"
)


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The cell of a column, or of a part of one: `reward_model.ground_truth`. None where it is missing."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _names(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row, and the parts of its structures as a mapping names them."""
    inner = [f"{name}.{part}" for name, value in row.items() if isinstance(value, Mapping) for part in value]
    return [*map(str, row), *inner]


def check_mapping(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Refuses a mapping to a column that the first row does not have.

    Raises:
        UserError: There is such a mapping; the message has the nearest name.
    """
    for ours, theirs in columns.items():
        *above, last = [theirs] if theirs in row else theirs.split(".")
        inside = lookup(row, ".".join(above)) if above else row
        if not isinstance(inside, Mapping) or last not in inside:
            raise UserError(
                f"{where}: '{ours}' is mapped to a column '{theirs}' that is not there; "
                f"{did_you_mean(theirs, _names(row))}"
            )


def no_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The reason why a row has no prompt, and which of its columns may be meant."""
    names = [str(name) for name in row]
    wanted = [columns.get("prompt", "prompt"), columns.get("messages", "messages")]
    if any(name in names for name in wanted):
        return f"'{' and '.join(name for name in wanted if name in names)}' is null"
    near = [match for name in wanted for match in difflib.get_close_matches(name, names, n=1, cutoff=0.6)]
    near += [name for name in _PROMPTS if name in names]
    parts = [name for name in _names(row) if "." in name]
    near += [name for name in parts if name.rsplit(".", 1)[1] in ("prompt", "messages", "conversations", *_PROMPTS)]
    hint = (
        f"; did you mean '{near[0]}'? rename it or map it: columns.prompt={near[0]}, "
        f'in a file columns = {{prompt = "{near[0]}"}}'
        if near
        else _other_shape(row)
    )
    return f"no column '{wanted[0]}' or '{wanted[1]}' (found: {', '.join(names) or 'nothing'}){hint}"


def _other_shape(row: Mapping[str, Any]) -> str:
    """The advice for a row whose prompt is inside another structure, as an ending of a message."""
    if isinstance(row.get("chosen"), list | tuple):
        return _PREFERRED
    rows = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    return f"; if its rows are the list in '{rows[0]}', give that list alone" if rows else ""


class Seen:
    """The columns of the rows so far, and which of them were read."""

    def __init__(self) -> None:
        """Begins without columns."""
        self.read: set[str] = set()
        self._parts: dict[str, dict[str, None]] = {}

    def row(self, row: Mapping[str, Any]) -> None:
        """Adds the columns of a row, and the parts of its structures."""
        for name, value in ((str(name), value) for name, value in row.items()):
            if name not in self._parts:
                self._parts[name] = {}
            if isinstance(value, dict):
                self._parts[name].update(dict.fromkeys(map(str, value)))

    def notes(self, *, answers: bool, responses: bool) -> list[str]:
        """One sentence on the columns that were not read; none where all were.

        Args:
            answers: Whether rows have an answer; else a column that may hold it is named.
            responses: The same for a given response.
        """
        unused = {name: parts for name, parts in self._parts.items() if name not in self.read}
        if not unused:
            return []
        shown = [f"{name} (of {', '.join(parts)})" if parts else name for name, parts in unused.items()]
        columns_there = [*unused, *(f"{name}.{part}" for name, parts in unused.items() for part in parts)]
        hints = [] if answers else _hint("answer", _ANSWERS, columns_there, "the right answer")
        hints += [] if responses else _hint("response", _RESPONSES, columns_there, "the response to learn from")
        if "input" in unused and "instruction" in self.read:
            hints.append("`input` belongs to an Alpaca row: it is read with `instruction` where neither is mapped")
        return ["; ".join([f"columns not used: {shortened(', '.join(shown), 400)}", *hints])]


def _hint(ours: str, theirs: Iterable[str], columns_there: Iterable[str], meaning: str) -> list[str]:
    candidates = [column for name in theirs for column in columns_there if column.rsplit(".", 1)[-1] == name]
    return [f"if `{candidates[0]}` is {meaning}, map it: columns.{ours}={candidates[0]}"] if candidates else []
