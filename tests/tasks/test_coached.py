"""Coached Countdown: rows and what is privileged in them, what the checker says, and the bundled models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from support import group_of

from retort import config as configuration
from retort.cli import main
from retort.core.rollouts import Message, Prompt
from retort.data import fingerprint
from retort.rewards import ByText, GivesFeedback, GivesParts, verifier_for
from retort.tasks.coached import (
    PRIVILEGED,
    TEMPLATES,
    bait,
    bait_rows,
    check,
    feedback,
    followed,
    rows,
    student_path,
    teacher_path,
)
from retort.tasks.coached.build import LAYOUTS, RESPONSE, Data, context, measure
from retort.tasks.coached.problems import Mistake, mistake, outcome, plan
from retort.tasks.coached.tokenizer import CONTEXT, build_tokenizer
from retort.tasks.countdown.problems import Problem, problems
from retort.train.models.models import located
from retort.train.setup.prompts import builtin_prompts

ASKED = "45 from 3 5 12 :"
RIGHT = "12 - 3 = 9 , 9 * 5 = 45"


# --- rows ---


def test_rows_repeat_and_a_smaller_count_is_a_prefix() -> None:
    assert rows("train", 40) == rows("train", 40)
    assert rows("train", 10) == rows("train", 40)[:10]
    assert rows("train", 10) != rows("train", 10, seed=1)
    assert len(rows("held_out")) == len(problems("held_out"))


def test_no_held_out_problem_is_trained_on() -> None:
    def asked(split: str) -> set[tuple[str, ...]]:
        given = [row["prompt"].split() for row in rows(split)]  # type: ignore[arg-type]
        return {(words[0], *sorted(words[2:-1])) for words in given}

    assert not asked("train") & asked("held_out")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_what_is_right_is_right_and_what_is_wrong_is_wrong(split: str) -> None:
    for row in rows(split):  # type: ignore[arg-type]
        for name in ("response", "solution", "demonstration"):
            assert check(row["prompt"], row[name]), (name, row)
        assert not check(row["prompt"], row["wrong"]), row
        assert row["hint"] == plan(row["solution"])
        assert row["outcome"] == outcome(row["solution"])


def test_solution_and_demonstration_are_drawn_apart_from_the_response() -> None:
    given = rows("train")
    for name in ("solution", "demonstration"):
        differing = sum(row[name] != row["response"] for row in given) / len(given)
        assert 0.5 < differing < 0.95


def test_the_three_strengths() -> None:
    assert plan(RIGHT) == "12 - 3 , it * 5"
    assert plan("3 + 5 = 8 , 12 - 8 = 4") == "3 + 5 , 12 - it"
    assert plan("2 + 2 = 4 , 4 * 4 = 16") == "2 + 2 , it * 4", "the given 4 stays a 4"
    assert outcome(RIGHT) == "9 * 5 = 45"


def test_the_paired_task() -> None:
    for row, plain in zip(bait_rows("held_out"), rows("held_out"), strict=True):
        assert row["prompt"] == f"maybe {row['wrong']} ; {plain['prompt']}"
        assert row["clean"] == plain["prompt"]
        assert bait(row["prompt"]) == row["wrong"]
        assert bait(row["clean"]) is None
        assert check(row["prompt"], row["response"]), "the suggestion does not matter to the checker"
        assert not check(row["prompt"], row["wrong"])
        assert followed(row["prompt"], row["wrong"])
        assert not followed(row["prompt"], row["response"])
        assert not followed(row["clean"], row["wrong"])


# --- what the checker says ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RIGHT, ""),
        ("12-3=9,9*5=45", ""),
        ("12 + 3 = 15 , 15 * 5 = 75", "reached 75"),
        ("12 - 3 = 8 , 8 * 5 = 45", "step 1 : 12 - 3 = 9"),
        ("12 + 3 = 15 , 15 * 5 = 45", "step 2 : 15 * 5 = 75"),
        ("12 - 3 = 9 , 9 * 12 = 108", "step 2 : no 12"),
        ("12 - 7 = 5 , 9 * 5 = 45", "step 1 : no 7"),
        ("3 * 3 = 9 , 9 * 5 = 45", "step 1 : no 3"),
        ("3 - 5 = 2 , 2 + 12 = 14", "step 1 : illegal"),
        ("12 - 3 = 9", "unfinished"),
        ("12 - 3 = 9 ,", "unfinished"),
        ("12 - 3 = 9 , 9 *", "unfinished"),
        ("", "unfinished"),
        (RIGHT + " ,", "unreadable"),
        (RIGHT + " , 45 + 3 = 48", "step 3 : no 3"),
        (RIGHT + " :", "unreadable"),
        ("12 12 12", "unreadable"),
        ("12 - 3 = = , 9 * 5 = 45", "unreadable"),
        ("12 - 300 = 9", "unreadable"),
        ("the answer is 45", "unreadable"),
        ("9" * 5000, "unreadable"),
        ("= , " * 200, "unreadable"),
    ],
)
def test_feedback(text: str, said: str) -> None:
    assert feedback(ASKED, text) == said
    assert feedback(f"maybe {RIGHT} ; {ASKED}", text) == said
    assert (said == "") == check(ASKED, text)


@pytest.mark.parametrize(
    "asked", ["", ":", "45 from :", "45 from 3 :", "45 from from 3 5 :", "no task", "; ;", "x" * 5000]
)
def test_feedback_without_a_problem(asked: str) -> None:
    assert feedback(asked, RIGHT) == "unreadable"
    assert not check(asked, RIGHT)


def test_something_is_said_of_every_mistake_and_of_nothing_else() -> None:
    rng = random.Random(0)
    kinds: tuple[Mistake, ...] = ("missed", "twice", "claimed", "unfinished")
    known = build_tokenizer().get_vocab()
    begins: dict[str, set[str]] = {kind: set() for kind in kinds}
    for problem in problems("train"):
        for kind in kinds:
            text = mistake(problem, rng, kind)
            said = feedback(problem.prompt, text)
            assert said and not check(problem.prompt, text)
            assert set(said.split()) <= set(known)
            begins[kind].add(said.split()[0])
    assert begins == {
        "missed": {"reached"},
        "twice": {"step", "reached"},
        "claimed": {"step"},
        "unfinished": {"unfinished"},
    }


def test_random_words_never_raise() -> None:
    rng = random.Random(0)
    pieces = ["12", "3", "5", "9", "45", "0", "255", "+", "-", "*", "=", ",", ":", ";", "from", "solution"]
    for _ in range(3000):
        text = " ".join(rng.choices(pieces, k=rng.randrange(14)))
        assert (feedback(ASKED, text) == "") == check(ASKED, text)


# --- verifiers, prompts, settings ---


def test_the_verifiers() -> None:
    plain, baited = (
        Prompt("x", (Message("user", ASKED),)),
        Prompt("y", (Message("user", f"maybe 3 + 5 = 8 ; {ASKED}"),)),
    )
    coached, paired = verifier_for("coached", [plain]), verifier_for("bait", [baited])
    assert coached is not None and paired is not None
    assert coached.name == "coached" and paired.name == "bait"
    for verifier in (coached, paired):
        assert verifier(plain, RIGHT) == verifier(baited, RIGHT) == 1.0
        assert verifier(plain, "12 - 3 = 9") == 0.0
        assert isinstance(verifier, GivesFeedback)
        assert verifier.feedback(baited, "12 - 3 = 9") == "unfinished"
    assert not isinstance(coached, GivesParts)
    assert isinstance(paired, GivesParts)
    assert paired.parts(baited, "3 + 5 = 8") == {"followed": 1.0}
    assert paired.parts(baited, RIGHT) == {"followed": 0.0}
    assert paired.parts(plain, RIGHT) == {}
    (grade,) = ByText(coached).grade(group_of(plain, [RIGHT]))
    assert grade is not None and grade.parts == {}
    assert not isinstance(verifier_for("countdown", [plain]), GivesFeedback)


def test_prompts_carry_what_is_privileged_apart() -> None:
    coached, paired = builtin_prompts("coached", "train", 5), builtin_prompts("bait", "train", 5)
    for one, pair, row in zip(coached, paired, rows("train", 5), strict=True):
        assert one.text == row["prompt"] and one.clean is None
        assert pair.text == f"maybe {row['wrong']} ; {row['prompt']}"
        assert pair.clean == (Message("user", row["prompt"]),)
        assert set(one.privileged) == set(PRIVILEGED)
        assert all(one.privileged[name] == pair.privileged[name] == row[name] for name in PRIVILEGED)
    assert all(not prompt.privileged and prompt.clean is None for prompt in builtin_prompts("countdown", "train", 5))


def test_the_fingerprint_sees_the_clean_prompt() -> None:
    bare = Prompt("x", (Message("user", "a"),))
    pair, other = (Prompt("x", (Message("user", "a"),), clean=(Message("user", clean),)) for clean in ("a", "b"))
    assert len({fingerprint([one]) for one in (bare, pair, other)}) == 3


def test_the_recipes() -> None:
    for name in ("coached", "bait"):
        settings = configuration.resolve(configuration.recipe(name))
        assert (settings.data, settings.student, settings.teacher) == (name, "coached:student", "coached:teacher")
        longest = max(len(prompt.text.split()) for prompt in builtin_prompts(name, "train", None))
        assert longest <= settings.rollout.max_prompt_tokens
    text = (configuration.RECIPES / "coached.toml").read_text(encoding="utf-8")
    for key, template in TEMPLATES.items():
        assert f"{key} = {json.dumps(template)}" in text
    assert located("coached:student") == str(student_path())
    assert located("coached:teacher") == str(teacher_path())


# --- tokenizer and models ---


def test_text_survives_the_tokenizer() -> None:
    tokenizer, rng = build_tokenizer(), random.Random(0)
    known = countdown_vocab()
    assert known.items() <= tokenizer.get_vocab().items()
    others = problems("train")
    for row in rows("train", 60):
        for name in (*PRIVILEGED, "prompt", "response"):
            assert tokenizer.unk_token_id not in tokenizer(row[name]).input_ids
        words = row["prompt"].split()
        problem = Problem(tuple(map(int, words[2:-1])), int(words[0]))
        for layout in LAYOUTS:
            before, response, _ = context(layout, problem, rng, others)
            ids = tokenizer(f"{before}{row['prompt']} {response}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert (
                ids == tokenizer(before).input_ids + tokenizer(row["prompt"]).input_ids + tokenizer(response).input_ids
            )
            assert len(ids) + 1 <= CONTEXT
            assert check(before + row["prompt"], response)
            assert tokenizer.decode(ids) == f"{before}{row['prompt']} {response}"


def countdown_vocab() -> dict[str, int]:
    from retort.tasks.countdown.tokenizer import build_tokenizer as plain

    return plain().get_vocab()


def test_training_texts_hold_no_held_out_problem() -> None:
    data = Data(0)
    held_out = {(one.target, *one.numbers) for one in problems("held_out")}
    for layout in LAYOUTS:
        for text in data.texts(layout, 20):
            words = text.split()
            asked = words[:-RESPONSE]
            place = len(asked) - 1 - asked[::-1].index("from")
            assert (int(asked[place - 1]), *sorted(map(int, asked[place + 1 : -1]))) not in held_out


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_bundled_models(name: str) -> None:
    path = {"teacher": teacher_path, "student": student_path}[name]()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(tokenizer) == config.vocab_size
    assert config.max_position_embeddings == CONTEXT
    assert config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template is None
    assert "license: apache-2.0" in (path / "README.md").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in path.iterdir()) < 3_000_000


def test_more_help_makes_more_right() -> None:
    """A part of what is measured for the model cards, with the same seeds every time."""
    load = transformers.LlamaForCausalLM.from_pretrained
    teacher, student = (
        {kind: score.right for kind, score in measure(load(path, dtype=torch.float32), 100, 2).items()}
        for path in (teacher_path(), student_path())
    )
    for right in (teacher, student):
        assert right["plain"] + 0.1 < right["hint"] < right["solution"] + 0.05
        assert right["outcome"] + 0.1 < right["hint"]
        assert right["solution"] > 0.85
    assert student["plain"] < student["outcome"], "the teacher can make nothing of an outcome"
    assert 0.3 < student["plain"] < teacher["plain"] - 0.05


def test_the_table_says_who_followed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "coached:student", "--data", "bait", "problems=40", "samples=4"]
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    cell = row["reward/followed"]
    assert 0 <= cell["low"] < cell["value"] < cell["high"] <= 1
    assert 0.05 < cell["value"] < 0.8
    assert cell["value"] + row["avg@4"]["value"] <= 1, "what follows the suggestion is wrong"
    assert main(words) == 0
    assert "followed" in capsys.readouterr().out
    assert main(["eval", "coached:student", "--data", "coached", "problems=8", "samples=2"]) == 0
    assert "followed" not in capsys.readouterr().out


def test_a_run_logs_who_followed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["eval.problems=8", "eval.samples=2", "rollout.prompts=16"]
    assert main(["train", "--data", "bait", "--method", "opd", "--steps", "2", "--out", str(out), *small]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["reward/followed"] <= 1 and 0 <= line["reward"] <= 1 for line in metrics)
    rows = {row["who"]: row for row in json.loads((out / "eval.json").read_text())["rows"]}
    assert all("reward/followed" in row for row in rows.values())
