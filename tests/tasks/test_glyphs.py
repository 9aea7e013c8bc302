"""The image task: pictures, prompts in two wordings, and models of which each expert knows one reward."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from retort.config import recipe
from retort.core.messages import Message
from retort.core.rollouts import Prompt
from retort.flows.small import SmallFlow
from retort.rewards.samples import SampleGrader
from retort.tasks.glyphs import DOMAINS, MODELS_DIR, build, rows, student_path, teacher_paths
from retort.tasks.glyphs.build import CONFIG, Score, Stage, indices, measure, training
from retort.tasks.glyphs.pictures import COLORS, FONT, POSITIONS, SIDE, picture
from retort.tasks.glyphs.problems import WORDS, combinations
from retort.tasks.glyphs.readers import color_N, glyph_N
from retort.tasks.matching import Fit


@cache
def scored(name: str) -> Score:
    """Of one sample per held-out combination; the merge is the mean of the experts' weights."""
    if name == "merge":
        flow, *others = (SmallFlow.open(path) for path in teacher_paths().values())
        weights = [own.module.state_dict() for own in (flow, *others)]
        flow.module.load_state_dict({key: sum(own[key] for own in weights) / len(weights) for key in weights[0]})
    else:
        flow = SmallFlow.open(MODELS_DIR / name)
    return measure(flow, "color", 1)


def test_a_picture_shows_what_it_is_asked_to() -> None:
    image = picture("L", "red", "bottom right", ground=0.2)
    assert image.shape == (3, SIDE, SIDE)
    assert image[:, 13, 13].tolist() == pytest.approx(COLORS["red"]), "the upper left cell of the character"
    assert image[:, 22, 22].tolist() == pytest.approx(COLORS["red"]), "its foot"
    assert image[:, 13, 22].tolist() == pytest.approx([0.2] * 3)
    assert image[:, :12].max() == pytest.approx(0.2), "nothing in the other half"


def test_all_characters_and_colours_differ() -> None:
    every = torch.stack([picture(glyph, "red", "top left") for glyph in FONT])
    assert torch.cdist(every.flatten(1), every.flatten(1)).fill_diagonal_(9).min() > 2
    colors = torch.tensor(list(COLORS.values()))
    assert torch.cdist(colors, colors).fill_diagonal_(9).min() > 0.4


def test_combinations_are_held_out() -> None:
    train, held_out = combinations("train"), combinations("held_out")
    assert (len(train), len(held_out)) == (192, 48)
    assert len({*train, *held_out}) == 240 == len(FONT) * len(COLORS) * len(POSITIONS)
    for first, second in (("glyph", "color"), ("glyph", "position"), ("color", "position")):
        pairs = {(getattr(one, first), getattr(one, second)) for one in train}
        assert {(getattr(one, first), getattr(one, second)) for one in held_out} <= pairs, "every pair is known"


def test_rows() -> None:
    every, held_out = rows("train"), rows("held_out")
    assert (len(every), len(held_out)) == (384, 96)
    assert len({row["id"] for row in every + held_out}) == len({row["prompt"] for row in every + held_out}) == 480
    assert rows("train", 7) == every[:7]
    other = rows("train", seed=5)
    assert other != every and sorted(row["id"] for row in other) == sorted(row["id"] for row in every)
    assert [row["domain"] for row in every[:4]] == ["glyph", "color"] * 2
    assert {row["domain"] for row in every} == set(teacher_paths())
    for row in every + held_out:
        assert set(row["prompt"].split()) <= set(WORDS)
        assert row["prompt"].split()[0] == {"glyph": "write", "color": "paint"}[row["domain"]]
    for wrong in ({"split": "test"}, {"split": "held_out", "count": 97}):
        with pytest.raises(ValueError, match="glyphs: the split"):
            rows(**wrong)


def test_rewards_read_the_prompts() -> None:
    grader = SampleGrader(recipe("glyphs")["flow"]["rewards"])
    for split in ("train", "held_out"):
        asked = combinations(split)
        images = torch.stack([picture(one.glyph, one.color, one.position) for one in asked])
        for domain in DOMAINS:
            prompts = [Prompt("1", (Message("user", one.text(domain)),), domain=domain) for one in asked]
            for grade in grader.grade(images, prompts):
                assert grade.reward == 1.0 and set(grade.parts.values()) == {1.0} and len(grade.parts) == 4


@pytest.mark.parametrize(("glyph", "color"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_how_often_pictures_follow_their_prompts(glyph: float, color: float) -> None:
    data, texts = training(Stage(glyph, color, Fit(1)))(500, torch.Generator().manual_seed(0))
    known = {one.text(domain): one for one in combinations("train") for domain in DOMAINS}
    glyphs, colors, _ = indices([known[text] for text in texts])  # training combinations only
    images = data / 2 + 0.5
    for follows, names, right_N in (
        (glyph, FONT, glyph_N(images) == glyphs),
        (color, COLORS, color_N(images) == colors),
    ):
        expected = follows + (1 - follows) / len(names)
        assert right_N.float().mean().item() == pytest.approx(expected, abs=0.06)
    assert {text.split()[0] for text in texts} == {"write", "paint"}


def test_models_are_what_the_script_makes() -> None:
    for path in (student_path(), *teacher_paths().values()):
        flow = SmallFlow.open(path)
        assert flow.config == CONFIG
        assert 200_000 < sum(own.numel() for own in flow.module.parameters()) < 1_000_000
        assert "python -m retort.tasks.glyphs.build" in (path / "README.md").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*")) < 5_200_000


def test_each_expert_knows_one_reward_and_the_student_neither_well() -> None:
    student, glyph, color = (scored(name) for name in ("student", "glyph", "color"))
    assert 0.1 < student.glyph < 0.6 and 0.2 < student.color < 0.6
    assert glyph.glyph > 0.8 > 0.35 > glyph.color
    assert color.color > 0.7 > 0.35 > color.glyph


def test_the_mean_of_the_experts_is_between() -> None:
    student, merge = scored("student"), scored("merge")
    assert student.glyph + 0.05 < merge.glyph < scored("glyph").glyph - 0.1
    assert student.color + 0.05 < merge.color < scored("color").color - 0.1


def test_the_script_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "STUDENT", (Stage(1.0, 1.0, Fit(steps=2, batch=4)), Stage(0.5, 0.5, Fit(1, batch=4))))
    monkeypatch.setattr(build, "EXPERTS", {"glyph": Stage(1.0, 0.0, Fit(steps=2, batch=4))})
    monkeypatch.setattr(build, "measure", lambda flow, domain: Score(0.5, 0.25))
    saved = []
    for folder, seed in (("one", 0), ("same", 0), ("other", 1)):
        monkeypatch.setattr(sys, "argv", ["build", "--out", str(tmp_path / folder), "--seed", str(seed)])
        build.main()
        saved.append([(tmp_path / folder / name / "model.safetensors").read_bytes() for name in ("student", "glyph")])
    assert saved[0] == saved[1] != saved[2]
    assert saved[0][0] != saved[0][1]
    assert "glyph: step 2 of 2" in capsys.readouterr().out
    card = (tmp_path / "one" / "glyph" / "README.md").read_text(encoding="utf-8")
    assert "| color | 50.0% | 25.0% |" in card and "3. 2 steps of 4 pictures" in card
