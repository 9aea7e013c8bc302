"""The tokenizer of Rooms and the bundled models."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from retort.align.chat import TemplateOptions, render
from retort.align.replies import reply_ids
from retort.core.rollouts import Message, Prompt
from retort.tasks.rooms import MODELS_DIR, student_path, teacher_path
from retort.tasks.rooms.build import encoded
from retort.tasks.rooms.episodes import games, played
from retort.tasks.rooms.game import Rooms
from retort.tasks.rooms.tokenizer import build_tokenizer


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_tokenizer_and_config_of_the_bundled_models(name: str) -> None:
    path: Path = {"teacher": teacher_path, "student": student_path}[name]()
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert len(tokenizer) == config.vocab_size
    for settings in (config, GenerationConfig.from_pretrained(path)):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "license: apache-2.0" in (path / "README.md").read_text(encoding="utf-8")


def test_the_bundled_models_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*") if file.is_file()) < 6_000_000


def test_models_are_trained_on_the_ids_that_a_rollout_has() -> None:
    tokenizer = build_tokenizer()
    for game in islice(games("train", "four"), 20):
        turns = played(*game, random.Random(0), mistakes=0.4)
        whole, learnt = encoded(turns, tokenizer.get_vocab())
        prompt = Prompt("p", (Message("user", turns[0].observation),))
        ids, decided = render(prompt, tokenizer), list[bool]()
        decided += [False] * len(ids)
        for number, turn in enumerate(turns):
            if number:
                said = (Message("user", turn.observation),)
                ids += reply_ids(prompt, said, tokenizer.eos_token_id, tokenizer, TemplateOptions())
                decided += [False] * (len(ids) - len(decided))
            ids += [*tokenizer.encode(turn.command, add_special_tokens=False), tokenizer.eos_token_id]
            decided += [turn.experts] * (len(ids) - len(decided))
        assert whole == ids
        assert learnt == decided
        assert tokenizer.unk_token_id not in ids


def test_every_word_of_the_game_is_a_token() -> None:
    tokenizer, game, rng = build_tokenizer(), Rooms(), random.Random(0)
    said = [
        "dance",
        "go north",
        "open north red",
        "take red",
        "fix east",
        "feel",
        "climb",
        "open west blue",
        "take blue",
    ]
    for task in ("three 1", "four 1", "four 2"):
        texts = [game.reset(task, 1)]
        over = False
        while not over:
            seen, _, over, _ = game.step(rng.choice([*said, *game.expert()[:1]]))
            texts.append(seen)
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False), text


def test_the_teacher_knows_the_way_back_and_the_student_has_to_learn_it() -> None:
    """The expert's command after a mistake, in the likelihood of both; the shares of games won are in the cards."""
    from transformers import AutoModelForCausalLM

    tokenizer, found = build_tokenizer(), dict[str, float]()
    whole = [played(*game, random.Random(5), mistakes=0.3) for game in islice(games("held_out"), 24)]
    for name, path in (("teacher", teacher_path()), ("student", student_path())):
        model, total, count = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.0, 0
        for turns in whole:
            ids, learnt = encoded(turns, tokenizer.get_vocab())
            with torch.no_grad():
                logp_LV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            chosen = [place for place, own in enumerate(learnt) if own]
            total -= sum(float(logp_LV[place - 1, ids[place]]) for place in chosen)
            count += len(chosen)
        found[name] = total / count
    assert found["teacher"] < 0.6 * found["student"], found
