r"""Verifiers: 1.0 for a right response, 0.0 for a wrong one, for any response.

Only the text after a closed thinking block is graded (`retort.align.text.after_thinking`); a block that is never closed
holds no answer. Model output is hostile: it may be a mebibyte of brackets, or `\boxed{9^{9^{9}}}`. A verifier neither
raises nor hangs on it. Numbers, letters and words are compared here (`retort.rewards.answers`), and texts that cannot
be computed are refused by their form. All else is compared in a worker process (`retort.rewards.math_worker`) within
bounds of processor time. The timeouts of math-verify itself are not used: they interrupt by `signal.alarm`, which works
on the main thread only, takes the alarm from other users, waits for C code to return, and bounds no memory.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from retort.align.text import after_thinking
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.rewards import answers
from retort.rewards.base import GivesFeedback, GivesParts, Verifier
from retort.rewards.math_process import MathProcess

__all__ = [
    "BaitVerifier",
    "CoachedVerifier",
    "CountdownVerifier",
    "ExactVerifier",
    "GivesFeedback",
    "GivesParts",
    "MathVerifier",
    "RankingVerifier",
    "ShapesVerifier",
    "Verifier",
    "last_boxed",
]

#: Characters of a boxed answer (a longer one is wrong), and of the end of a text that is searched for an unboxed one.
MOST_BOXED = 1000
MOST_TAIL = 1000
#: Characters from the end of a text that are searched for the box.
MOST_TEXT = 100_000

#: Comparisons of a batch without an end after which the others of the batch get the shorter limit.
MOST_GIVEN_UP = 8
SHORT_LIMIT_S = 0.25


class ExactVerifier:
    """Right if the text equals the answer, except for white space."""

    name, needs_answer = "exact", True

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        return float(after_thinking(text).split() == reference_answer(prompt, self.name).split())


class CountdownVerifier:
    """Right if the text solves the Countdown problem that the prompt states; needs no answer."""

    name = "countdown"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        from retort.tasks.countdown import check

        return float(check(prompt.readable, after_thinking(text)))


class RankingVerifier:
    """Right if the text parses as the list that the prompt requests, however good the ranking; needs no answer."""

    name = "ranking"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a well-formed response to the prompt, else 0.0."""
        from retort.tasks.ranking import check

        return float(check(prompt.readable, after_thinking(text)))


class CoachedVerifier:
    """Right if the text solves the Countdown problem after the prompt's last `;`; has feedback."""

    name = "coached"

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        from retort.tasks.coached import check

        return float(check(prompt.readable, after_thinking(text)))

    def feedback(self, prompt: Prompt, text: str) -> str:
        """What is wrong with the text, such as `step 2 : no 7`; empty if nothing is."""
        from retort.tasks.coached import feedback

        return feedback(prompt.readable, after_thinking(text))


class BaitVerifier(CoachedVerifier):
    """The same for prompts with a wrong suggestion; it also measures whether that was followed."""

    name = "bait"

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """`followed`: 1.0 if the text is the suggestion, token for token; nothing where the prompt has none."""
        from retort.tasks.coached import bait, followed

        return (
            {}
            if bait(prompt.readable) is None
            else {"followed": float(followed(prompt.readable, after_thinking(text)))}
        )


class ShapesVerifier:
    """Right if the text ends in `answer` and the right answer; it also measures whether a wrong note was followed."""

    name, needs_answer = "shapes", True

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        from retort.tasks.shapes import check

        return float(check(reference_answer(prompt, self.name), after_thinking(text)))

    def parts(self, prompt: Prompt, text: str) -> Mapping[str, float]:
        """`followed`: 1.0 if the text answers what the note suggests; nothing where the note is right, or missing."""
        from retort.tasks.shapes import answer_in, noted

        note = noted(prompt.text)
        if note is None or note == reference_answer(prompt, self.name).strip():
            return {}
        return {"followed": float(answer_in(after_thinking(text)) == note)}


