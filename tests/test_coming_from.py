"""The page for people who come from other trainers names settings that exist, and its configurations are accepted."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from retort import config, registry
from retort.config.synonyms import ours_for
from retort.data import COLUMNS
from retort.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"


def known() -> set[str]:
    """Every key of the configuration, its sections' with the section's name."""
    keys: set[str] = set()
    for name, field in config.Config.model_fields.items():
        section = field.annotation
        inside = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        keys |= {f"{name}.{key}" for key in inside} or {name}
    return keys | {f"columns.{name}" for name in COLUMNS}


def ours(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of every cell in a column that is headed `Retort`."""
    place = None
    for number, line in enumerate(text.split("\n"), 1):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "Retort" in cells:
            place = cells.index("Retort")
        elif not cells:
            place = None
        elif place is not None and not set(cells[place]) <= set("-"):
            yield number, cells[place]


def unknown(text: str) -> Iterator[str]:
    """Names in those cells that are no setting, no method, and no setting of the method named before them."""
    settings, methods = known(), registry.names()
    for number, cell in ours(text):
        chosen = methods
        for span in re.findall(r"`([^`]+)`", cell):
            name, _, value = span.partition("=")
            if name in methods:
                chosen = [name]
                continue
            if name.startswith("method."):
                key = name.removeprefix("method.")
                having = [method for method in chosen if key in registry.defaults(method)]
                fine = bool(having)
                if value and len(chosen) == 1 and fine:
                    try:
                        registry.load(chosen[0], **{key: config.value(value)})
                    except UserError:
                        fine = False
            else:
                fine = name in settings
            if not fine:
                yield f"{number}: {span}"


def translated(text: str) -> list[str]:
    """The configurations of ours on the page."""
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, flags=re.M | re.S)
    return [block for block in blocks if not block.startswith("# prime-rl")]


def test_every_setting_of_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(list(ours(text))) > 80
    assert list(unknown(text)) == []


@pytest.mark.parametrize(
    "block", translated(PAGE.read_text(encoding="utf-8")), ids=["trl", "verl", "prime-rl", "axolotl"]
)
def test_the_configurations_of_the_page_are_accepted(block: str) -> None:
    given = tomllib.loads(block)
    made = config.resolve(given).model_dump()
    for key, value in given.items():
        inside = value if isinstance(value, dict) else {}
        assert inside.items() <= made[key].items() if inside else made[key] == value


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("`optimizer.learning_rate`, `lora.rank`", []),
        ("`gkd` with `method.divergence=forward_kl`", []),
        ("`learning_rate`", ["3: learning_rate"]),
        ("`optimizer`", ["3: optimizer"]),
        ("`opd` with `method.divergence`", ["3: method.divergence"]),
        ("`gkd` with `method.divergence=hellinger`", ["3: method.divergence=hellinger"]),
        ("`columns.question`", ["3: columns.question"]),
        ("`gdk`", ["3: gdk"]),
    ],
)
def test_a_setting_that_is_none_is_noticed(cell: str, wrong: list[str]) -> None:
    assert list(unknown(f"| TRL | Retort | what differs |\n|---|---|---|\n| `beta` | {cell} | |\n")) == wrong


def theirs(text: str) -> Iterator[tuple[str, str]]:
    """Every full name of another trainer's setting in a first column, with the cell of ours beside it."""
    for line in text.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) < 3 or "Retort" in cells or set(cells[1]) <= set("-"):
            continue
        above = ""
        for span in re.findall(r"`([^`]+)`", cells[0]):
            name = re.split(r"[=: ]", span)[0]
            if name.startswith("."):
                name = f"{above}{name}"
            above = name.rpartition(".")[0]
            if re.fullmatch(r"[a-z_0-9.*]+", name):
                yield name, cells[1]


def test_a_setting_of_theirs_that_is_typed_is_told_what_the_page_tells() -> None:
    names = [*config.keys(), *(f"method.{own}" for made in registry.names() for own in registry.defaults(made))]
    told = dict.fromkeys(theirs(PAGE.read_text(encoding="utf-8")))
    assert len(told) > 120
    besides = ("optimizer", "type", "adapter")  # a section of ours; said of its section; one of its values only
    for name, cell in told:
        if name in names or name in besides:
            continue
        answer = ours_for(name, names)
        assert answer is not None, name
        of_page = [span.partition("=")[0] for span in re.findall(r"`([^`]+)`", cell)]
        if not of_page:
            assert not answer.settings, (name, str(answer))
        elif all(one in registry.names() or one.startswith("method.") for one in of_page):
            assert answer.settings[0].partition(".")[0] == "method", (name, str(answer))
        else:
            assert any(one in str(answer) for one in of_page), (name, str(answer))
