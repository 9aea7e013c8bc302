"""Answers of a teacher that talks, by which a rubric is drawn: from a file that was made before, or asked for now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retort.chat import Asker, ChatRequest, Failure, Question, Unusable
from retort.chat.record import PASSING
from retort.core.grading import RubricPlan
from retort.core.rollouts import Prompt
from retort.errors import UserError, quoted, shortened, visible
from retort.files import write_text
from retort.rewards.rubric_protocol import graded_text, need_text

__all__ = ["AskedReferences", "References", "StoredReferences", "prompt_digest", "store_references"]

FORMAT = "retort.references.v1"
#: Prompts that a teacher is asked about before its answers are written down.
_AT_ONCE = 64
#: (prompts done, of how many).
Progress = Callable[[int, int], object]


def _quiet(done: int, total: int) -> None:
    """Tells nobody."""


class References(Protocol):
    """The teacher's answers to prompts."""

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """Returns the answers to each prompt, each once and without thoughts; or why there are none."""
        ...

    def known(self, prompt: Prompt) -> list[str] | None:
        """Returns the answers to a prompt as far as nobody has to be asked; None where somebody has."""
        ...

    def need(self, prompts: Sequence[Prompt]) -> None:
        """Raises `UserError` if it is known that there are no answers to one of the prompts."""
        ...