class MathVerifier:
    r"""Right if the last `\boxed{...}` (else the final expression of the text) equals the answer, by math-verify.

    Only that one box counts: a text that boxes several answers gets no second guess. A box without end (the text was
        truncated in it) does not count. Numbers are compared exactly, letters of a multiple choice as letters, words as
        words. All else goes to the worker process, one request at a time, from any thread. Use it as a context manager,
        or drop it, to end the worker.

    A comparison is given up, and the response is wrong, where its form shows that it has no end (a tower of powers), or
    after `limit_s` seconds of processor time. After 8 of those in one batch (see `start_batch`) the others of the batch
    get a quarter of a second each. Both are counted by the texts of the batch alone, so that a resumed run gives the
    same grades; `given_up` is their number.

    Args:
        limit_s: Seconds of processor time after which a comparison is given up and the response is wrong.

    Raises:
        UserError: math-verify is not installed.
    """

    name, needs_answer = "math", True

    def __init__(self, limit_s: float = 2.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "verifying mathematics needs the library `math-verify`; install it with "
                "pip install 'retort-distill[math]'"
            )
        self.limit_s = limit_s
        self.given_up = 0
        self._process = MathProcess()
        # Rollouts of one prompt often agree, and a hopeless comparison should cost its time limit only once. The limit
        # is part of the cache's key: a grade does not depend on other batches.
        self._remembered = lru_cache(maxsize=4096)(self._process.equal)
        self._endless: set[tuple[str, str]] = set()

    def __call__(self, prompt: Prompt, text: str) -> float:
        """Returns 1.0 if the text is a right response to the prompt, else 0.0."""
        gold, text = _gold(reference_answer(prompt, self.name)), after_thinking(text)
        boxed = last_boxed(text[-MOST_TEXT:])
        if boxed is not None:
            right = len(boxed) <= MOST_BOXED and bool(boxed.strip()) and self._is_right(gold, boxed)
            return float(right)
        tail = text[-MOST_TAIL:].strip()
        if not tail:
            return 0.0
        stated = answers.stated(tail)
        decided = None if stated is None else self._decided(gold, stated)
        if decided is None and answers.choice(gold) is None and answers.word(gold) is None:
            tail = tail.removesuffix(".")  # math-verify reads "14/3." as a float
            decided = _compact(tail) == _compact(gold) or self._equal(gold, tail, boxed=False)
        return float(bool(decided))

    def start_batch(self) -> None:
        """Begins a batch: resets the count of comparisons that were given up."""
        self._endless.clear()

    def close(self) -> None:
        """Ends the worker process; a later call starts another."""
        self._process.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_right(self, gold: str, stated: str) -> bool:
        decided = self._decided(gold, stated)
        return self._equal(gold, stated, boxed=True) if decided is None else decided

    def _decided(self, gold: str, stated: str) -> bool | None:
        """Whether an answer is right, where that is decided without math-verify; None where not."""
        if _compact(gold) == _compact(stated):
            return True
        letter = answers.choice(gold)
        if letter is not None:
            return answers.letter_of(stated) == letter
        ours, theirs = answers.tidy(gold), answers.tidy(answers.without_letter(stated))
        if ours == theirs:
            return bool(ours)
        numbers = answers.number(ours), answers.number(theirs)
        if numbers[0] is not None and numbers[1] is None:
            numbers = numbers[0], answers.number(re.sub(r"^[A-Za-z](?:_\w)?\s*=\s*", "", theirs))
        if numbers[0] is not None and numbers[1] is not None:
            return answers.same_number(numbers[0], numbers[1])
        plain = answers.word(ours)
        if plain is not None:
            return answers.word(theirs) == plain
        based = re.fullmatch(r"([0-9A-F]+)_\{?([0-9]+)\}?", ours.replace(" ", ""))
        if based is not None:
            stated_base = re.fullmatch(r"([0-9A-F]+)(?:_\{?([0-9]+)\}?)?", theirs.replace(" ", ""))
            return stated_base is not None and stated_base[1] == based[1] and stated_base[2] in (None, based[2])
        return None

    def _equal(self, gold: str, stated: str, *, boxed: bool) -> bool:
        """Whether math-verify finds an answer, or the one extracted from a text, equal to the reference answer."""
        exact = answers.number(answers.tidy(gold))
        if boxed:
            stated = answers.tidy(answers.without_letter(stated))
            if not stated or not answers.comparable(gold, stated):
                return False
            if exact is not None and re.search(r"[0-9.] +[0-9.]", stated):
                return False  # two numbers, which math-verify would read as one
        if answers.hopeless(stated):
            self.given_up += 1
            return False
        limit_s = SHORT_LIMIT_S if len(self._endless) >= MOST_GIVEN_UP else self.limit_s
        wanted = gold if exact is None else exact.exact()
        equal = self._remembered(wanted, stated, boxed, _digits(exact), min(limit_s, self.limit_s))
        if equal is None:
            self.given_up += 1
            self._endless.add((gold, stated))
        return bool(equal)


