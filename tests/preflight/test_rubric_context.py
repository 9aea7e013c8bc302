"""A judge of this process whose context is too short for a group's answers, or for the rubric of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retort import api
from retort.chat import Question
from retort.chat.asking import Asking
from retort.chat.endpoint import ChatEndpoint
from retort.cli import main
from retort.preflight.doctor import examine
from retort.preflight.rubric_context import rubric_context
from retort.rewards import Criterion, Rubric
from retort.rewards.references import store_references
from retort.rewards.rubric_protocol import Pooled, line_of, rubric_question, verdicts_question
from retort.teachers.templates import templates
from retort.train.setup.prepare import Prepared, prepare

#: Settings of a run with a judge that reads so many tokens, by further settings of the method and of the judge.
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def settings(model_folder: Callable[..., Path], prompts_file: Path, models_kept: None) -> Settings:
    def made(context: int, judge: dict[str, Any] | None = None, **method: Any) -> dict[str, Any]:
        folder = model_folder(seed=3, chat=True, max_position_embeddings=context)
        small = {"samples": 4, "references": 2, "reference_tokens": 30, "rubric_tokens": 300, "verdict_tokens": 200}
        return {
            "student": str(model_folder(seed=1)),
            "data": str(prompts_file),
            "task": "exact",
            "method": {"name": "ropd", **small, **method},
            "rollout": {"prompts": 2, "max_new_tokens": 8},
            "eval": {"problems": 0},
            "precision": "fp32",
            "device": "cpu",
            "steps": 1,
            "judge": {"model": str(folder), **(judge or {})},
        }

    return made


def values(prepared: Prepared) -> dict[str, float]:
    (found,) = rubric_context(prepared)
    return dict(found.values)


def rubric_of(words: str) -> Rubric:
    criteria = [Criterion(id=str(own), text=words, category="task", points=1) for own in range(4)]
    return Rubric(criteria=criteria, maximum_score=4)


def questions(prepared: Prepared, teacher: list[str], student: list[str], words: str) -> dict[str, Question[Any]]:
    """What is asked about a group with these answers and a rubric of such words, by kind."""
    plan, prompt = prepared.method.grading, prepared.source.prompts[0]
    assert plan is not None
    rubric, own = rubric_of(words), templates({})
    pooled = [Pooled("teacher", place, text) for place, text in enumerate([*teacher, *student])]
    return {
        "rubric": rubric_question(prompt, teacher, student, plan, own["rubric"], 0),
        "verdicts": verdicts_question(prompt, rubric, pooled, plan, own["verdicts"]),
    }


def lengths(prepared: Prepared, asked: dict[str, Question[Any]]) -> dict[str, int]:
    assert prepared.asker is not None
    judge: Any = prepared.asker.model
    return {kind: judge.length(question.request) for kind, question in asked.items()}


@pytest.fixture(scope="module")
def large(settings: Settings) -> Prepared:
    return prepare(api.assemble(settings(4096)))


def test_no_request_is_shorter_than_the_shortest(large: Prepared) -> None:
    """With an answer of the teacher of one token, no completion with any, and a rubric in four words."""
    found = lengths(large, questions(large, ["1"], [""] * 4, "1"))
    for kind, length in found.items():
        # Its answer has four criteria, or five verdicts on four of them.
        assert length + 20 < values(large)[f"{kind}/least"] < length + 120


def test_the_longest_request_has_answers_and_rubric_at_full_length(large: Prepared) -> None:
    """30 tokens for each of 2 answers of the teacher, 8 for each of 4 completions, and 300 for the rubric."""
    found = lengths(large, questions(large, ["1 " * 30] * 2, ["1 " * 8] * 4, "1"))
    rubric = len(large.student.tokenizer.encode(line_of(rubric_of("1")), add_special_tokens=False))
    own = {"rubric": 300, "verdicts": 300 - rubric + 200}
    for kind, length in found.items():
        # Quotation marks around a text are two tokens, around none one; six answers have some.
        assert values(large)[f"{kind}/most"] == pytest.approx(length + own[kind], abs=6)
    assert rubric_context(large)[0].verdict == "ok"


def test_fewer_answers_in_a_call_are_less_to_read(settings: Settings, large: Prepared) -> None:
    one = values(prepare(api.assemble(settings(4096, per_call=1))))
    assert one["verdicts/most"] + 30 + 4 * 8 < values(large)["verdicts/most"]
    assert one["verdicts/least"] < values(large)["verdicts/least"]
    assert one["rubric/most"] == values(large)["rubric/most"]


def test_answers_of_the_teacher_that_are_known_count_as_they_are(
    settings: Settings, large: Prepared, tmp_path: Path
) -> None:
    assert large.asker is not None and large.method.grading is not None

    class Long:
        fingerprint = large.asker.fingerprint

        def ask(self, questions: Any) -> list[Any]:
            return [question.read("1 " * 29 + str(place)) for place, question in enumerate(questions)]

    store_references(tmp_path / "references.jsonl", large.source.prompts, Long(), large.method.grading)
    found = values(prepare(api.assemble(settings(4096, {"references": str(tmp_path / "references.jsonl")}))))
    assert not any(name.startswith("reference/") for name in found), "nobody is asked for them"
    assert found["rubric/most"] == values(large)["rubric/most"]
    # Two of 30 tokens and a comma, where there may be one of one token.
    assert found["rubric/least"] == values(large)["rubric/least"] + 2 * 30 + 1 - 1


def test_a_judge_that_can_hold_no_request_is_refused(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(128)
    words = [f"{name}={given[name]}" for name in ("student", "data", "task", "device", "precision", "steps")]
    words += [f"method.{name}={value}" for name, value in given["method"].items() if name != "name"]
    arguments = ["--method", "ropd", "--judge", given["judge"]["model"], *words]
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retort: ")]
    assert "its context of 128 tokens holds no request: the shortest for a rubric takes" in line
    assert "name a judge that reads more" in line
    assert not (tmp_path / "run").exists()
    assert main(["doctor", "--quick", *arguments]) == 2


def test_a_judge_that_holds_short_requests_only_is_a_warning(settings: Settings) -> None:
    found = examine(api.assemble(settings(640)), quick=True)["context of the judge"]
    assert found.verdict == "warn"
    assert "holds short requests only: the shortest for a rubric takes" in found.saw
    assert "the longest, for verdicts, about" in found.saw
    assert found.remedy.startswith("groups that do not fit are not learnt from")


def test_nothing_is_known_of_a_judge_at_an_address(large: Prepared) -> None:
    assert rubric_context(replace(large, asker=Asking(ChatEndpoint("http://127.0.0.1:9", model="m")))) == []


def test_methods_without_a_judge_have_none(settings: Settings) -> None:
    given = {**settings(128), "method": {"name": "rlsd", "share": 0.0}, "judge": {}}
    assert rubric_context(prepare(api.assemble(given))) == []
