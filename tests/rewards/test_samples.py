"""Rewards of samples: what they find in prompts, what they see in samples, and functions of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retort.core.messages import Message
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.rewards.samples import SAMPLE_REWARDS, SampleGrader, sample_reward
from retort.tasks.glyphs import readers
from retort.tasks.glyphs.pictures import COLORS, FONT, POSITIONS, picture
from retort.tasks.plane.shapes import SHAPES, points

EVERY = list(product(FONT, COLORS, POSITIONS))
IMAGES = torch.stack([picture(*one) for one in EVERY])


def asking(text: str, *, domain: str = "", answer: str | None = None, id: str = "1") -> Prompt:
    return Prompt(id, (Message("user", text),), domain=domain, answer=answer)


def noisy(level: float) -> Tensor:
    return (IMAGES + level * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


PROMPTS = [asking(f"write '{glyph}' in {color} at the {position}") for glyph, color, position in EVERY]


@pytest.mark.parametrize("name", ["glyph", "color", "position", "count"])
def test_every_picture_of_the_task_is_right_for_its_prompt_and_wrong_for_others(name: str) -> None:
    reward = SAMPLE_REWARDS[name]
    assert list(reward(IMAGES, PROMPTS)) == [1.0] * len(EVERY)
    assert list(reward(noisy(0.05), PROMPTS)) == [1.0] * len(EVERY)
    column = {"glyph": 0, "color": 1, "position": 2}.get(name)
    if column is not None:
        by = 24 if name == "glyph" else 4 if name == "color" else 1  # the next character, colour or position
        others = PROMPTS[by:] + PROMPTS[:by]
        same = [one[column] == other[column] for one, other in zip(EVERY, EVERY[by:] + EVERY[:by], strict=True)]
        assert [bool(own) for own in reward(IMAGES, others)] == same and not all(same)
    blank = torch.full((3, 3, 24, 24), 0.1)
    assert list(reward(blank, PROMPTS[:3])) == [0.0] * 3
    assert list(reward(torch.full_like(blank, float("nan")), PROMPTS[:3])) == [0.0] * 3


def test_how_often_characters_and_colours_are_read_right_in_noise() -> None:
    """The numbers of docs/glyphs.md."""
    right = {
        level: [sum(map(bool, SAMPLE_REWARDS[name](noisy(level), PROMPTS))) / len(EVERY) for name in ("glyph", "color")]
        for level in (0.05, 0.1)
    }
    assert right[0.05] == [1.0, 1.0]
    assert min(right[0.1]) > 0.95


def test_noise_shows_nothing() -> None:
    noise = torch.rand(200, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert (readers.glyph_N(noise) == -1).float().mean() > 0.99


def test_pictures_of_another_size_are_scaled() -> None:
    large = torch.nn.functional.interpolate(IMAGES, (96, 48), mode="nearest")
    for name in ("glyph", "color", "position", "count"):
        assert list(SAMPLE_REWARDS[name](large, PROMPTS)) == [1.0] * len(EVERY)


def test_marks_are_counted_and_specks_are_not() -> None:
    image = torch.full((3, 24, 24), 0.1)
    image[:, 1:4, 1:4] = 0.9
    image[:, 4:7, 4:7] = 0.9  # touches the first at a corner
    image[:, 12:20, 2:4] = 0.5
    image[0, 2:6, 20:23] = 1.0
    image[:, 20:22, 20:22] = 0.9  # four pixels: a speck
    assert readers.marks_N(image[None]).tolist() == [3]
    two = SAMPLE_REWARDS["count"]
    assert list(two(image[None].expand(3, -1, -1, -1), [asking("three bars"), asking("2 bars"), asking("a '4'")])) == [
        1.0,
        0.0,
        0.0,
    ]


FOUND = {
    "glyph": [
        ("a red 'A'", "A"),
        ('the letter "X" twice: "X"', "X"),
        ("a ‘4’ or a 'T'", None),
        ("it's a 'Q'", None),
        ("don't", None),
        ("A", None),
    ],
    "color": [("a Red hat", "red"), ("red, and red", "red"), ("reddish", None), ("red or blue", None), ("a hat", None)],
    "position": [("at the top-left corner", "top left"), ("Bottom  Right", "bottom right"), ("left", None)],
    "count": [("three birds", "three"), ("3 birds", "three"), ("a '4'", "one"), ("two '4'", "two"), ("birds", None)],
    "on_shape": [("upper moon", "upper moon"), ("Both Gaussians", "both gaussians"), ("moon", None)],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_asked_for_is_found_in_words(name: str) -> None:
    reward = SAMPLE_REWARDS[name]
    for text, asked in FOUND[name]:
        prompt = asking(text)
        assert reward.asked(prompt) == asked, text  # pyright: ignore[reportAttributeAccessIssue]
        assert (reward.missing(prompt) is None) == (asked is not None)


def test_the_answer_is_read_where_the_prompt_asks_for_nothing() -> None:
    grader = SampleGrader(["glyph", "color"])
    prompt = asking("something nice", answer="a red 'A'")
    assert not grader.can_grade(asking("something nice"))
    assert grader.grade(picture("A", "red", "top left")[None], [prompt])[0].reward == 1.0
    assert grader.grade(picture("A", "red", "top left")[None], [asking("blue 'A'", answer="red")])[0].parts == {
        "glyph": 1.0,
        "color": 0.0,
    }, "the prompt comes first"


def test_points_are_graded_by_their_distance() -> None:
    reward = SAMPLE_REWARDS["on_shape"]
    for name in SHAPES:
        near = points(name, 300, torch.Generator().manual_seed(0))
        on = list(reward(near, [asking(name)] * 300))
        assert sum(on) / 300 > 0.97
        assert list(reward(near * 10, [asking(name)] * 300)) == [0.0] * 300
    moon = torch.tensor([[-0.5, 0.75], [-0.5, 0.4], [-1.5, -0.25], [0.5, -0.75], [float("inf"), 0.0]])
    assert list(reward(moon, [asking("upper moon")] * 5)) == [1.0, 0.0, 1.0, 0.0, 0.0], (
        "its top; below; end; other moon"
    )
    assert list(reward(moon[3:4], [asking("lower moon")])) == [1.0]
    assert list(reward(moon[3:4], [asking("both moons")])) == [1.0]


def test_the_reward_is_that_of_the_domain_or_the_mean() -> None:
    grader = SampleGrader(["glyph", "color"])
    image = picture("A", "red", "top left").expand(4, -1, -1, -1)
    prompts = [
        asking("'A' in blue", domain="glyph"),
        asking("'A' in blue", domain="color"),
        asking("'A' in blue", domain="elsewhere"),
        asking("'A'", domain="glyph"),
    ]
    grades = grader.grade(image, prompts)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.5, 1.0]
    assert [dict(grade.parts) for grade in grades] == [{"glyph": 1.0, "color": 0.0}] * 3 + [{"glyph": 1.0}]
    assert grader.name == "glyph, color"


def test_a_prompt_that_asks_for_nothing_is_refused_by_name() -> None:
    grader = SampleGrader(["glyph", "color"])
    fine, bad = asking("a red 'A'"), asking("a red thing\x1b", id="row-7")
    assert grader.can_grade(fine) and not grader.can_grade(bad)
    assert grader.can_grade(asking("a red thing", domain="color"))
    with pytest.raises(
        UserError, match=r"row 'row-7', prompt 'a red thing\\x1b': reward 'glyph' .* one character in quotes"
    ):
        grader.check([fine, bad])
    with pytest.raises(UserError, match="row-7"):
        grader.grade(IMAGES[:2], [fine, bad])


def test_samples_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match=r"reward 'glyph' grades samples \[N, 3, height, width\], not \(1, 2\)"):
        SampleGrader(["glyph"]).grade(torch.zeros(1, 2), [asking("'A'")])
    with pytest.raises(UserError, match=r"reward 'on_shape' grades samples \[N, 2\], not \(1, 3, 24, 24\)"):
        SampleGrader(["on_shape"]).grade(IMAGES[:1], [asking("upper moon")])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "must name rewards"),
        (["glyph", "glyph"], "each once"),
        (["glyf"], "no reward 'glyf'; did you mean 'glyph'"),
        (["nowhere_at_all:bright"], "flow.rewards = nowhere_at_all:bright: there is no module"),
        (["math:pi"], "flow.rewards = math:pi: that is a float"),
    ],
)
def test_names_that_are_wrong(names: Sequence[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SampleGrader(names)


OWN = """
import torch

