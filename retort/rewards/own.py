"""Verifiers of the user's own: a function of a prompt and a completion that says how good the completion is.

Where completions to one prompt are to be compared with each other, an object with a method `grade(group)` serves.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from retort.core.rollouts import Group, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.errors import UserError, did_you_mean, quoted
from retort.rewards.base import ByText, Grade, Grader

#: Before the name of what a run was given as an object, in its settings.
IN_MEMORY = "in memory: "
#: `module:function`, importable from the current folder.
_IMPORTED = re.compile(r"(?!.*\.py:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
#: Verdicts that are remembered: those of a batch, and of answers that come again.
_REMEMBERED = 10_000


#: A verifier of the user's own. The prompt is the row (`text`, `answer`, `id`, ...), the completion is all that was
#: written, thinking included.
OwnFunction = Callable[[Prompt, str], "float | Grade"]


class GradesGroups(Protocol):
    """An object of the user's own that grades all completions to a prompt at once."""

    def grade(self, group: Group, /) -> Sequence[float | Grade | None]:
        """A number or a `Grade` for each rollout, in order; None for one that cannot be graded."""
        ...


#: What a user may hand over.
Own = OwnFunction | GradesGroups


class OwnVerifier:
    """A function of the user's own as a verifier (see `retort.rewards.base.Verifier`).

    It is asked once about each completion to a prompt; the last 10,000 verdicts are remembered.
    """

    def __init__(self, grade: OwnFunction, name: str) -> None:
        """Asks nothing yet; `name` is for messages and for the run's settings."""
        self.name = name
        self._grade = grade
        self._said: OrderedDict[tuple[bytes, str], Grade] = OrderedDict()

    def __call__(self, prompt: Prompt, text: str) -> float:
        """The reward, from 0 to 1.

        Raises:
            UserError: The function raised, or returned what is no reward; the message names it and the row.
        """
        return self.grade(prompt, text).reward

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """The further measures of the completion, if it has any."""
        return self.grade(prompt, text).parts

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """All that the function says of a completion.

        Raises:
            UserError: As a call.
        """
        key = (_whole(prompt), text)
        if key not in self._said:
            self._said[key] = self._asked(prompt, text)
            if len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)
        return self._said[key]

    def _asked(self, prompt: Prompt, text: str) -> Grade:
        at = f"verifier '{self.name}', row '{prompt.id}'"
        try:
            said: Any = self._grade(prompt, text)
        except (Exception, SystemExit) as error:  # sys.exit() is no way to end a run either: it would not be saved
            raise _raised(error, at, f"the completion {quoted(text)}") from error
        return _checked(said, at)