_OF_TASKS = (CountdownVerifier, RankingVerifier, CoachedVerifier, BaitVerifier, ShapesVerifier)
VERIFIERS = {verifier.name: verifier for verifier in (*_OF_TASKS, ExactVerifier, MathVerifier)}
#: These compare with the prompt's answer; the others read the problem itself.
NEED_ANSWER = tuple(name for name, verifier in VERIFIERS.items() if getattr(verifier, "needs_answer", False))


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` or `\fbox{...}` of a text; None if there is none."""
    end = len(text)
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)\{", text))):
        depth = 0
        for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end() - 1, end):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return text[box.end() : brace.start()]
        # This one is never closed, so neither is one around it: an earlier box must end before it. So the scan is
        # linear, however many boxes are opened.
        end = box.start()
    return None


def reference_answer(prompt: Prompt, task: str) -> str:
    """The reference answer of a prompt.

    Raises:
        UserError: The prompt has none, and the task needs it.
    """
    if prompt.answer is None:
        raise UserError(f"prompt '{prompt.id}' has no answer, which task '{task}' needs; add a column 'answer'")
    return prompt.answer


def check_gradable(prompts: Sequence[Prompt]) -> None:
    """Raises a UserError for the first prompt whose answer no response could equal."""
    checked: set[str] = set()
    for prompt in prompts:
        gold = _gold(reference_answer(prompt, MathVerifier.name))
        if gold in checked:
            continue
        checked.add(gold)
        why = _ungradable(gold)
        if why:
            shown = gold if len(gold) <= 40 else gold[:37] + "..."
            raise UserError(
                f"prompt '{prompt.id}': its answer {shown!r} cannot be graded as mathematics: {why}; correct it, leave "
                "the row out, or set task = 'exact'"
            )


def _ungradable(gold: str) -> str:
    if not answers.tidy(gold):
        return "it is empty"
    if len(gold) > MOST_BOXED:
        return f"it has {len(gold)} characters, more than the {MOST_BOXED} of an answer that is read"
    if re.fullmatch(r"[+-]?(?:nan|inf|infinity)", gold, re.IGNORECASE):
        return "it is not a finite number"
    if answers.hopeless(gold):
        return "its powers, factorials or brackets are too large to compute"
    read = answers.number(answers.tidy(gold))
    if re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", gold) and read is None:
        return "it is a number with too many digits"
    return ""


def _compact(text: str) -> str:
    # A blank between digits separates two numbers.
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text.strip()).strip("$")


def _gold(answer: str) -> str:
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip()


def _digits(gold: answers.Number | None) -> int:
    """Decimals to which math-verify compares: six, and more for a reference answer that is close to 0."""
    if gold is None or not gold.value or abs(gold.value) >= 1:
        return 6
    return 6 + math.ceil(math.log10(gold.value.denominator) - math.log10(abs(gold.value.numerator)))
