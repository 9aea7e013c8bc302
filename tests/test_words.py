"""The words of the code: names, settings, labels and headings say what the field says, and no private dialect.

Prose is not tested: docstrings, comments and paragraphs may use any word that reads well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from retort.config.run_config import keys
from retort.evaluate.measures import MEASURES
from retort.report import curves, page, rollouts

ROOT = Path(__file__).parents[1]
#: House word -> what to say instead.
SAY = {
    "acted": "decided, or action mask",
    "chance": "uniform (a random number), or random",
    "dial": "schedule",
    "dials": "schedules",
    "judge": "evaluate a model, grade or verify a completion",
    "judged": "evaluated, graded",
    "judges": "evaluates, grades",
    "judging": "evaluation, grading",
    "place": "position in a sequence, index, or path of a file",
    "places": "positions, indices, or paths",
    "reading": "controller output, or template options",
    "readings": "controller outputs",
    "said": "score, signal, note",
    "scene": "group",
    "says": "gives, scores",
    "shares": "loss scales, fractions",
    "shelf": "rollout cache, replay buffer",
    "tells": "predicts, describes",
    "told": "note, option, argument",
    "whom": "name the thing",
    "write": "generate (a model); files are written",
    "writer": "generator (a model)",
    "writers": "generators (models)",
    "writes": "generates (a model)",
    "written": "generated (by a model)",
}
#: Plain verbs, which a heading may use, and the field's noun for a model that grades (LLM as a judge).
PLAIN = {"said", "says", "tells", "told", "write", "writes", "written", "judge", "judges"}
_FILE = "writes a file"
_ASKED = "a model that grades is the field's LLM as a judge; the section of settings is named so, and its file"
_IN_PLACE = "tensors are exchanged in place, as PyTorch says it"
#: Names that keep such a word, with the reason.
KEPT = {
    "retort.api:write_report": _FILE,
    "retort.config.judge": _ASKED,
    "retort.config.judge:JudgeSection": _ASKED,
    "retort.config.run_config:Config.judge": _ASKED,
    "retort.train.models.judge": _ASKED,
    "retort.files:write_bytes": _FILE,
    "retort.files:write_text": _FILE,
    "retort.train.output.export:write_model": _FILE,
    "retort.console.terminal:Lasting.write": "the method of every text stream",
    "retort.models.working:WorkingCopy.in_place": _IN_PLACE,
    "retort.teachers.itself:OwnWeights.in_place": _IN_PLACE,
    "retort.cli.trust:measure.places": "the option --places of `retort trust`, which users have",
    "retort.evaluate.trust:Protocol.places": "a key of trust.json, which users have",
}


def words(name: str) -> list[str]:
    """The lower-case words of an identifier in snake or camel case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def house_words(text: str) -> list[str]:
    """House words of a label or a heading."""
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in SAY and word not in PLAIN]


def public_names(source: str) -> Iterator[str]:
    """Public functions, classes, their fields and methods, and the parameters of these functions, by dotted name."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                yield from (f"{prefix}{node.name}.{one.arg}" for one in every if not one.arg.startswith("_"))
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from inside(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                yield from (f"{prefix}{name}" for name in names if not name.startswith("_"))

    yield from inside(ast.parse(source).body, "")


def all_names() -> Iterator[str]:
    """Every module of Retort, and `module:name` of every public name in it."""
    for file in sorted((ROOT / "retort").rglob("*.py")):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        yield module
        yield from (f"{module}:{name}" for name in public_names(file.read_text(encoding="utf-8")))


def own_words(name: str) -> list[str]:
    """House words in the last part of a dotted name, which is the part that it defines."""
    return [word for word in words(re.split(r"[.:]", name)[-1]) if word in SAY]


def advice(name: str, found: list[str]) -> str:
    return f"{name}: say " + "; ".join(f"'{SAY[word]}' for '{word}'" for word in found)


def labels() -> Iterator[str]:
    """All labels of metrics that the report, the console and the model card show."""
    for plot in curves.PLOTS:
        yield from (plot.title, plot.unit, *plot.keys.values())
    for _, title, unit in curves.POSITIONS:
        yield from (title, unit)
    yield from (one.words for one in MEASURES.values())
    for one in rollouts.KNOWN.values():
        yield from (one.label, one.about)


def headings() -> Iterator[str]:
    """Headings of the report and of all pages of documentation, but the log's, whose entries are history."""
    for file in sorted((ROOT / "retort" / "report").glob("*.py")):
        yield from re.findall(r"<h[1-6][^>]*>([^<{]+)</h", file.read_text(encoding="utf-8"))
    yield from page.LINKS.values()
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if file.name != "log.md":
            text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
            yield from re.findall(r"^#+ +(.*)", text, flags=re.M)


def test_names_are_words_of_the_field() -> None:
    bad = {name: found for name in all_names() if (found := own_words(name))}
    new = [advice(name, found) for name, found in bad.items() if name not in KEPT]
    assert not new, "\n".join(new)
    assert not set(KEPT) - set(bad), "these names are gone: take them out of the list"


def test_settings_are_words_of_the_field() -> None:
    assert not [advice(key, found) for key in keys() if (found := own_words(key))]


def test_labels_and_headings_are_words_of_the_field() -> None:
    shown = [*labels(), *headings()]
    assert "Reverse KL" in shown
    assert "Before and after" in shown
    assert not [advice(text, found) for text in shown if (found := house_words(text))]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def shelf(): ...", "shelf"),
        ("def keep(dial): ...", "keep.dial"),
        ("class Shelf: ...", "Shelf"),
        ("class Cache:\n    place: int", "Cache.place"),
        ("class Cache:\n    def __init__(self, place): ...", "Cache.__init__.place"),
        ("WRITTEN = 1", "WRITTEN"),
        ("class OpenShelf:\n    def judge_all(self): ...", "OpenShelf.judge_all"),
    ],
)
def test_a_house_word_is_found(source: str, name: str) -> None:
    assert name in [one for one in public_names(source) if own_words(one)]


def test_private_names_and_longer_words_pass() -> None:
    assert not [one for one in public_names("def _shelf(dial): ...\ndef replace(dialog): ...") if own_words(one)]
