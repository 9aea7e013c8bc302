"""The user's own verifiers: functions of a prompt and a completion that return a grade.

To compare the completions of one prompt with each other, use an object with a method `grade(group)`.
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

#: Prefix, in a run's settings, of the name of a verifier that was given as an object.
IN_MEMORY = "in memory: "
#: `module:function`, importable from the current folder.
_IMPORTED = re.compile(r"(?!.*\.py:)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
#: Number of grades that are cached: those of a batch, and of completions that come again.
_REMEMBERED = 10_000


#: The user's own verifier. The prompt is the row (`text`, `answer`, `id`, ...), the completion is all generated text,
#: thinking included.
UserFunction = Callable[[Prompt, str], "float | Grade"]


class GradesGroups(Protocol):
    """The user's own object that grades all completions of a prompt at once."""

    def grade(self, group: Group, /) -> Sequence[float | Grade | None]:
        """Returns a number or a `Grade` for each rollout, in order; None for one that cannot be graded."""
        ...


#: The user's own verifier or grader.
UserGrading = UserFunction | GradesGroups


class FunctionVerifier:
    """The user's own function as a verifier (see `retort.rewards.base.Verifier`).

    It is called once for each completion of a prompt; the last 10,000 grades are cached.
    """

    def __init__(self, grade: UserFunction, name: str) -> None:
        """Wraps a function; `name` is for messages and for the run's settings."""
        self.name = name
        self._grade = grade
        self._grades_seen: OrderedDict[tuple[bytes, str], Grade] = OrderedDict()

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns the reward, from 0 to 1.

        Raises:
            UserError: The function raised, or returned no reward; the message names it and the row.
        """
        return self.grade(prompt, text).reward

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """The further measures of the completion, if it has any."""
        return self.grade(prompt, text).parts

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Returns the function's whole grade of a completion.

        Raises:
            UserError: As for a call.
        """
        key = (_whole(prompt), text)
        if key not in self._grades_seen:
            self._grades_seen[key] = self._ask_function(prompt, text)
            if len(self._grades_seen) > _REMEMBERED:
                self._grades_seen.popitem(last=False)
        return self._grades_seen[key]

    def _ask_function(self, prompt: Prompt, text: str) -> Grade:
        at = f"verifier '{self.name}', row '{prompt.id}'"
        try:
            returned: Any = self._grade(prompt, text)
        except (Exception, SystemExit) as error:  # sys.exit() must not end a run either: it would not be saved
            raise _raised(error, at, f"the completion {quoted(text)}") from error
        return _checked(returned, at)


class FeedbackVerifier(FunctionVerifier):
    """A verifier of the user's own with feedback (see `retort.rewards.base.GivesFeedback`)."""

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the completion; empty if nothing is."""
        return self.grade(prompt, text).feedback or ""


class ObjectGrader(Grader):
    """The user's own object as a grader, by its method `grade(group)`.

    Nothing is cached: it is called once for each group.
    """

    def __init__(self, own: GradesGroups, name: str, *, explains: bool = False) -> None:
        """Wraps an object; `name` is for messages and for the run's settings."""
        self._own, self._name, self._explains = own, name, explains

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    @property
    def explains(self) -> bool:
        """The value that was given."""
        return self._explains

    def can_grade(self, prompt: Prompt) -> bool:
        """Always true: the object itself returns None for rollouts that it cannot grade."""
        return True

    def grade(self, group: Group) -> list[Grade | None]:
        """See `Grader`.

        Raises:
            UserError: It raised, or returned another number of grades or no grade; the message names it and the row.
        """
        at = f"verifier '{self._name}', row '{group[0].prompt.id}'"
        try:
            returned: Any = self._own.grade(group)
            grades = list(returned)
        except (Exception, SystemExit) as error:
            raise _raised(error, at, f"{len(group)} completions, first {quoted(group[0].text)}") from error
        if len(grades) != len(group):
            raise UserError(f"{at}: it gave {len(grades)} grades for {len(group)} completions; give one for each")
        return [None if one is None else _checked(one, at) for one in grades]


