"""Questions about pictures of shapes and small charts, each with a note that is right less often than not.

A prompt is a picture and a text such as ``a triangle is often red . what colour is the triangle ?``, and a right
response ``looking at the picture , the triangle is in row 2 , column 3 , and it is blue . answer blue``. Whoever does
not look can follow the note: it is right in 45 % of the problems, and nothing in the text says in which. Only a few
tokens of a response depend on the picture (row, column, colour); the others are plain.

All it returns is the same on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from retort.core.images import PLACEHOLDER, PromptImage
from retort.tasks.shapes.pictures import COLOURS, GRID, SHAPES, Cell, Item, draw

Split = Literal["train", "held_out"]
Kind = Literal["colour", "beside", "count", "tallest"]

KINDS: tuple[Kind, ...] = ("colour", "beside", "count", "tallest")
NOTE_IS_RIGHT = 0.45
TRAIN_ROWS, HELD_OUT_ROWS = 4096, 512
MOST_COUNTED = 4
_HELD_OUT_PART = 16  # one problem in so many is held out, by its digest

SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
OPENINGS = ("looking at the picture , ", "in the picture , ", "here , ", "")
"""How a response may begin; no opening is better than another."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        kind: The kind of question.
        shape: The shape that it names; `bar` where it names none.
        side: A key of `SIDES`, for `beside`.
    """

    kind: Kind
    shape: str
    side: str = ""

    @property
    def text(self) -> str:
        """The question in words."""
        return {
            "colour": f"what colour is the {self.shape} ?",
            "beside": f"which shape is {self.side} the {self.shape} ?",
            "count": f"how many of the shapes are a {self.shape} ?",
            "tallest": "which colour has the tallest bar ?",
        }[self.kind]

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that it can have."""
        if self.kind == "count":
            return tuple(map(str, range(1, MOST_COUNTED + 1)))
        if self.kind == "beside":
            return tuple(shape for shape in SHAPES if shape != self.shape)
        return tuple(COLOURS)

    def note(self, answer: str) -> str:
        """The note that suggests an answer."""
        return {
            "colour": f"a {self.shape} is often {answer} .",
            "beside": f"a {answer} is often {self.side} a {self.shape} .",
            "count": f"often {answer} of them are a {self.shape} .",
            "tallest": f"a {answer} bar is often the tallest .",
        }[self.kind]


@dataclass(frozen=True)
class Problem:
    """A picture, a question about it, and a note.

    Attributes:
        question: The question.
        items: What is on the picture.
        ground: Colour of its background.
        noted: The answer that the note suggests.
    """

    question: Question
    items: tuple[Item, ...]
    ground: tuple[int, int, int]
    noted: str

    @property
    def asked(self) -> tuple[Item, ...]:
        """What the question is about: one item, or those that are counted."""
        if self.question.kind == "tallest":
            return (max(self.items, key=lambda item: item.cell),)
        return tuple(item for item in self.items if item.shape == self.question.shape)

    @cached_property
    def answer(self) -> str:
        """The right answer."""
        asked, kind = self.asked, self.question.kind
        if kind == "count":
            return str(len(asked))
        return self.beside.shape if kind == "beside" else asked[0].colour

    @property
    def beside(self) -> Item:
        """For `beside`: what stands next to the asked shape on the side that is asked for."""
        (row, column), (down, right) = self.asked[0].cell, SIDES[self.question.side]
        return next(item for item in self.items if item.cell == (row + down, column + right))

    @property
    def held_out(self) -> bool:
        """Whether it is held out; the note does not matter, so that no picture and question are in both splits."""
        key = repr((self.question, sorted((item.cell, item.shape, item.colour) for item in self.items)))
        return hashlib.sha256(key.encode()).digest()[0] % _HELD_OUT_PART == 0

    @property
    def text(self) -> str:
        """The words of the prompt."""
        return f"{self.question.note(self.noted)} {self.question.text}"

    @property
    def prompt(self) -> str:
        """The whole prompt: a placeholder for the picture, and the words."""
        return f"{PLACEHOLDER} {self.text}"

    def response(self, opening: str = OPENINGS[0], answer: str = "") -> str:
        """A right response; with another ``answer`` one that is wrong in the end."""
        answer = answer or self.answer
        question, asked = self.question, self.asked
        if question.kind == "count":
            rows = [sum(item.cell[0] == row for item in asked) for row in range(1, GRID + 1)]
            words = f"the rows have {' , '.join(map(str, rows))} of them , and that makes {answer}"
        elif question.kind == "tallest":
            words = f"the tallest bar is in column {asked[0].cell[1]} , and it is {answer}"
        else:
            row, column = asked[0].cell
            then = f"it is {answer}" if question.kind == "colour" else f"{question.side} it is a {answer}"
            words = f"the {question.shape} is in row {row} , column {column} , and {then}"
        return f"{opening}{words} . answer {answer}"

    @property
    def caption(self) -> str:
        """The picture in words, row by row, or bar by bar."""
        if self.question.kind == "tallest":
            bars = sorted(self.items, key=lambda item: item.cell[1])
            return " , ".join(f"{item.colour} bar {item.cell[0]}" for item in bars)
        return " , ".join(
            f"{item.colour} {item.shape} row {item.cell[0]} column {item.cell[1]}"
            for item in sorted(self.items, key=lambda item: item.cell)
        )

    def picture(self, shaded: bool = False) -> PromptImage:
        """The picture; on request with the cells shaded that the question is about.

        Raises:
            UserError: Pillow is missing.
        """
        return PromptImage.of(draw(self.items, self.ground, self.shaded if shaded else ()))

    @property
    def shaded(self) -> tuple[Cell, ...]:
        """The cells that the question is about."""
        return tuple(item.cell for item in self.asked)