class TalkingVerifier(OwnVerifier):
    """One that says in words what is wrong (see `retort.rewards.base.GivesFeedback`)."""

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the completion; empty if nothing is."""
        return self.grade(prompt, text).feedback or ""


class OwnGrader(Grader):
    """An object of the user's own as a grader: its `grade(group)` says how good the completions to a prompt are.

    Nothing is remembered: it is asked about each group once.
    """

    def __init__(self, own: GradesGroups, name: str, *, explains: bool = False) -> None:
        """Asks nothing yet; `name` is for messages and for the run's settings."""
        self._own, self._name, self._explains = own, name, explains

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    @property
    def explains(self) -> bool:
        """As it was given."""
        return self._explains

    def can_grade(self, prompt: Prompt) -> bool:
        """Always true: what it cannot grade, it says of the rollouts."""
        return True

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`.

        Raises:
            UserError: It raised, gave another number of grades, or what is no grade; the message names it and the row.
        """
        at = f"verifier '{self._name}', row '{group[0].prompt.id}'"
        try:
            said: Any = self._own.grade(group)
            found = list(said)
        except (Exception, SystemExit) as error:
            raise _raised(error, at, f"{len(group)} completions, first {quoted(group[0].text)}") from error
        if len(found) != len(group):
            raise UserError(f"{at}: it gave {len(found)} grades for {len(group)} completions; give one for each")
        return [None if one is None else _checked(one, at) for one in found]


def own_grader(own: Own, name: str, first: Prompt) -> Grader:
    """A grader from what the user handed over, which is tried before anything else is done.

    Args:
        own: A function of a prompt and a completion (see `own_verifier`), or else an object with a method
            `grade(group)`, which is tried on a group of two empty completions. Where it gives feedback on these, it
            counts as one that gives feedback.
        name: For messages.
        first: A prompt of the data.

    Raises:
        UserError: It cannot be called like that, or returns what is no reward.
    """
    if callable(own):
        return ByText(own_verifier(own, name, first))
    empty = TokenSequence.of([0])
    tried = OwnGrader(own, name).grade(tuple(Rollout(first, empty, member=member) for member in range(2)))
    return OwnGrader(own, name, explains=any(grade is not None and grade.feedback for grade in tried))


def own_verifier(grade: OwnFunction, name: str, first: Prompt) -> OwnVerifier:
    """A verifier from a function, which is tried on an empty completion to one prompt before anything else is done.

    Args:
        grade: The function. Where it gives feedback on the empty completion, it counts as one that gives feedback.
        name: For messages.
        first: A prompt of the data.

    Raises:
        UserError: The function cannot be called like that, or returns what is no reward.
    """
    tried = OwnVerifier(grade, name)
    return TalkingVerifier(grade, name) if tried.grade(first, "").feedback else tried


def is_own(task: str | None) -> bool:
    """Whether a task is a function of the user's own: `module:function`, or one that was given as an object."""
    return task is not None and (task.startswith(IN_MEMORY) or _IMPORTED.fullmatch(task) is not None)


def name_of(grade: Own) -> str:
    """What stands for a function in the settings of a run: `module:function` where that leads to it again.

    Raises:
        UserError: It cannot be called.
    """
    if not _grades(grade):
        raise UserError(
            f"verifier = {quoted(grade)}: give a function of a prompt and a completion, an object with a method "
            "grade(group), or 'module:function'"
        )
    module, name = getattr(grade, "__module__", None), getattr(grade, "__qualname__", None)
    found: Any = sys.modules.get(module) if module and module != "__main__" else None
    for part in str(name).split("."):
        found = getattr(found, part, None)
    if found is grade and _IMPORTED.fullmatch(f"{module}:{name}"):
        return f"{module}:{name}"
    return f"{IN_MEMORY}{name or type(grade).__qualname__}"


def imported(task: str) -> Own:
    """The function, or the object with a method `grade(group)`, that `module:name` names.

    The current folder is looked in, too, after all others.

    Raises:
        UserError: No such module or function, or the module cannot be imported.
    """
    module, _, name = task.partition(":")
    if task.startswith(IN_MEMORY):
        raise UserError(
            f"task: the verifier '{task.removeprefix(IN_MEMORY)}' was given as an object and cannot be imported; go on "
            "with retort.distill(resume=..., verifier=...)"
        )
    here = os.getcwd()
    if here not in sys.path:  # for good: what it imports when it is called lies there, too
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name and f"{module}.".startswith(f"{error.name}.") else f" (it imports '{error.name}')"
        raise UserError(
            f"task = {task}: there is no module '{module if missing else error.name}' here{missing}; start retort in "
            "the folder of the module, or put that on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"task = {task}: importing '{module}' raised {type(error).__name__}: {words}") from error
    where = getattr(found, "__file__", None) or "built into Python"
    for part in name.split("."):
        if not hasattr(found, part):
            names = [known for known in vars(found) if not known.startswith("_") and callable(getattr(found, known))]
            raise UserError(f"task = {task}: '{module}' ({where}) has no '{part}'; {did_you_mean(part, names)}")
        found = getattr(found, part)
    if not _grades(found):
        raise UserError(
            f"task = {task}: that is a {type(found).__name__}; name a function of a prompt and a completion, or an "
            "object with a method grade(group)"
        )
    return cast("Own", found)


def _grades(own: object) -> bool:
    return callable(own) or callable(getattr(own, "grade", None))


def _raised(error: BaseException, at: str, what: str) -> UserError:
    kind, words = type(error).__name__, " ".join(str(error).split())
    said = f"{kind}: {words[:300]}" if words else kind
    return UserError(f"{at}: it raised {said} on {what}; whatever a model writes must get a reward")


def _checked(said: Any, at: str) -> Grade:
    """What the user's own said of a completion, as plain numbers.

    Raises:
        UserError: It is no grade.
    """
    grade = said if isinstance(said, Grade) else Grade(said)
    reward = _number(grade.reward)
    if reward is None or not 0 <= reward <= 1:
        raise UserError(
            f"{at}: its reward is {quoted(grade.reward)}; return a number from 0 (wrong) to 1 (right), or a "
            "retort.Grade with one"
        )
    if not isinstance(grade.parts, Mapping):
        raise UserError(f"{at}: its parts are {quoted(grade.parts)}; give a mapping from names to numbers")
    parts = {str(name): _number(value) for name, value in grade.parts.items()}
    for name, value in parts.items():
        if value is None:
            raise UserError(f"{at}: its part '{name}' is {quoted(grade.parts[name])}; a part is a finite number")
    if grade.feedback is not None and not isinstance(grade.feedback, str):
        raise UserError(f"{at}: its feedback is {quoted(grade.feedback)}; feedback is a text, or None")
    return Grade(reward, {name: value for name, value in parts.items() if value is not None}, grade.feedback)


def _whole(prompt: Prompt) -> bytes:
    """A digest of all that a verifier may look at: rows to learn from and to judge on may have one id and one text."""
    return hashlib.sha256(repr(prompt).encode("utf-8", "surrogatepass")).digest()


def _number(value: Any) -> float | None:
    """A finite number, also one of numpy or torch; None for anything else."""
    if isinstance(value, (str, bytes)) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
