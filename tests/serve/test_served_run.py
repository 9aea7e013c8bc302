"""Runs with a teacher on a server: they are the local ones to the last bit, whatever the method asks of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import connected, in_thread

from retort import config as configuration
from retort.errors import UserError
from retort.models.load import load_model
from retort.train import runner

#: One method for each kind of need: the sampled token, top-k and entropy, the whole distribution, hidden states.
METHODS = ["opd", "eopd", "gkd", "topk_kl"]


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=2, hidden_size=24, padded_to=64)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as found:
        yield found


def run(settings: dict[str, Any], folder: Path, **changed: Any) -> runner.Run:
    return runner.start(configuration.resolve({**settings, **changed}), folder).go()


def weights(run: runner.Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_local_one_to_the_last_bit(
    method: str, tiny_run: dict[str, Any], url: str, tmp_path: Path
) -> None:
    settings = tiny_run | {"method": {"name": method}, "steps": 2}
    local = run(settings, tmp_path / "local")
    served = run(settings, tmp_path / "served", teacher=url)
    assert weights(local) == weights(served)
    assert json.loads((local.folder / "eval.json").read_text()) == json.loads((served.folder / "eval.json").read_text())


def test_a_cold_start_on_its_answers_is_the_local_one(tiny_run: dict[str, Any], url: str, tmp_path: Path) -> None:
    settings = tiny_run | {"cold_start": {"steps": 1, "attempts": None}, "steps": 2}
    assert weights(run(settings, tmp_path / "a")) == weights(run(settings, tmp_path / "b", teacher=url))


def test_a_resumed_run_may_go_on_with_the_folder_or_with_the_server(
    tiny_run: dict[str, Any], url: str, folder: Path, tmp_path: Path
) -> None:
    whole = run(tiny_run, tmp_path / "run", teacher=url)
    expected = weights(whole)
    config = json.loads((whole.folder / "config.json").read_text())
    (whole.folder / "config.json").write_text(json.dumps(config | {"teacher": str(folder)}))
    assert weights(runner.resume(whole.folder / "checkpoints" / "step-2").go()) == expected


def test_a_base_and_a_model_of_ones_own_may_be_served(tiny_run: dict[str, Any], url: str, tmp_path: Path) -> None:
    settings = tiny_run | {"method": {"name": "exopd"}, "steps": 1}
    student = tiny_run["student"]
    lm = load_model(student, role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as base:
        local, served = run(settings, tmp_path / "a"), run(settings, tmp_path / "b", base=base, teacher=url)
    assert weights(local) == weights(served)


def test_no_key_and_no_file_of_the_server_stays(
    tiny_run: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_TEACHER_KEY", "sesame-9876")
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm, key="sesame-9876") as url:
        found = run(tiny_run | {"steps": 1}, tmp_path / "run", teacher=url)
        files = [path for path in found.folder.rglob("*") if path.is_file()]
        assert files
        assert not [path for path in files if b"sesame" in path.read_bytes()]
        monkeypatch.setenv("RETORT_TEACHER_KEY", "wrong")
        with pytest.raises(UserError, match="401") as refused:
            run(tiny_run | {"steps": 1}, tmp_path / "other", teacher=url)
        assert "wrong" not in str(refused.value).replace(url, "")


def test_states_in_bf16_come_with_a_note_of_their_noise(tiny_run: dict[str, Any], url: str, tmp_path: Path) -> None:
    settings = tiny_run | {"method": {"name": "gkd"}, "teacher": url, "steps": 1, "server": {"payload": "bf16"}}
    made = runner.start(configuration.resolve(settings), tmp_path / "run")
    note = next(note for note in made.prepared.notes if "travel in bf16" in note)
    noise = float(re.search(r"is (\S+) nats", note)[1])  # type: ignore[index]
    assert 1e-5 < noise < 1e-1
    lm = made.teachers.lms["teacher"]
    assert lm.head().weight_VD.dtype == torch.float32
    made.go()


def test_a_student_cannot_be_served(tiny_run: dict[str, Any], url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="student = http.*must be here"):
        run(tiny_run, tmp_path / "run", student=url)


def test_nobody_there_is_one_line(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="retort serve MODEL"):
        run(tiny_run, tmp_path / "run", teacher="http://127.0.0.1:9", server={"patience": 0})
    assert not (tmp_path / "run").exists()


def test_the_students_own_weights_teach_nothing_from_a_server_either(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    lm = load_model(tiny_run["student"], role="teacher", precision="fp32", device=torch.device("cpu"))
    with in_thread(lm) as url, pytest.raises(UserError, match="hold the same weights"):
        run(tiny_run, tmp_path / "run", teacher=url)


def test_what_is_asked_at_once_is_bounded_and_a_long_request_is_cut(folder: Path) -> None:
    lm = load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))
    from retort.core.sequences import TokenSequence

    sequences = [TokenSequence.of([5, 6]).then([7 + n, 9, 2], decided=True) for n in range(20)]
    with in_thread(lm, most_tokens=16) as url:
        served = connected(url, lm)
        torch.testing.assert_close(served.all_hidden(sequences, 1000), lm.all_hidden(sequences, 16))
        settings = {"vocab": 64, "temperature": 1.0, "entropy": True, "top_k": 3}
        found = served.score(sequences, 1000, settings)
        assert found["logp"].shape == (60, 3)