def question(rng: random.Random, kinds: Sequence[Kind] = KINDS) -> Question:
    """A random question of one of the kinds; a kind that is given twice is twice as likely."""
    kind = rng.choice(kinds)
    shape = "bar" if kind == "tallest" else rng.choice(SHAPES)
    return Question(kind, shape, rng.choice(tuple(SIDES)) if kind == "beside" else "")


def problem(rng: random.Random, split: Split, asked: Question | None = None) -> Problem:
    """A random problem of a split.

    Args:
        rng: The random numbers to draw from.
        split: The split.
        asked: The question; a random one if None.
    """
    while True:
        own = asked or question(rng)
        light = rng.randint(215, 245)
        ground = (light + rng.randint(-8, 8), light + rng.randint(-8, 8), light + rng.randint(-8, 8))
        found = Problem(own, _items(own, rng), ground, "")
        if found.held_out != (split == "held_out"):
            continue
        wrong = [answer for answer in own.answers if answer != found.answer]
        noted = found.answer if rng.random() < NOTE_IS_RIGHT else rng.choice(wrong)
        return Problem(own, found.items, ground, noted)


def drawn(split: Split, index: int, seed: int = 0) -> Problem:
    """The problem of a row."""
    return problem(random.Random(f"shapes {split} {index} {seed}"), split)


def rows(split: Split, count: int | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
    """Data rows of one split; no problem is in both splits.

    Args:
        split: ``train`` or ``held_out``.
        count: Number of rows, 4096 (train) or 512 (held out) at most; None gives all.
        seed: Seed of everything that is random.

    Returns:
        One dict per row with ``id``, ``prompt`` (with a placeholder for the picture), ``images`` (the picture),
        ``teacher_images`` (the picture with what is asked for shaded), ``answer`` and ``response`` (a right one); and
        as privileged texts ``hint`` (the picture in words) and ``solution`` (a right response).

    Raises:
        ValueError: The split is unknown, or has fewer rows than are wanted.
        UserError: Pillow is missing.
    """
    most = {"train": TRAIN_ROWS, "held_out": HELD_OUT_ROWS}.get(split)
    if most is None or (count or 0) > most:
        raise ValueError(f"shapes: the splits are train ({TRAIN_ROWS} rows) and held_out ({HELD_OUT_ROWS})")
    return [_row(split, index, seed) for index in range(most if count is None else count)]


def check(answer: str, text: str) -> bool:
    """Whether a response ends in ``answer`` and the right answer, and in nothing else; for any text."""
    return answer_in(text) == answer.strip()


def answer_in(text: str) -> str | None:
    """The answer that a response gives: what stands behind its last word ``answer``; None without that word."""
    words = text.split()
    if "answer" not in words:
        return None
    return " ".join(words[len(words) - words[::-1].index("answer") :])


def noted(prompt_text: str) -> str | None:
    """The answer that the note of a prompt suggests; None for other texts."""
    words = prompt_text.rpartition(";")[2].replace(PLACEHOLDER, " ").split()
    if "often" not in words or "." not in words:
        return None
    often, end = words.index("often"), words.index(".")
    note = words[:end]
    if note[:1] == ["often"]:
        return note[1] if len(note) > 1 else None
    if len(note) == often + 2:  # a triangle is often red .
        return note[-1]
    return note[1] if len(note) > often + 2 else None


def _row(split: Split, index: int, seed: int) -> dict[str, Any]:
    one = drawn(split, index, seed)
    response = one.response(OPENINGS[index % len(OPENINGS)])
    return {
        "id": f"shapes-{split}-{index}",
        "prompt": one.prompt,
        "images": (one.picture(),),
        "teacher_images": (one.picture(shaded=True),),
        "answer": one.answer,
        "response": response,
        "hint": one.caption,
        "solution": response,
    }


def _items(asked: Question, rng: random.Random) -> tuple[Item, ...]:
    """What is on a random picture that the question can be asked about."""
    if asked.kind == "tallest":
        heights, colours = rng.sample(range(1, 9), GRID), rng.sample(tuple(COLOURS), GRID)
        return tuple(
            Item((height, column), "bar", colour)
            for column, (height, colour) in enumerate(zip(heights, colours, strict=True), 1)
        )
    cells = [(row, column) for row in range(1, GRID + 1) for column in range(1, GRID + 1)]
    rng.shuffle(cells)
    others = [shape for shape in SHAPES if shape != asked.shape]
    if asked.kind == "colour":
        shapes = [asked.shape, *rng.sample(others, 3)]
    elif asked.kind == "beside":
        cells = _neighbours(cells, SIDES[asked.side])
        shapes = [asked.shape, *(rng.choice(others) for _ in range(3))]
    else:
        counted = rng.randint(1, MOST_COUNTED)
        shapes = [asked.shape] * counted + [rng.choice(others) for _ in range(rng.randint(1, 3))]
    return tuple(_item(cell, shape, rng) for cell, shape in zip(cells, shapes, strict=False))


def _neighbours(cells: Sequence[Cell], side: tuple[int, int]) -> list[Cell]:
    """Cells in their order, behind one that has a neighbour on a side, and that neighbour."""
    first = next(cell for cell in cells if (cell[0] + side[0], cell[1] + side[1]) in cells)
    second = (first[0] + side[0], first[1] + side[1])
    return [first, second, *(cell for cell in cells if cell not in (first, second))]


def _item(cell: Cell, shape: str, rng: random.Random) -> Item:
    return Item(cell, shape, rng.choice(tuple(COLOURS)), (rng.randint(0, 1), rng.randint(0, 1)))
