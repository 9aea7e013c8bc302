"""Two real models out of GGUF packages: their answers, and short runs of one beside itself with layers left out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from fetch import Unavailable, gguf_file

import retort
from retort.cli import main
from retort.models.lm import LanguageModel
from retort.models.load import load_model

# transformers and tqdm warn about this and that while they read such a file.
pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
LAYERS = 20
QUESTIONS = ["What is 2 + 3?", "Name a colour.", "What is 7 - 4?", "Who wrote Hamlet?"] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("real")
    yield made
    shutil.rmtree(made)


def read(name: str, folder: Path) -> LanguageModel:
    scratch = folder / f"{name}-file"
    scratch.mkdir(exist_ok=True)
    try:
        file = gguf_file(name, scratch)
    except Unavailable as error:
        pytest.skip(str(error))
    return load_model(str(file), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def smollm2(folder: Path) -> LanguageModel:
    return read("smollm2", folder)


@pytest.fixture(scope="module")
def pair(folder: Path, smollm2: LanguageModel) -> dict[str, str]:
    """The model as a folder, and the same without its middle layers."""
    model: Any = smollm2.model
    model.generation_config = smollm2.saved_generation
    for name in ("teacher", "student"):
        if name == "student":
            layers, first = model.model.layers, LAYERS // 2
            kept = [*range(first), *range(len(layers) - (LAYERS - first), len(layers))]
            state = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
            for place, old in enumerate(kept):
                own = layers[old].state_dict()
                state |= {f"model.layers.{place}.{key}": value for key, value in own.items()}
            model.config.num_hidden_layers = LAYERS
            model = type(model)(model.config)
            model.load_state_dict(state)
            model.generation_config = smollm2.saved_generation
        model.save_pretrained(folder / name)
        smollm2.tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("student", "teacher")}


@pytest.fixture(scope="module")
def questions(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    rows = [
        {"prompt": f"{text} ({place})", "response": "I do not know.", "answer": "5"}
        for place, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def greedy(lm: LanguageModel, ids: list[int], tokens: int = 24) -> str:
    stops = sorted(lm.stops.ids)
    made = lm.model.generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
    )
    return lm.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def test_smollm2_answers(smollm2: LanguageModel) -> None:
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert "Paris" in greedy(smollm2, ids)
    assert smollm2.rounded == "quantised to Q4_1 (GGUF)" and smollm2.notes == []


def test_a_saved_tokenizer_reads_the_same(smollm2: LanguageModel, pair: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(pair["teacher"])
    for text in ("It costs  12 dollars,\n\n\t3.5 % of it", "def f(x):\n    return x ** 2  # é 你好"):
        assert again(text).input_ids == smollm2.tokenizer(text).input_ids


def test_gemma_continues(folder: Path) -> None:
    lm = read("gemma3-270m", folder)
    said = greedy(lm, lm.tokenizer("The capital of France is").input_ids)
    assert len(said.split()) > 5 and said.isprintable() | ("\n" in said)
    assert lm.rounded == "quantised to Q4_K_M (GGUF)"


def test_doctor(pair: dict[str, str], questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", pair["student"], "--teacher", pair["teacher"], "--data", str(questions)]
    small = ["rollout.prompts=4", "rollout.max_new_tokens=16", "eval.problems=0", "precision=fp32", "threads=1"]
    assert main(["doctor", *words, *small]) in (0, 1)
    shown = capsys.readouterr().out
    assert "tokenizer" in shown and "Traceback" not in shown


@pytest.mark.parametrize("method", ["eopd", "gkd"])
def test_two_steps(method: str, pair: dict[str, str], questions: Path, folder: Path) -> None:
    settings = {
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "checks": "warn",
        "rollout": {"prompts": 4, "max_new_tokens": 32},
        "eval": {"problems": 0},
    }
    out = folder / method
    retort.distill(**pair, data=questions, method=method, steps=2, out=out, settings=settings, quiet=True)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and (out / "model" / "model.safetensors").is_file()