def user_grader(own: UserGrading, name: str, first: Prompt) -> Grader:
    """Makes a grader from the user's own object or function, after a trial.

    Args:
        own: A function of a prompt and a completion (see `user_verifier`), or else an object with a method
            `grade(group)`, which is tried on a group of two empty completions. If it gives feedback on these, it counts
            as a grader with feedback.
        name: Name for messages.
        first: A prompt of the data.

    Raises:
        UserError: It cannot be called like that, or returns no reward.
    """
    if callable(own):
        return ByText(user_verifier(own, name, first))
    empty = TokenSequence.of([0])
    tried = ObjectGrader(own, name).grade(tuple(Rollout(first, (empty,), member=member) for member in range(2)))
    return ObjectGrader(own, name, explains=any(grade is not None and grade.feedback for grade in tried))


def user_verifier(grade: UserFunction, name: str, first: Prompt) -> FunctionVerifier:
    """Makes a verifier from a function, after a trial on an empty completion of one prompt.

    Args:
        grade: The function. If it gives feedback on the empty completion, it counts as one with feedback.
        name: Name for messages.
        first: A prompt of the data.

    Raises:
        UserError: The function cannot be called like that, or returns no reward.
    """
    tried = FunctionVerifier(grade, name)
    return FeedbackVerifier(grade, name) if tried.grade(first, "").feedback else tried


def is_user_defined(task: str | None) -> bool:
    """Whether a task is the user's own function: `module:function`, or one that was given as an object."""
    return task is not None and (task.startswith(IN_MEMORY) or _IMPORTED.fullmatch(task) is not None)


def name_of(grade: UserGrading) -> str:
    """The name of a function in a run's settings: `module:function` where that leads to it again.

    Raises:
        UserError: It cannot be called.
    """
    if not _grades(grade):
        raise UserError(
            f"verifier = {quoted(grade)}: give a function of a prompt and a completion, an object with a method "
            "grade(group), or 'module:function'"
        )
    module, name = getattr(grade, "__module__", None), getattr(grade, "__qualname__", None)
    named: Any = sys.modules.get(module) if module and module != "__main__" else None
    for part in str(name).split("."):
        named = getattr(named, part, None)
    if named is grade and _IMPORTED.fullmatch(f"{module}:{name}"):
        return f"{module}:{name}"
    return f"{IN_MEMORY}{name or type(grade).__qualname__}"


#: What a verifier is, in words.
_VERIFIER = "a function of a prompt and a completion, or an object with a method grade(group)"


def imported(task: str, *, setting: str = "task", wanted: str = _VERIFIER) -> UserGrading:
    """Imports the function, or the object with a method `grade(group)`, that `module:name` names.

    The current folder is searched, too, after all others.

    Args:
        task: The name.
        setting: The setting that has it, for messages.
        wanted: What it should be, for messages.

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
    if here not in sys.path:  # permanently: modules that it imports when called lie there, too
        sys.path.append(here)
    try:
        named: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name and f"{module}.".startswith(f"{error.name}.") else f" (it imports '{error.name}')"
        raise UserError(
            f"{setting} = {task}: there is no module '{module if missing else error.name}' here{missing}; start retort "
            "in the folder of the module, or put that on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{setting} = {task}: importing '{module}' raised {type(error).__name__}: {words}") from error
    where = getattr(named, "__file__", None) or "built into Python"
    for part in name.split("."):
        if not hasattr(named, part):
            names = [known for known in vars(named) if not known.startswith("_") and callable(getattr(named, known))]
            raise UserError(f"{setting} = {task}: '{module}' ({where}) has no '{part}'; {did_you_mean(part, names)}")
        named = getattr(named, part)
    if not _grades(named):
        raise UserError(f"{setting} = {task}: that is a {type(named).__name__}; name {wanted}")
    return cast("UserGrading", named)


def _grades(own: object) -> bool:
    return callable(own) or callable(getattr(own, "grade", None))


def _raised(error: BaseException, at: str, what: str) -> UserError:
    kind, words = type(error).__name__, " ".join(str(error).split())
    returned = f"{kind}: {words[:300]}" if words else kind
    return UserError(f"{at}: it raised {returned} on {what}; every completion must get a reward")


def _checked(returned: Any, at: str) -> Grade:
    """Checks the result of the user's own function, and returns it with plain numbers.

    Raises:
        UserError: It is no grade.
    """
    grade = returned if isinstance(returned, Grade) else Grade(returned)
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
    """A digest of all that a verifier may read: rows for training and for evaluation may share one id and one text."""
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
