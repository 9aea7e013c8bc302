"""Held-out prompts: none of them is learnt from, and what repeats or cannot be graded is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.core.random_streams import permutation
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.train import runner
from retort.train.setup.prompts import graders, read_prompts
from retort.train.setup.split import content, overlap, repeats, set_aside

Write = Callable[[str, list[dict[str, Any]]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(name: str, found: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        return str(tmp_path / name)

    return rows


def split(data: str, **settings: Any) -> tuple[list[Prompt], list[Prompt], list[str]]:
    notes: list[str] = []
    train, held_out = read_prompts(configuration.resolve({"data": data, **settings}), data, notes)
    return train, held_out, notes


def texts(prompts: list[Prompt]) -> set[str]:
    return {" ".join(prompt.text.split()) for prompt in prompts}


def test_repeated_prompts_fall_on_one_side(write: Write) -> None:
    data = write("d.jsonl", [{"prompt": f"add {a} 1", "answer": str(a + 1)} for a in range(20) for _ in range(5)])
    train, held_out, notes = split(data)
    assert (len(train), len(held_out)) == (80, 4)
    assert not texts(train) & texts(held_out)
    assert any("80 of 100 rows of the data repeat" in note and "20 different prompts" in note for note in notes)
    assert any(
        "16 rows that repeat a held-out prompt are neither learnt from nor evaluated on" in note for note in notes
    )


def test_data_without_repeats_is_split_as_ever(write: Write) -> None:
    data = write("d.jsonl", [{"prompt": f"add {a}", "answer": "1"} for a in range(50)])
    for seed in range(3):
        train, held_out, notes = split(data, seed=seed, eval={"problems": 7})
        chosen = sorted(permutation(seed, "holdout", count=50)[:7])
        assert [int(prompt.id) for prompt in held_out] == chosen
        assert [int(prompt.id) for prompt in train] == [row for row in range(50) if row not in chosen]
        assert notes == []


def test_the_same_text_in_other_forms_is_the_same_prompt(write: Write) -> None:
    forms = [
        lambda a: {"prompt": f"add {a}  é\n"},
        lambda a: {"prompt": f" add {a} e\u0301"},
        lambda a: {"messages": [{"role": "user", "content": f"add {a} é"}]},
        lambda a: {"prompt": [{"role": "user", "content": f"add\t{a} é"}]},
    ]
    data = write("d.jsonl", [form(a) for a in range(10) for form in forms])
    for template in (None, "Q: {prompt}\nA:"):
        train, held_out, _ = split(data, **({"prompt_template": template} if template else {}))
        assert len(held_out) == 2
        assert not {content(prompt) for prompt in train} & {content(prompt) for prompt in held_out}
        assert len(train) == 32


def test_case_and_system_message_make_another_prompt() -> None:
    plain = Prompt("1", (Message("user", "find x"),))
    other = [
        Prompt("2", (Message("user", "find X"),)),
        Prompt("3", (Message("system", "be brief"), Message("user", "find x"))),
        Prompt("4", (Message("tool", "find x"),)),
        Prompt("5", (Message("user", "find x", {"name": "Ada"}),)),
        Prompt("6", (Message("user", "find x"),), tools=({"name": "solve"},)),
    ]
    assert len({content(prompt) for prompt in [plain, *other]}) == 6


def test_a_prompt_that_is_most_of_the_data_is_not_held_out() -> None:
    prompts = [Prompt(str(n), (Message("user", "again" if n < 30 else f"add {n}"),)) for n in range(40)]
    for seed in range(5):
        order = permutation(seed, "holdout", count=40)
        train, held_out = set_aside(prompts, order, 4, lambda _: False)
        assert (len(train), len(held_out)) == (38, 2)
        assert "again" not in texts(held_out)


def test_the_row_that_stands_for_a_held_out_prompt_has_an_answer(write: Write) -> None:
    rows = [{"prompt": f"add {a}", **({"answer": "1"} if copy else {})} for a in range(10) for copy in range(2)]
    _, held_out, _ = split(write("d.jsonl", rows))
    assert [prompt.answer for prompt in held_out] == ["1", "1"]


def test_answers_that_differ_are_counted(write: Write) -> None:
    rows = [{"prompt": f"add {a}", "answer": str(copy if a < 3 else a)} for a in range(10) for copy in range(2)]
    _, _, notes = split(write("d.jsonl", rows))
    assert any(note.startswith("3 prompts of the rows of the data occur with different answers ('0'") for note in notes)
    spaced = [Prompt("1", (Message("user", "q"),), answer="1 2"), Prompt("2", (Message("user", "q"),), answer=" 1  2")]
    assert len(repeats(spaced, "rows")) == 1


def test_rows_that_are_also_in_the_evaluation_file_are_counted(write: Write) -> None:
    data = write("d.jsonl", [{"prompt": f"add {a % 8}", "answer": "1"} for a in range(10)])
    held = write("h.jsonl", [{"prompt": f"add  {a}", "answer": "1"} for a in (0, 1, 1, 90)])
    train, held_out, notes = split(data, eval={"data": held, "problems": 4})
    assert (len(train), len(held_out)) == (10, 4)
    assert any("3 of 4 prompts to be evaluated on are also in 4 training rows ('0' first)" in note for note in notes)
    assert any("1 of 4 rows of eval.data repeat" in note for note in notes)
    assert any("2 of 10 training rows repeat" in note for note in notes)
    other = write("o.jsonl", [{"prompt": f"sub {a}", "answer": "1"} for a in range(4)])
    assert overlap(*split(data, eval={"data": other, "problems": 4})[:2]) == []


def test_tasks_of_retort_need_no_note() -> None:
    assert split("ranking", eval={"problems": 8})[2] == []


def test_one_row_without_an_answer_silences_no_other(write: Write, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{a} + 1 =", **({"answer": str(a + 1)} if a % 5 else {})} for a in range(20)]
    data = write("d.jsonl", rows)
    held = write("h.jsonl", [{"prompt": f"{a} + 2 =", **({"answer": "2"} if a else {})} for a in range(3)])
    settings = configuration.merge(tiny_run, {"data": data, "eval": {"data": held, "problems": 3}, "steps": 2})
    run = runner.start(configuration.resolve(settings), tmp_path / "run").go()
    notes = run.prepared.notes
    assert any("1 of 3 held-out prompts have no `answer` ('0' first)" in note for note in notes)
    assert any("4 of 20 training prompts have no `answer` ('0' first)" in note for note in notes)
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (results["problems"], results["graded"]) == (3, 2)
    assert {"value", "low", "high"} == set(results["rows"][0]["avg@2"])
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert {row["prompt_id"]: row["reward"] is None for row in answers} == {"0": True, "1": False, "2": False}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("reward" in line for line in lines)
    with pytest.raises(UserError, match=r"every row of the data, and 4 of 20 have none \('0' first\)"):
        runner.start(
            configuration.resolve(configuration.merge(settings, {"teacher": None, "method": {"name": "sdpo"}})),
            tmp_path / "other",
        )


def test_nobody_grades_where_no_row_has_an_answer() -> None:
    bare = [Prompt(str(n), (Message("user", f"q {n}"),)) for n in range(3)]
    notes: list[str] = []
    assert graders(configuration.resolve({"data": "x.jsonl"}), bare, bare, notes) == (None, None)
    with pytest.raises(UserError, match="has no answer"):
        graders(configuration.resolve({"data": "x.jsonl", "task": "exact"}), bare, bare, notes)
