"""Tiny models that often end their turns, and a game that any text moves on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support import make_model

from retort.tasks.rooms.tokenizer import ROOMS, WORDS


def make_player(folder: Path, *, seed: int, hidden_size: int = 16) -> Path:
    """A model of random weights whose turns are a few words long."""
    made: dict[str, Any] = {"words": [*WORDS, *ROOMS], "chat": True, "eos": "<|im_end|>", "hidden_size": hidden_size}
    return often_ending(make_model(folder, seed=seed, max_position_embeddings=512, **made))


#: Two chat templates for models of `trained`, which say the same in other words.
TEMPLATES = tuple(
    f"{{% for one in messages %}}{before}{{% if one.role == 'assistant' %}}</s>{{% endif %}} {{% endfor %}}"
    f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    for before, opening in (
        ("{{ one.role }}: {{ one.content }}", "assistant: "),
        ("[{{ one.role }}] {{ one.content }}", "[assistant] "),
    )
)


def often_ending(folder: Path, chat_template: str | None = None, by: float = 3.0) -> Path:
    """A model in a folder, changed to end its turns often.

    Args:
        folder: The model's.
        chat_template: A template to give it.
        by: Factor of its stop's row in the head, so that the stop is very likely in some contexts.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[model.config.eos_token_id] *= by
    model.save_pretrained(folder)
    if chat_template is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
    return folder


class Walk:
    """Three turns, which any text makes; the last decides: a success is one of an odd number of words."""

    max_turns = 3

    def reset(self, task: str, seed: int) -> str:
        self.turns, self.room = 0, ROOMS[seed % len(ROOMS)]
        return f"goal {self.room} . what ?"

    def step(self, text: str) -> tuple[str, float, bool, dict[str, Any]]:
        self.turns += 1
        over = self.turns == self.max_turns
        won = over and len(text.split()) % 2 == 1
        errors = int("go" not in text.split())
        return f"wall at {ROOMS[len(text) % len(ROOMS)]}", float(won), over, {"success": won, "tool_errors": errors}

    def expert(self) -> list[str]:
        return ["go north"] * (self.max_turns - self.turns - 1) + ["take key now"]
