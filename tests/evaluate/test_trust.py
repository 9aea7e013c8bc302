"""What tells how far a teacher's token can be trusted: ranks by hand, the protocol on a tiny model, the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retort.align.pair import SameIds
from retort.cli import main
from retort.core.rollouts import Message, Prompt
from retort.evaluate.ranks import auroc, clustered_auroc
from retort.evaluate.trust import PREDICTORS, Branch, Protocol, Student, _blocks, branches, trust
from retort.models.load import load_model
from retort.report.page import build_report
from retort.rewards import ByText, ExactVerifier
from retort.rollout.engines.hf import HFEngine
from retort.teachers.local import LocalTeacher
from retort.teachers.view import View


def branch(problem: int, position: float, viable: bool, alone: bool = False, entropy: float = 1.0) -> Branch:
    return Branch(problem, position, entropy, 1.0 + position, -1.0, -2.0, viable, alone, shift=-position)


def test_auroc_by_hand() -> None:
    right = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([3.0, 2.0, 1.0, 0.0]), right) == 1.0
    assert auroc(torch.tensor([0.0, 1.0, 2.0, 3.0]), right) == 0.0
    assert auroc(torch.ones(4), right) == 0.5
    assert auroc(torch.tensor([2.0, 0.0, 1.0, 1.0]), right) == 0.5
    assert auroc(torch.tensor([1.0, float("nan"), 0.0, 2.0]), right) == 0.5
    assert auroc(torch.ones(4), torch.ones(4, dtype=torch.bool)) is None


def test_the_interval_is_over_problems() -> None:
    draw = torch.Generator().manual_seed(0)
    # Ten observations of each problem, all alike: as much is known as from one of each.
    scores = torch.randn(40, generator=draw).repeat_interleave(10)
    right = torch.rand(40, generator=draw).repeat_interleave(10) < 0.5
    problems = torch.arange(40).repeat_interleave(10).tolist()
    honest = clustered_auroc(scores, right, problems)
    bold = clustered_auroc(scores, right, list(range(400)))
    assert honest is not None
    assert bold is not None
    assert honest.value == bold.value
    assert honest.high - honest.low > 2 * (bold.high - bold.low)
    assert honest.low < honest.value < honest.high


def test_a_predictor_that_tells_everything_and_one_that_tells_nothing() -> None:
    found = [branch(n, n / 20, viable=n >= 10, alone=n % 3 == 0) for n in range(20)]
    results = trust(found, draws=50)
    rows = {row["predictor"]: row for row in results["predictors"]}
    assert rows["late position"]["viable"]["value"] == 1.0
    assert rows["low teacher entropy"]["viable"]["value"] == 0.5
    assert {row["claimed_by"] for row in rows.values()} == {"EGRSD", "DASD", "PW-OPSD", ""}
    assert results["viable"] == 0.5
    assert results["shift_against_entropy"] == pytest.approx(-1.0)
    assert results["differing"] == sum(one.viable != one.alone for one in found)
    assert sum(row["branches"] for row in results["bins"]["position"]) == 20


def test_nothing_differs_is_undefined_and_not_half() -> None:
    results = trust([branch(n, n / 9, viable=n % 2 == 0, alone=n % 2 == 0) for n in range(9)], draws=20)
    assert all(row["helps"] is None for row in results["predictors"])
    assert all(row["viable"] is not None for row in results["predictors"])


class Odd:
    """Right where the answer's last word is odd: random models often are."""

    name = "odd"

    def __call__(self, prompt: Prompt, text: str) -> float:
        words = [word for word in text.split() if word.isdigit()]
        return float(bool(words) and int(words[-1]) % 2 == 1)


def test_a_forced_token_is_the_teachers_and_the_rest_is_the_students(model_folder: Callable[..., Path]) -> None:
    cpu = torch.device("cpu")
    student = load_model(str(model_folder(seed=1)), role="student", precision="fp32", device=cpu)
    other = load_model(str(model_folder(seed=2)), role="teacher", precision="fp32", device=cpu)
    own, teacher = (LocalTeacher(lm, alignment=SameIds(50), batch_tokens=64) for lm in (student, other))
    prompts = [Prompt(str(n), (Message("user", f"{n} + 1 ="),)) for n in range(6)]
    protocol = Protocol(places=3, candidates=2, max_new_tokens=6)
    writer = Student(HFEngine(student, vocab=50, max_parallel=64), own, own.render, student.stops, parallel=64)
    found = branches(writer, teacher, View(), prompts, ByText(Odd()), protocol)
    assert found == branches(writer, teacher, View(), prompts, ByText(Odd()), protocol)
    assert 0 < len(found) <= 6 * 3 * 2
    assert len({one.viable for one in found}) == 2
    assert all(0 < one.position < 1 for one in found)
    # The two candidates of a place share what is known of the place, and are drawn, not ranked.
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert all(one.teacher_entropy == two.teacher_entropy for one, two in pairs)
    assert {one.teacher_logp > two.teacher_logp for one, two in pairs} == {True, False}
    assert all(one.alone == two.alone for one, two in zip(found[::2], found[1::2], strict=True))
    same = branches(writer, own, View(), prompts, ByText(Odd()), protocol)
    assert all(one.teacher_logp == pytest.approx(one.student_logp, abs=1e-5) for one in same)
    assert all(one.shift == pytest.approx(0.0, abs=1e-5) for one in same)
    assert any(abs(one.shift) > 1e-3 for one in found)


def test_answers_of_like_room_are_written_at_once() -> None:
    rooms, prompts = [3, 0, 9, 8, 9, 0, 1], [7, 12, 1, 2, 1, 11, 9]
    assert _blocks(rooms, prompts, 10, 10**6) == [[2, 4, 3, 0, 6], [1, 5]]
    assert _blocks(rooms, prompts, 2, 10**6) == [[2, 4], [3, 0], [6], [1, 5]]
    # With the room of the first the fourth would not fit into 11 tokens, and with that of the fourth not the fifth.
    assert _blocks(rooms, prompts, 10, 11) == [[2, 4, 3], [0], [6], [1, 5]]
    assert _blocks([], [], 10, 10) == []


def test_the_command_writes_the_file_and_the_page(
    tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retort import config
    from retort.train import runner

    # One verifier for all: the exact answer of a random model is never right.
    monkeypatch.setattr(ExactVerifier, "__call__", Odd.__call__)
    out = tmp_path / "run"
    runner.start(config.resolve(tiny_run, {"method": {"name": "opd"}, "steps": 2}), out).go()
    assert main(["trust", str(out), "--problems", "4", "--places", "2"]) == 0
    assert "source" in capsys.readouterr().out
    results = json.loads((out / "trust.json").read_text())
    assert results["prompts"] == "held-out prompts"
    assert [row["predictor"] for row in results["predictors"]] == list(PREDICTORS)
    page = build_report([out], out / "report.html").read_text()
    assert "Which tokens of the teacher" in page
    section = page[page.index('<h2 id="trust"') : page.index('<h2 id="rollouts"')]
    assert "(Spearman) of" in section
    assert "nan" not in section.lower()
    assert section.count("<figure") == 3
    assert main(["trust", str(out), "--view", "base"]) == 2
    assert "view 'base' is none of method 'opd'" in capsys.readouterr().err
    assert main(["trust", str(out), "--places", "0"]) == 2
    assert main(["trust", str(tmp_path)]) == 2
