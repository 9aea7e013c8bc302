"""The model card says what is true, in words, and takes nothing at its word that others wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import retort
from retort import config as configuration
from retort.evaluate.measures import MEASURES, measure, ordered
from retort.methods._cold_start import with_cold_start
from retort.train.output import card as cards
from retort.train.output.card import card, model_licence, standing
from retort.train.output.summary import summary
from retort.train.setup.prepare import prepare

CELL = {"value": 0.25, "low": 0.125, "high": 0.5}
RESULTS: dict[str, Any] = {
    "k": 2,
    "problems": 4,
    "rows": [
        {"who": "student before", "student_entropy_uncertain": CELL, "avg@2": CELL},
        {"who": "student after", "avg@2": CELL, "reward/fo|llowed": CELL},
    ],
}


def test_the_card_and_the_summary_of_a_run(tiny_run: dict[str, Any]) -> None:
    published = retort.load("eopd")
    own = replace(published, terms=tuple(replace(term, coef=2.0) for term in published.terms))
    settings = tiny_run | {"lora": {"rank": 2}, "method": {"name": "eopd"}}
    setup = prepare(configuration.resolve(settings, own=own), own)
    text, first = card(setup, RESULTS, 3), summary(setup)
    weights = sum(tensor.numel() for tensor in setup.student.weights().values())
    learnt = setup.student.trainable_parameters
    assert f"({weights:,} parameters)" in text and f": {learnt:,} parameters learnt" in text
    assert sum(tensor.numel() for tensor in setup.student.model.parameters()) == weights + learnt
    assert f"{weights / 1e3:.2f} k parameters, and {learnt / 1e3:.2f} k more that learn" in first["student"]
    for said in (text, first["method"]):
        assert "faithful" not in said and "changed by the user, not as published" in said
    assert "learning rate 0.01" in text and "warm-up 0" in text
    assert f"retort {retort.__version__}, torch {torch.__version__}, transformers {transformers.__version__}" in text
    assert "base_model" not in text and "license:" not in text
    assert "licence: not known: the student's folder states none" in text
    assert "| own entropy where the teacher is uncertain, nats | 0.250 (0.125 to 0.500) | - |" in text
    assert "| avg@2 | 25.0% (12.5% to 50.0%) |" in text
    assert r"| fo\|llowed | - | 0.250" in text
    assert "student_entropy" not in text


def test_how_far_a_method_is_a_papers() -> None:
    published = retort.load("opd")
    assert standing(published).startswith("faithful: ")
    assert standing(with_cold_start(published, 2)).startswith("faithful: ")
    assert standing(replace(published, temperature=2.0)).startswith("changed by the user, not as published: ")
    assert standing(replace(published, paper=None)) == "a method of the user's own"


@pytest.mark.parametrize(
    ("files", "identifier", "words"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, "apache-2.0", "as the student's card states"),
        ({"README.md": "---\nlicense: 'x]\\nevil: 1'\n---\n"}, None, "not known"),
        ({"README.md": "---\nlicense: [a, b]\n---\n", "LICENSE": "\n  Some `Licence`\n"}, None, "`` Some `Licence` ``"),
        ({"README.md": "---\n: : [\n---\n", "COPYING": "\x1b[31mGPL"}, None, r"\x1b[31mGPL"),
        ({"README.md": "no head"}, None, "not known"),
        ({}, None, "not known"),
    ],
)
def test_the_licence_is_what_the_folder_states(
    tmp_path: Path, files: dict[str, str], identifier: str | None, words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, said = model_licence(str(tmp_path))
    assert found == identifier
    assert words in said


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B-Base"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen/Qwen3-0.6B"),
        ("/models/Qwen3", None),
        ("countdown:student", None),
        ("a\n/b", None),
    ],
)
def test_where_a_model_comes_from(name: str, hub: str | None) -> None:
    assert cards._hub_name(name) == hub  # pyright: ignore[reportPrivateUsage]


def test_every_measure_has_words() -> None:
    assert ordered(["reverse_kl", "length", "own", "reward/x", "pass@4", "avg@4"])[-1] == "own"
    assert ordered(["reverse_kl", "length", "reward/x", "pass@4"]) == ["pass@4", "reward/x", "length", "reverse_kl"]
    assert not any("_" in measure(name).words for name in MEASURES)
