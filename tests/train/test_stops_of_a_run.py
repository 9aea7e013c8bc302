"""What a run stops with: how it reads a teacher of several stops, and what it exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import make_model

import retort
from retort.models.load import load_model

pytestmark = pytest.mark.usefixtures("models_kept")


def loaded(folder: Path) -> Any:
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"))


def run(tmp_path: Path, **rollout: Any) -> Any:
    rows = [{"prompt": f"add {a} {b}", "answer": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return retort.distill(
        student=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        data=str(tmp_path / "data.jsonl"),
        method="opd",
        steps=1,
        out=str(tmp_path / "run"),
        settings={
            "precision": "fp32",
            "rollout": {"prompts": 4, "max_new_tokens": 4, **rollout},
            "eval": {"problems": 0},
        },
    )


def stops_at(folder: Path, ids: list[int]) -> None:
    transformers.GenerationConfig(eos_token_id=ids).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ids}))


def test_the_teachers_stop_is_the_one_that_it_uses(tmp_path: Path) -> None:
    student = make_model(tmp_path / "student", seed=1, chat=True)
    teacher = make_model(tmp_path / "teacher", seed=2, chat=True)
    stops_at(student, [2])
    stops_at(teacher, [2, 4])
    found = run(tmp_path).teachers.models["teacher"].alignment.stops
    assert dict(found) == {2: 4, 4: 2}
    assert found.merged == (4,)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(["<|im_end|>"], [4]), (["<eos>", "<|im_end|>"], [2, 4]), (["is", "<eos>"], None), (None, [2])],
)
def test_what_is_exported_stops_where_the_run_stopped(
    tmp_path: Path, stop: list[str] | None, expected: list[int] | None
) -> None:
    make_model(tmp_path / "student", seed=1, chat=True)
    make_model(tmp_path / "teacher", seed=2, chat=True)
    found = run(tmp_path, **({} if stop is None else {"stop": stop}))
    setup, folder = found.setup, tmp_path / "run" / "model"
    again = loaded(folder)
    assert again.stops == setup.student.stops
    ids = [setup.student.stops.primary, *sorted(setup.student.stops.ids - {setup.student.stops.primary})]
    assert expected in (None, ids)
    named = ids[0] if len(ids) == 1 else ids
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text())["eos_token_id"] == named
    # An ordinary token does not become special: texts that hold it would be cut differently.
    assert again.tokenizer.eos_token_id == (2 if expected is None else ids[0])
    assert again.tokenizer.encode("the answer is") == setup.student.tokenizer.encode("the answer is")
    assert (
        f"stops with: `{setup.student.tokenizer.convert_ids_to_tokens(ids[0])} ({ids[0]})"
        in (folder / "README.md").read_text()
    )
    # The run's own models are as they were.
    assert setup.student.tokenizer.eos_token == "<eos>"
    # Whoever edits generation_config.json afterwards is heard.
    transformers.GenerationConfig(eos_token_id=[3, 4]).save_pretrained(folder)
    if expected is not None:
        assert {3, 4} <= loaded(folder).stops.ids
