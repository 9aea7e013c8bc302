"""Two real models out of GGUF packages: their answers, the checks of the pair, and short runs of several methods.

`RETORT_REAL` names the folder that keeps them; see `fetch.py`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from fetch import Unavailable, fetched, folder, gguf_file

from retort.cli import main
from retort.models import gguf
from retort.models.lm import LanguageModel
from retort.models.load import load_model

# transformers and tqdm warn about this and that while they read such a file.
pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
#: Layers that are left of SmolLM2's 30 where it learns from itself.
LAYERS = 20
QUESTIONS = ["What is 2 + 3?", "Name a colour.", "What is 7 - 4?", "Who wrote Hamlet?"] * 2
SMALL = ["precision=fp32", "device=cpu", "threads=1", "eval.problems=0", "rollout.prompts=4"]


def real(name: str) -> str:
    """The folder of a model."""
    try:
        return str(fetched(name, folder()))
    except Unavailable as error:
        pytest.skip(str(error))


def opened(name: str) -> LanguageModel:
    return load_model(real(name), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 without its middle layers."""
    target = tmp_path_factory.mktemp("cut")
    lm = opened("smollm2")
    model: Any = lm.model
    layers, first = model.model.layers, LAYERS // 2
    model.model.layers = torch.nn.ModuleList([*layers[:first], *layers[len(layers) - (LAYERS - first) :]])
    model.config.num_hidden_layers = LAYERS
    model.generation_config = lm.saved_generation
    model.save_pretrained(target)
    lm.tokenizer.save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {"prompt": f"{text} ({place})", "response": "I do not know.", "answer": "5"}
        for place, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def greedy(lm: LanguageModel, ids: list[int], tokens: int = 24) -> str:
    stops = sorted(lm.stops.ids)
    made = lm.model.generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
    )
    return lm.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def test_smollm2_answers() -> None:
    lm = opened("smollm2")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = lm.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert greedy(lm, ids) == "The capital of France is Paris."


def test_gemma_continues() -> None:
    lm = opened("gemma3-270m")
    ids = lm.tokenizer("The three primary colors are red, yellow, and").input_ids
    assert greedy(lm, ids, 1).strip() == "blue"
    assert lm.tokenizer.chat_template is None


@pytest.mark.parametrize(("name", "kind"), [("smollm2", "Q4_1"), ("gemma3-270m", "Q4_K_M")])
def test_quantisation_is_named(name: str, kind: str) -> None:
    real(name)
    file = str(gguf_file(name, folder()))
    assert gguf.rounded(file) == f"quantised to {kind} (GGUF)" and gguf.notes(file) == []


def test_doctor_on_two_tokenizers(questions: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", real("smollm2"), "--teacher", real("gemma3-270m"), "--data", questions, "--method", "simct"]
    assert main(["doctor", *words, *SMALL, "rollout.max_new_tokens=16"]) in (0, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "units of one token on each side" in shown and "<|im_end|>" in shown, shown


def train(words: list[str], questions: str, out: Path) -> list[dict[str, Any]]:
    """Two steps of a run by its command, and its lines of metrics."""
    fixed = ["--data", questions, "--steps", "2", "--out", str(out), "checks=skip", "rollout.max_new_tokens=32"]
    assert main(["train", *words, *fixed, *SMALL]) == 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps), steps
    assert (out / "model" / "model.safetensors").is_file() and (out / "model" / "tokenizer.json").is_file()
    return steps


@pytest.mark.parametrize("method", ["simct", "strict_ct", "uld", "opd"])
def test_two_steps_of_two_tokenizers(method: str, questions: str, tmp_path: Path) -> None:
    pair = ["--student", real("smollm2"), "--teacher", real("gemma3-270m")]
    for row in train([*pair, "--method", method], questions, tmp_path / "run"):
        assert row["view/teacher/one_to_one"] > 0.5 and row["view/teacher/unread"] < 0.5, row


@pytest.mark.parametrize("method", ["eopd", "gkd"])
def test_two_steps_of_one_tokenizer(method: str, cut: str, questions: str, tmp_path: Path) -> None:
    """The teacher is the file itself for one of them: its tokenizer is the one that was saved."""
    folder_or_file = real("smollm2") if method == "gkd" else str(gguf_file("smollm2", folder()))
    train(["--student", cut, "--teacher", folder_or_file, "--method", method], questions, tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ("quantised to Q4_1 (GGUF)" in card) == (method == "eopd")