def bright(samples, prompts):
    return samples.flatten(1).mean(1)

def few(samples, prompts):
    return [0.5]

def high(samples, prompts):
    return [7.0] * len(prompts)

def nan(samples, prompts):
    return torch.full((len(prompts),), float("nan"))

def words(samples, prompts):
    return ["good"] * len(prompts)

def ends(samples, prompts):
    raise SystemExit("enough\\nof this")
"""


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    samples, prompts = torch.full((2, 3, 4, 4), 0.25), [asking("a red 'A'", id=id) for id in ("a", "b")]
    grades = SampleGrader(["own_rewards:bright", "color"]).grade(samples, prompts)
    assert [dict(grade.parts) for grade in grades] == [{"own_rewards:bright": 0.25, "color": 0.0}] * 2
    assert sample_reward("own_rewards:bright").missing(asking("")) is None
    cases = {
        "few": "gave 1 numbers for 2 samples",
        "high": "row 'a': it gave 7.0; give a number from 0 to 1",
        "nan": "row 'a': it gave nan",
        "words": "it raised ValueError",
        "ends": "it raised SystemExit: enough of this, on 2 samples of shape (3, 4, 4)",
    }
    for name, words in cases.items():
        with pytest.raises(UserError) as caught:
            SampleGrader([f"own_rewards:{name}"]).grade(samples, prompts)
        assert words in str(caught.value) and f"own_rewards:{name}" in str(caught.value)
