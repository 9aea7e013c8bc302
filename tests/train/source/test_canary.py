"""No student ever reads what only a teacher may see: a canary in every privileged column, for every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipeline
import pytest

from retort import config as configuration
from retort import registry
from retort.core.rollouts import Pack
from retort.data import PRIVILEGED
from retort.rollout.engines.hf import Completion, HFEngine, Request, Sampling
from retort.teachers.itself import SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")

#: A word of the tiny tokenizer's that no prompt and no answer has.
CANARY = "add"
READS_THE_ROW = [
    name
    for name in registry.names()
    if any(view.columns and view.columns != ("clean",) for view in registry.load(name).views.values())
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"{a} + {b} =",
            "answer": f"{CANARY} {a + b}",
            **dict.fromkeys(PRIVILEGED, f"{CANARY} {a + b}"),
            "clean": f"{CANARY} {a} + {b} =",
        }
        for a in range(1, 5)
        for b in range(1, 5)
    ]
    path = tmp_path / "canary.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_there_are_such_methods() -> None:
    assert {"opsd", "sdft", "pw_opsd", "egrsd", "dopd"} <= set(READS_THE_ROW)


@pytest.mark.parametrize("name", [*READS_THE_ROW, "opct", "eopd"])
def test_what_the_student_is_asked_holds_no_privileged_text(
    name: str, data: Path, tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    taught: list[Sequence[list[int] | None]] = []
    write, prompts = HFEngine.generate, LocalTeacher.prompts

    def note_asked(self: HFEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        asked.extend(request.context.tokens_L.tolist() for request in requests)
        return write(self, requests, sampling)

    def note_taught(self: LocalTeacher, pack: Pack, view: Any) -> Any:
        found = prompts(self, pack, view)
        taught.append([None if own is None else own.ids for own in found.contexts])
        return found

    monkeypatch.setattr(HFEngine, "generate", note_asked)
    monkeypatch.setattr(LocalTeacher, "prompts", note_taught)
    settings = pipeline.for_method(tiny_run, registry.load(name))
    more = {"data": str(data), "method": {"name": name}, "steps": 1, "eval": {"problems": 3}}
    run = runner.start(configuration.resolve(configuration.merge(settings, more)), tmp_path / "run")
    canary = run.student.tokenizer.convert_tokens_to_ids(CANARY)
    run.go()
    assert asked
    assert all(canary not in ids for ids in asked), "a student was asked with what only its teacher may see"
    reads = [ids for shown in taught for ids in shown if ids is not None and canary in ids]
    columns = [view for view in run.prepared.method.views.values() if view.columns]
    assert bool(reads) == bool(columns), "the test would not notice a view that shows nothing"
    assert all(isinstance(t, SelfTeacher | LocalTeacher) for t in run.teachers.models.values())
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text()
    assert CANARY not in "".join(json.loads(line)["prompt"] for line in lines.splitlines())
