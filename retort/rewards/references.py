"""Answers of a teacher that talks, by which a rubric is drawn: from a file that was made before, or asked for now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retort.chat import Asker, ChatRequest, Failure, Question, Unusable
from retort.core.grading import RubricPlan
from retort.core.rollouts import Prompt
from retort.errors import UserError, quoted, shortened
from retort.files import write_text
from retort.rewards.rubric_protocol import graded_text

__all__ = ["AskedReferences", "References", "StoredReferences", "prompt_digest", "store_references"]

FORMAT = "retort.references.v1"


class References(Protocol):
    """The teacher's answers to prompts."""

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """Returns the answers to each prompt, each once and without thoughts; or why there are none."""
        ...

    def need(self, prompts: Sequence[Prompt]) -> None:
        """Raises `UserError` if it is known that there are no answers to one of the prompts."""
        ...


class AskedReferences(References):
    """Asks the teacher, once for each prompt: its answers do not depend on when it is asked."""

    def __init__(self, asker: Asker, plan: RubricPlan, seed: int) -> None:
        """Takes whom to ask, how often and how, and the run's seed."""
        self._asker, self._plan, self._seed = asker, plan, seed
        self._known: dict[str, list[str]] = {}

    def need(self, prompts: Sequence[Prompt]) -> None:
        """See `References`: whether the teacher answers is not known before."""

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """See `References`; of a prompt that the teacher answered at least once, the answers that there are."""
        keys = [prompt_digest(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        count = self._plan.references
        asked = [self._question(prompt, number) for prompt in missing.values() for number in range(count)]
        answers, failed = self._asker.ask(asked) if asked else [], dict[str, Failure]()
        for place, key in enumerate(missing):
            own = answers[place * count : (place + 1) * count]
            texts = _each_once([text for text in own if not isinstance(text, Failure)])
            if texts:
                self._known[key] = texts
            else:
                failed[key] = next(one for one in own if isinstance(one, Failure))
        return [failed[key] if key in failed else self._known[key] for key in keys]

    def _question(self, prompt: Prompt, number: int) -> Question[str]:
        plan = self._plan
        seed = seed_of(self._seed, "reference", prompt_digest(prompt), number)
        request = ChatRequest(
            "reference", prompt.messages, plan.reference_tokens, plan.reference_temperature, seed=seed
        )
        return Question(request, _read)


class _Head(BaseModel):
    """The first line of a file of references."""

    model_config = ConfigDict(extra="forbid")

    format: str
    teacher: str


class _Row(BaseModel):
    """Another line: a prompt's digest, its row's name for people, and the teacher's answers."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    id: str
    answers: list[str] = Field(min_length=1)


class StoredReferences(References):
    """Answers from a file that `store_references` made."""

    def __init__(self, path: Path, teacher: str) -> None:
        """Reads a file.

        Args:
            path: The file, JSON lines.
            teacher: Fingerprint of the teacher whose answers are wanted.

        Raises:
            UserError: The file cannot be read, is damaged, or holds the answers of another teacher.
        """
        self._path = path
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            found = _Head.model_validate_json(head)
            rows = [_Row.model_validate_json(line) for line in lines]
        except OSError as error:
            raise UserError(f"judge.references = {path}: {error.strerror}") from None
        except (ValueError, ValidationError):
            raise UserError(f"judge.references = {path}: that is no file of references; make it anew") from None
        if found.format != FORMAT:
            raise UserError(f"judge.references = {path}: its format is {quoted(found.format, 40)}, not {FORMAT}")
        if found.teacher != teacher:
            raise UserError(
                f"judge.references = {path}: its answers are of another teacher ({shortened(found.teacher, 40)}) than "
                f"the one of this run ({shortened(teacher, 40)}); make the file anew, or name that teacher"
            )
        self._answers = {row.prompt: _each_once(row.answers) for row in rows}

    def need(self, prompts: Sequence[Prompt]) -> None:
        """See `References`."""
        lacking = [prompt.id for prompt in prompts if prompt_digest(prompt) not in self._answers]
        if lacking:
            raise UserError(
                f"judge.references = {self._path}: {len(lacking)} of {len(prompts)} prompts have no answer in it "
                f"('{lacking[0]}' first); make the file for these data"
            )

    def of(self, prompts: Sequence[Prompt]) -> list[list[str] | Failure]:
        """See `References`."""
        none = Failure("empty", "the file of references has no answer to this prompt")
        return [self._answers.get(prompt_digest(prompt), none) for prompt in prompts]


def store_references(path: Path, prompts: Sequence[Prompt], asker: Asker, plan: RubricPlan, seed: int = 0) -> int:
    """Asks a teacher for its answers to prompts and writes them to a file, for `StoredReferences`.

    Args:
        path: The file, which must not be there yet.
        prompts: The prompts; one to which the teacher has no usable answer is left out.
        asker: Asks the teacher.
        plan: How often each prompt is asked, and how.
        seed: Seed of the teacher's answers.

    Returns:
        Number of prompts that were left out.

    Raises:
        UserError: The file is there already.
    """
    if path.exists():
        raise UserError(f"{path} is there already; name another file")
    found = AskedReferences(asker, plan, seed).of(prompts)
    lines = [_Head(format=FORMAT, teacher=asker.fingerprint).model_dump()]
    for prompt, answers in zip(prompts, found, strict=True):
        if not isinstance(answers, Failure):
            lines.append(_Row(prompt=prompt_digest(prompt), id=prompt.id, answers=answers).model_dump())
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return len(prompts) - len(lines) + 1


def prompt_digest(prompt: Prompt) -> str:
    """A digest of what a model reads of a prompt, whatever its row is called."""
    read = json.dumps([message.as_dict() for message in prompt.messages], sort_keys=True)
    return hashlib.sha256(read.encode()).hexdigest()


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
