"""The processor of the visual task and its bundled models: they are read by transformers, and the teacher looks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from retort import config as configuration
from retort.cli import main
from retort.config import recipe
from retort.preflight import checks
from retort.tasks.shapes import MODELS_DIR, student_path, teacher_path
from retort.tasks.shapes.build import (
    DESCRIBE,
    MAX_NEW_TOKENS,
    Data,
    Recipe,
    Score,
    measure,
    pixel_values,
    pixelated,
    words,
)
from retort.tasks.shapes.problems import OPENINGS, drawn
from retort.tasks.shapes.tokenizer import CONTEXT, IMAGE, IMAGE_TOKENS, TEMPLATES, build_processor, build_tokenizer
from retort.train.models.models import located
from retort.train.setup.prepare import prepare

PATHS = {"teacher": teacher_path, "student": student_path}


@cache
def scored(name: str) -> Score:
    path: Path = PATHS[name]()
    return measure(LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32), 96, 1)


def test_text_survives_the_tokenizer() -> None:
    tokenizer, limits = build_tokenizer(), recipe("shapes")["rollout"]
    for index in range(60):
        one = drawn("train", index)
        for text in (one.text, one.caption, DESCRIBE, *map(one.response, OPENINGS)):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        for name, text in (("hint", one.caption), ("solution", one.response())):
            ids = tokenizer(TEMPLATES[name].format(text=text)).input_ids
            assert tokenizer.unk_token_id not in ids
            assert len(ids) + len(words(one.text)) + MAX_NEW_TOKENS <= CONTEXT
        assert len(tokenizer(one.response()).input_ids) < MAX_NEW_TOKENS == limits["max_new_tokens"]
        assert len(words(one.text)) <= limits["max_prompt_tokens"]


def test_models_are_trained_on_what_the_processor_makes() -> None:
    processor: Any = build_processor()
    for index in range(12):
        one = drawn("train", index)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.text}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        picture = one.picture().decoded()
        made = processor(text=[text], images=[picture], return_tensors="pt")
        assert made.input_ids[0].tolist() == processor.tokenizer.convert_tokens_to_ids(words(one.text))
        assert torch.equal(made.pixel_values, pixel_values([one]))
        coarse = picture.resize((3, 3), 2).resize(picture.size, 0)
        made = processor(text=[text], images=[coarse], return_tensors="pt")
        assert torch.allclose(made.pixel_values, pixelated(pixel_values([one])), atol=0.01), "but for rounding to bytes"


def test_what_is_learnt_is_the_response() -> None:
    data, word = Data(Recipe(steps=1, batch=24, right=0.5, hinted=0.5)), build_tokenizer().get_vocab()
    for ids_BL, learnt_BL, values in data.batch():
        assert ids_BL.shape == learnt_BL.shape and len(values) == len(ids_BL)
        assert ((ids_BL == word[IMAGE]).sum(1) == IMAGE_TOKENS).all()
        assert (learnt_BL & (ids_BL == word["<eos>"])).sum(1).tolist() == [1] * len(ids_BL)
        assert not (learnt_BL & (ids_BL == word[IMAGE])).any()


@pytest.mark.parametrize("name", PATHS)
def test_transformers_reads_the_bundled_models(name: str) -> None:
    path: Path = PATHS[name]()
    processor, config = AutoProcessor.from_pretrained(path), AutoConfig.from_pretrained(path)
    tokenizer = processor.tokenizer
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert processor.chat_template == build_tokenizer().chat_template == tokenizer.chat_template
    assert len(tokenizer) == config.text_config.vocab_size
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE)
    for settings in (config, config.text_config, GenerationConfig.from_pretrained(path)):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    picture = drawn("train", 0).picture().decoded()
    assert processor(text=IMAGE, images=picture).input_ids == [[config.image_token_id] * config.image_seq_length]
    assert "license: apache-2.0" in (path / "README.md").read_text(encoding="utf-8")
    assert located(f"shapes:{name}") == str(path)


def test_the_bundled_models_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*") if file.is_file()) < 4_000_000


def test_the_teacher_looks() -> None:
    score = scored("teacher")
    assert score.right > 0.85
    assert score.pixelated < 0.6
    assert score.changed > 0.35


def test_the_student_guesses() -> None:
    score, teacher = scored("student"), scored("teacher")
    assert 0.35 < score.right < 0.6
    assert score.noted > teacher.noted + 0.1
    assert score.changed < teacher.changed - 0.1


def test_the_commands_know_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "shapes:teacher", "--data", "shapes", "problems=16", "samples=2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["avg@2"]["value"] > 0.7
    assert row["reward/followed"]["value"] < 0.3


def test_the_doctor_shows_the_teacher_the_pictures() -> None:
    prepared = prepare(configuration.resolve({**recipe("shapes"), "limit": 40, "eval": {"problems": 4}}))
    found = dict(checks.check_teacher_loaded(prepared).values)
    assert found["nats_per_token"] < 0.4, "without the pictures it is 0.9"