class AskedReferences(References):
    """Asks the teacher, once for each prompt: its answers do not depend on when it is asked.

    Answers that did not come because of a failure on the way are asked for at the next visit to the prompt: else a run
    that is resumed, which remembers nothing of it, would take another course.
    """

    def __init__(self, asker: Asker, plan: RubricPlan, seed: int) -> None:
        """Takes whom to ask, how often and how, and the run's seed."""
        self._asker, self._plan, self._seed = asker, plan, seed
        self._known: dict[str, list[str]] = {}

    def known(self, prompt: Prompt) -> list[str] | None:
        """See `References`."""
        return self._known.get(prompt_digest(prompt))

    def need(self, prompts: Sequence[Prompt]) -> None:
        """See `References`: whether the teacher answers is not known before."""

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """See `References`; of a prompt that the teacher answered at least once, the answers that there are."""
        some: dict[str, list[str]] = {}
        keys = [prompt_digest(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        count = self._plan.references
        asked = [self._question(prompt, number) for prompt in missing.values() for number in range(count)]
        answers, failed = self._asker.ask(asked) if asked else [], dict[str, Failure]()
        for place, key in enumerate(missing):
            own = answers[place * count : (place + 1) * count]
            texts = _each_once([text for text in own if not isinstance(text, Failure)])
            failures = [one for one in own if isinstance(one, Failure)]
            if texts:
                settled = all(one.reason not in PASSING for one in failures)
                (self._known if settled else some)[key] = texts
            else:
                failed[key] = failures[0]
        return [failed[key] if key in failed else some.get(key) or self._known[key] for key in keys]

    def settled(self, prompt: Prompt) -> bool:
        """Whether the teacher was heard as often as it is asked about a prompt, and said something usable."""
        return prompt_digest(prompt) in self._known

    def _question(self, prompt: Prompt, number: int) -> Question[str]:
        plan = self._plan
        seed = seed_of(self._seed, "reference", prompt_digest(prompt), number)
        request = ChatRequest(
            "reference", prompt.messages, plan.reference_tokens, plan.reference_temperature, seed=seed
        )
        return Question(request, _read)


class _Head(BaseModel):
    """The first line of a file of references: whose answers they are, as a digest and for people."""

    model_config = ConfigDict(extra="forbid")

    format: str
    teacher: str
    name: str = ""


class _Row(BaseModel):
    """Another line: a prompt's digest, its row's name for people, and the teacher's answers."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    id: str
    answers: list[str] = Field(min_length=1)


class StoredReferences(References):
    """Answers from a file that `store_references` made."""

    def __init__(self, path: Path, teacher: str, name: str = "") -> None:
        """Reads a file.

        Args:
            path: The file, JSON lines.
            teacher: Fingerprint of the teacher whose answers are wanted.
            name: Its name, for messages.

        Raises:
            UserError: The file cannot be read, is damaged, or holds the answers of another teacher.
        """
        self._path = path
        try:
            # Behind the last end of a line is what was being written when somebody was interrupted.
            self._whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
            head, *lines = self._whole.split("\n")
            found = _Head.model_validate_json(head)
            rows = [_Row.model_validate_json(line) for line in lines]
        except OSError as error:
            raise UserError(f"judge.references = {path}: {error.strerror}") from None
        except (ValueError, ValidationError):
            raise UserError(f"judge.references = {path}: that is no file of references; make it anew") from None
        if found.format != FORMAT:
            raise UserError(f"judge.references = {path}: its format is {quoted(found.format, 40)}, not {FORMAT}")
        if found.teacher != teacher:
            theirs, ours = found.name or found.teacher[:12], name or teacher[:12]
            raise UserError(
                f"judge.references = {path}: its answers are of another teacher ({visible(shortened(theirs, 200))}) "
                f"than the one of this run ({visible(shortened(ours, 200))}); make the file anew, or name that teacher"
            )
        self._answers = {row.prompt: _each_once(row.answers) for row in rows}

    def has(self, prompt: Prompt) -> bool:
        """Whether it has answers to a prompt."""
        return prompt_digest(prompt) in self._answers

    def cut(self) -> None:
        """Cuts what is not whole off the end of the file."""
        write_text(self._path, self._whole + "\n")

    def known(self, prompt: Prompt) -> list[str] | None:
        """See `References`."""
        return self._answers.get(prompt_digest(prompt))

    def need(self, prompts: Sequence[Prompt]) -> None:
        """See `References`."""
        lacking = [prompt.id for prompt in prompts if not self.has(prompt)]
        if lacking:
            raise UserError(
                f"judge.references = {self._path}: {len(lacking)} of {len(prompts)} prompts have no answer in it "
                f"('{lacking[0]}' first); make the file for these data"
            )

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """See `References`."""
        none = Failure("empty", "the file of references has no answer to this prompt")
        return [self._answers.get(prompt_digest(prompt), none) for prompt in prompts]


def store_references(
    path: Path,
    prompts: Sequence[Prompt],
    asker: Asker,
    plan: RubricPlan,
    *,
    name: str = "",
    seed: int = 0,
    progress: Progress = _quiet,
) -> int:
    """Asks a teacher for its answers to prompts and writes them to a file, for `StoredReferences`.

    A file of the same teacher that is there already is added to: whoever was interrupted calls it again.

    Args:
        path: The file.
        prompts: The prompts; one to which the teacher has no usable answer is left out, and so is one to which some
            answers did not come because of a failure on the way.
        asker: Asks the teacher.
        plan: How often each prompt is asked, and how.
        name: The teacher's name, for people who read the file.
        seed: Seed of the teacher's answers.
        progress: Told how many prompts are done, and of how many.

    Returns:
        Number of prompts that were left out.

    Raises:
        UserError: The file that is there is none of references, of another teacher, or cannot be written; or a prompt
            has tools.
        BudgetSpentError: The budget is used up; what was answered is in the file.
    """
    need_text(prompts)
    try:
        if not path.exists():
            head = _Head(format=FORMAT, teacher=asker.fingerprint, name=name)
            write_text(path, json.dumps(head.model_dump()) + "\n")
        stored = StoredReferences(path, asker.fingerprint, name)
        stored.cut()
        wanted = [prompt for prompt in prompts if not stored.has(prompt)]
        asked, failed = AskedReferences(asker, plan, seed), 0
        for start in range(0, len(wanted), _AT_ONCE):
            progress(start, len(wanted))
            some = wanted[start : start + _AT_ONCE]
            for prompt, answers in zip(some, asked.of(some), strict=True):
                if isinstance(answers, Failure) or not asked.settled(prompt):
                    failed += 1
                    continue
                row = _Row(prompt=prompt_digest(prompt), id=prompt.id, answers=answers)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row.model_dump()) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    progress(len(wanted), len(wanted))
    return failed


def prompt_digest(prompt: Prompt) -> str:
    """A digest of what a model reads of a prompt, whatever its row is called."""
    read = json.dumps([message.as_dict() for message in prompt.messages], sort_keys=True)
    return hashlib.sha256("".join([read, *(image.digest for image in prompt.images)]).encode()).hexdigest()


def seed_of(*words: object) -> int:
    """A seed from what a request is about, from 0 to 2^31 - 1, which all servers take."""
    text = "|".join(map(str, words)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def _each_once(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(graded_text(text) for text in texts))


def _read(text: str) -> str:
    if not text.strip():
        raise Unusable("the answer is empty")
    return text
