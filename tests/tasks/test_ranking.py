"""Ranked JSON lists: what parses, how it is ranked, and the bundled models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from retort.core.rollouts import Message, Prompt
from retort.rewards.choose import verifier_for
from retort.rewards.verify import RankingVerifier
from retort.tasks.ranking import MODELS_DIR, rows, score_list, student_path, teacher_path
from retort.tasks.ranking.build import MAX_NEW_TOKENS, measure
from retort.tasks.ranking.lists import ITEMS, Problem, problem
from retort.tasks.ranking.tokenizer import STRUCTURE, build_tokenizer

ONE = Problem((("k", 3), ("c", 1), ("a", 4), ("t", 2)))


def test_a_problem_and_its_response() -> None:
    assert ONE.prompt == 'rank 3 "k" 1 "c" 4 "a" 2 "t" :'
    assert [one["id"] for one in json.loads(ONE.response)] == ["c", "t", "k", "a"]
    found = score_list(ONE.prompt, ONE.response)
    assert (found.parses, found.ndcg, found.one_missing) == (True, 1.0, False)


def listed(*names: str) -> str:
    return json.dumps([{"score": place, "id": name} for place, name in enumerate(names, 1)])


@pytest.mark.parametrize(
    ("text", "parses", "one_missing"),
    [
        (listed("c", "t", "k", "a"), True, False),
        ("Here: " + listed("a", "t", "k", "c") + " .", True, False),
        (listed("c", "t", "k"), False, True),
        (listed("c", "t"), False, False),
        (listed("c", "t", "k", "k"), False, False),
        (listed("c", "t", "k", "z"), False, False),
        (listed("c", "t", "k", "a", "z"), False, False),
        (listed("c", "t", "k", "a")[:-1], False, False),
        (listed("c", "t", "k", "a").replace('"score": 2', '"score": "2"'), False, False),
        (listed("c", "t", "k", "a").replace('"score": 2, ', ""), False, False),
        (listed("c", "t", "k", "a").replace('"score": 2', '"score": true'), False, False),
        ('{"id": "c"}', False, False),
        ("[]", False, False),
        ("", False, False),
        ("[" * 5000, False, False),
        ("[" * 900 + "]" * 900, False, False),
    ],
)
def test_what_parses(text: str, parses: bool, one_missing: bool) -> None:
    found = score_list(ONE.prompt, text)
    assert (found.parses, found.one_missing) == (parses, one_missing)
    assert (found.ndcg is not None) == parses


def test_the_ranking_is_judged_apart() -> None:
    assert score_list(ONE.prompt, listed("c", "a", "k", "t")).ndcg == 1.0
    assert score_list(ONE.prompt, listed("t", "c", "k", "a")).ndcg == 0.75
    assert score_list(ONE.prompt, listed("a", "c", "k", "t")).ndcg == 0.25
    assert not score_list("rank :", listed("a")).parses
    assert not score_list("no such task", listed("a")).parses


def test_problems_repeat_and_are_held_out() -> None:
    assert rows("train", 50) == rows("train", 50)
    held_out = {row["prompt"] for row in rows("held_out", None)}
    assert len(held_out) == 512
    assert not held_out & {row["prompt"] for row in rows("train", None)}
    counts = {len(row["prompt"].split()) // 2 - 1 for row in rows("train", 200)}
    assert counts == set(ITEMS)


def test_the_verifier() -> None:
    prompt = Prompt("x", (Message("user", ONE.prompt),))
    grade = verifier_for("ranking", [prompt])
    assert isinstance(grade, RankingVerifier)
    assert grade(prompt, listed("a", "c", "k", "t")) == 1.0, "however it is ranked"
    assert grade(prompt, listed("a", "c", "k")) == 0.0


def test_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for one in (problem(random.Random(seed)) for seed in range(30)):
        prompt, response = tokenizer(one.prompt).input_ids, tokenizer(one.response).input_ids
        assert tokenizer(f"{one.prompt} {one.response}").input_ids == prompt + response
        assert score_list(one.prompt, tokenizer.decode(response)).parses
        assert tokenizer.unk_token_id not in prompt + response
        assert len(response) + 1 <= MAX_NEW_TOKENS
    assert set(STRUCTURE) <= set(tokenizer.get_vocab())


@pytest.mark.parametrize("path", [teacher_path(), student_path()], ids=["teacher", "student"])
def test_the_bundled_models(path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert config.eos_token_id == tokenizer.eos_token_id
    assert "license: apache-2.0" in (path / "README.md").read_text(encoding="utf-8")


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*") if file.is_file()) < 1_000_000


def test_the_teacher_parses_and_the_student_has_headroom() -> None:
    load = transformers.LlamaForCausalLM.from_pretrained
    teacher, student = (
        measure(load(path, dtype=torch.float32), build_tokenizer()) for path in (teacher_path(), student_path())
    )
    assert teacher.parse > 0.98
    assert 0.25 < student.parse < 0.65


def test_the_commands_know_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    from retort.cli import main

    assert main(["eval", "ranking:teacher", "--data", "ranking", "problems=8", "samples=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["avg@2"]["value"] > 0.9
    assert main(["doctor", "--data", "ranking", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {check["name"]: check["verdict"] for check in found["checks"]}["teacher is loaded"] == "ok"
