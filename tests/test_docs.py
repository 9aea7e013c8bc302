"""The pages keep their word: snippets run and print what they show, links lead somewhere, numbers were computed.

Blocks fenced as `python` run, those of one page in order and in one session; blocks fenced as `py` are only shown. On
the line before a fence, `<!-- not run: reason -->` leaves a block out, and `<!-- file: path -->` says that the block is
that file of the repository: what lies below `retort/` can be imported by the page, and the tests in what lies below
`tests/` are run. The comment behind a `print` is the line that it prints. On the pages in docs/ every `print` has one;
elsewhere a comment that starts with a letter is prose.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import retort
from retort import registry
from retort.cli.catalogue import page, table

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
#: Their numbers are those of whole runs, which no snippet can print, or (methods.md, settings.md) of the code.
UNCOMPUTED = {
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("cluster-sim", "log", "methods", "real", "settings")),
    *(f"docs/lab/lab-{name}.md" for name in ("glyphs", "plane", "beyond")),
    *(
        f"docs/lab/{name}.md"
        for name in (
            "lab",
            "lab-itself",
            "lab-written",
            "lab-agents",
            "lab-judges",
            "lab-shapes",
            "lab-glyphs",
            "lab-plane",
            "lab-notes",
            "cliff",
        )
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of the page on which its fence opens, and the line before that."""

    language: str
    line: int
    before: str
    code: str = ""

    @property
    def file(self) -> str:
        """The file that the block is, or nothing."""
        found = re.fullmatch(r"<!-- file: (\S+) -->", self.before)
        return found[1] if found else ""

    @property
    def runs(self) -> bool:
        left_out = re.fullmatch(r"<!-- not run: .+ -->", self.before)
        hub = '"Qwen/' in self.code  # the first screen of the README names models that a test cannot fetch
        return self.language == "python" and not left_out and not hub


@dataclass(frozen=True)
class Page:
    """A page taken apart: its blocks, and the lines outside them with their numbers."""

    name: str
    blocks: tuple[Block, ...]
    prose: tuple[tuple[int, str], ...]

    @staticmethod
    def of(path: Path) -> Page:
        return Page.parsed(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))

    @staticmethod
    def parsed(name: str, text: str) -> Page:
        blocks: list[Block] = []
        prose: list[tuple[int, str]] = []
        opened, before = None, ""
        for number, line in enumerate(text.split("\n"), 1):
            if opened is None and line.lstrip().startswith("```"):
                assert line.startswith("```"), f"{name}:{number}: a fence that is not at the margin"
                opened = Block(line[3:].split(" ")[0].strip(), number, before.strip())
            elif opened is not None and line.rstrip() == "```":
                blocks.append(opened)
                opened = None
            elif opened is not None:
                opened = Block(opened.language, opened.line, opened.before, f"{opened.code}{line}\n")
            else:
                prose.append((number, line))
            before = line
        assert opened is None, f"{name}:{opened.line if opened else 0}: this fence is never closed"
        return Page(name, tuple(blocks), tuple(prose))


def shown(block: Block) -> dict[int, str | None]:
    """The comment behind each `print` of a block, by the line of the page on which the call begins."""
    tokens = tokenize.generate_tokens(StringIO(block.code).readline)
    comments = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    calls = [node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Call)]
    prints = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    return {block.line + node.lineno: comments.get(node.end_lineno or 0) for node in prints}


def wrong_prints(page: Page) -> Iterator[str]:
    """Runs a page; says which of its prints do not print what stands behind them."""
    printed: dict[int, list[str]] = {}

    def record(*values: object) -> None:
        printed.setdefault(sys._getframe(1).f_lineno, []).append(" ".join(map(str, values)))

    session: dict[str, Any] = {"__name__": "page", "print": record}
    for block in page.blocks:
        if not block.runs or block.file.startswith("retort/"):
            continue
        space = {**session} if block.file else session
        # Blank lines before the code, so that tracebacks and `record` speak of lines of the page.
        source = "\n" * block.line + block.code
        exec(compile(source, str(ROOT / page.name), "exec", dont_inherit=True), space)
        if block.file:
            tests = [value for name, value in space.items() if name.startswith("test_")]
            assert tests, f"{page.name}:{block.line}: no tests in {block.file}"
            for test in tests:
                test()
        for line, comment in shown(block).items():
            claims = page.name.startswith("docs/") or (comment and not comment[0].isalpha())
            if claims and printed.get(line) != [comment]:
                yield f"{page.name}:{line} shows {comment!r} and prints {printed.get(line)}"


def uncomputed_numbers(page: Page) -> Iterator[str]:
    """Numbers of three decimals or more in the prose that are in none of the page's snippets or what they print."""
    code = "".join(block.code for block in page.blocks if block.runs)
    for line, text in page.prose:
        for number in re.findall(r"(?<![\w.])\d+\.\d{3,}(?![\w.])", text):
            arxiv = re.fullmatch(r"\d{4}\.\d{5}", number)
            if not arxiv and number not in code:
                yield f"{page.name}:{line}: no snippet of the page gives {number}"


def dead_links(page: Page) -> Iterator[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    for line, text in page.prose:
        for found in re.finditer(r"""\]\(([^)\s]+)\)|(?:src|href)=["']([^"']+)""", text):
            target = found[1] or found[2]
            place, _, heading = target.partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            path = (ROOT / page.name).parent / place
            if not path.exists():
                yield f"{page.name}:{line}: {target} does not exist"
            elif heading and heading not in anchors(Page.of(path.resolve()) if place else page):
                yield f"{page.name}:{line}: {target} names no heading"


def unknown_tests(page: Page) -> Iterator[str]:
    """Names of tests in a page that no test has."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for line, text in page.prose:
        for name in re.findall(r"`(test_\w+)`", text):
            if f"def {name}(" not in code:
                yield f"{page.name}:{line}: there is no {name}"


#: Folders of the repository with which a path in a page begins.
FOLDERS = ("retort", "tests", "docs", "benchmarks", "examples")


def unknown_places(page: Page) -> Iterator[str]:
    """Paths in backquotes that are not there, and `name` (`path`) of what no such file has; files of the page count."""
    made = {block.file for block in page.blocks}
    for line, text in page.prose:
        for place in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*)`", text):
            if place not in made and not (ROOT / place).exists():
                yield f"{page.name}:{line}: {place} does not exist"
        for name, place in re.findall(r"`([\w.]+)` \(`([\w/]+\.py)`\)", text):
            if (ROOT / place).exists() and not defines(ROOT / place, name):
                yield f"{page.name}:{line}: {place} has no {name}"


def defines(path: Path, name: str) -> bool:
    """Whether a file defines a function or class, a value, or `Class.member`, at its outermost level."""
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = next((node for node in body if part in names_of(node)), None)
        if found is None:
            return False
        body = found.body if isinstance(found, ast.ClassDef) else []
    return True


def names_of(node: ast.stmt) -> list[str]:
    """What a statement names."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def anchors(page: Page) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = [text.lstrip("#").strip().lower() for _, text in page.prose if re.match(r"#+ ", text)]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts in place what pages say are files of the package, for one test; the current folder is a fresh one."""
    for block in (block for path in DOCS for block in Page.of(path).blocks if block.file.startswith("retort/")):
        target = tmp_path / block.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.code, encoding="utf-8")
        name = ".".join(target.relative_to(tmp_path).with_suffix("").parts)
        package = importlib.import_module(name.rpartition(".")[0])
        assert not (ROOT / block.file).exists(), f"{block.file} exists; the page needs another example"
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(target.parent)])
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_snippets_print_what_they_show(path: Path, files: Path) -> None:
    assert list(wrong_prints(Page.of(path))) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    page = Page.of(path)
    assert [*dead_links(page), *unknown_tests(page), *unknown_places(page)] == []


def _hooks() -> Any:
    spec = spec_from_file_location("hooks_of_the_site", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _site_page(name: str) -> Any:
    file = SimpleNamespace(src_uri=name, abs_src_path=str(ROOT / "docs" / name))
    return SimpleNamespace(file=file, meta={}, parent=None)


def test_links_out_of_the_docs_are_paths_on_the_site() -> None:
    found = _hooks().on_page_markdown(
        "In [retort/method.py](../../retort/method.py), [a test](../../tests/test_docs.py#top), [log](../log.md).",
        page=_site_page("lab/lab.md"),
    )
    assert found == "In `retort/method.py`, a test (`tests/test_docs.py`), [log](../log.md)."


def test_a_dead_link_out_of_the_docs_stops_the_site() -> None:
    with pytest.raises(ValueError, match="log.md: the link to ../REEDME.md leads to no file"):
        _hooks().on_page_markdown("See [there](../REEDME.md).", page=_site_page("log.md"))


@pytest.mark.parametrize("tag", ['<script src="https://a.org/x.js">', '<link rel="stylesheet" href=//a.org/x.css>'])
def test_a_page_that_loads_from_elsewhere_stops_the_site(tag: str) -> None:
    hooks, page = _hooks(), _site_page("log.md")
    with pytest.raises(ValueError, match="log.md would load (https:)?//a.org"):
        hooks.on_post_page(f"<html>{tag}", page=page)
    harmless = '<a href="https://a.org">there</a><script src="assets/x.js">'
    assert hooks.on_post_page(harmless, page=page) == harmless


def test_the_site_names_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = text.split("\nnav:\n")[1].split("\n\n")[0]
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in DOCS)


def test_the_map_of_the_rooms_has_every_room() -> None:
    layers = _layers_of_the_map()
    shown = {name for layer in layers for name in layer.split(" | ")}
    rooms = {
        path.stem for path in (ROOT / "retort").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == {room for room in rooms if not room.startswith("__")}


def test_the_map_of_the_rooms_has_the_layers_of_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract, *_ = settings["tool"]["importlinter"]["contracts"]
    assert contract["containers"] == ["retort"]
    layers = [re.sub(r"[()]", "", layer) for layer in contract["layers"]]
    assert _layers_of_the_map() == [layer for layer in layers if layer != "__main__"]


def _layers_of_the_map() -> list[str]:
    """Return the layers that CONTRIBUTING shows, from the top: `a > b` is two of them, `a | b` is one."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tree,) = (block.code for block in Page.parsed("CONTRIBUTING.md", text).blocks if block.code.startswith("cli "))
    return [layer for line in tree.splitlines() for layer in re.split(r"\s{2,}", line)[0].split(" > ")]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_numbers_in_the_prose_were_computed(path: Path) -> None:
    page = Page.of(path)
    assert page.name in UNCOMPUTED or list(uncomputed_numbers(page)) == []


def test_the_readme_names_methods_as_they_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = {row[0]: row for row in cells(table())}
    shown = [row for row in cells(text) if re.fullmatch(r"`\w+`", row[0])]
    assert len(shown) == 12, "the README says a dozen"
    assert [(name, paper, status) for name, paper, _, status in shown] == [
        (name, made[name][1], made[name][3]) for name, *_ in shown if name in made
    ]
    assert {int(number) for number in re.findall(r"(?:all|of the) (\d+)\b", text)} == {len(registry.names())}


def cells(text: str) -> list[list[str]]:
    """Return the rows of all tables of a text, as their cells."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_first_example_of_the_readme_passes_arguments_that_there_are() -> None:
    block = next(block for block in Page.of(ROOT / "README.md").blocks if block.language == "python")
    calls = [node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == "retort.distill")
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    inspect.signature(retort.distill).bind(*call.args, **given)
    assert given["method"] in registry.names()


def test_the_page_of_methods_is_what_the_command_writes() -> None:
    written = (ROOT / "docs" / "methods.md").read_text()
    assert written == page(), "write it again: retort methods --markdown > docs/methods.md"
    for name in registry.names():
        own = written.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"Status: **{registry.load(name).status}**" in own
        for setting in registry.defaults(name):
            assert f"| `{setting}` |" in own, f"{name}: {setting} is missing under Args"
        assert ":math:" not in own
        assert ".. math::" not in own


def test_methods_of_the_pages_pass_the_contract(files: Path, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    path = ROOT / "tests" / "methods" / "test_contract.py"
    spec = spec_from_file_location("contract_of_the_pages", path)
    assert spec is not None
    assert spec.loader is not None
    contract = module_from_spec(spec)
    spec.loader.exec_module(contract)
    # What docs/views.md says it takes: the example learns from rewards, and its teacher moves.
    contract.NOT_ZERO["hinted"] = "rewards are learnt from, whatever the teacher says"
    contract.STATEFUL["hinted"] = {}
    contract.WHOLE_BATCH["hinted"] = "rewards are whitened over a group, which a half may cut"
    found = [file.stem for file in (files / "retort" / "methods").glob("*.py")]
    assert found, "no page shows a method"
    for name in found:
        more: dict[str, Any] = {"chunk": [5], "place": range(len(registry.load(name).limits)), "given": [{}]}
        more |= {"tiny_run": [tiny_run], "tmp_path": [tmp_path / name]}
        (tmp_path / name).mkdir()
        for test in (value for key, value in vars(contract).items() if key.startswith("test_")):
            wanted = list(inspect.signature(test).parameters)
            if wanted[:1] == ["name"]:
                for cases in itertools.product(*(more[parameter] for parameter in wanted[1:])):
                    try:
                        test(name, *cases)
                    except pytest.skip.Exception:
                        continue


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1 + 1)  # 3\n```", "docs/x.md:2 shows '3' and prints ['2']"),
        ("```python\nfor n in (1, 2):\n    print(n)  # 1\n```", "docs/x.md:3 shows '1' and prints ['1', '2']"),
        ("```python\nif False:\n    print(1)  # 1\n```", "docs/x.md:3 shows '1' and prints None"),
        ("```python\nprint(2)\n```", "docs/x.md:2 shows None and prints ['2']"),
        ("```python\nx = 2\n```\n\n```python\nprint(\n    x,\n)  # 1\n```", "docs/x.md:6 shows '1' and prints ['2']"),
        ("It is 0.125 nats.\n```python\n# 0.126\n```", "docs/x.md:1: no snippet of the page gives 0.125"),
        ("See [there](../REEDME.md).", "docs/x.md:1: ../REEDME.md does not exist"),
        ("See [there](log.md#lug).", "docs/x.md:1: log.md#lug names no heading"),
        ("Held by `test_of_nothing`.", "docs/x.md:1: there is no test_of_nothing"),
        ("In `retort/train/nothing.py`.", "docs/x.md:1: retort/train/nothing.py does not exist"),
        ("By `Steps.nothing` (`retort/core/steps.py`).", "docs/x.md:1: retort/core/steps.py has no Steps.nothing"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(text: str, complaint: str) -> None:
    page = Page.parsed("docs/x.md", text)
    found = [*wrong_prints(page), *uncomputed_numbers(page), *dead_links(page), *unknown_tests(page)]
    assert [*found, *unknown_places(page)] == [complaint]


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1 + 1)  # 2\n```",
        "```py\nprint(1 + 1)  # 3\n```",
        "<!-- not run: needs a hub -->\n```python\nprint(1 + 1)  # 3\n```",
        "It is 0.125 nats (arXiv 2603.07079).\n```python\nprint(1 / 8)  # 0.125\n```",
        "By `Steps.select` (`retort/core/steps.py`), `quantile` (`retort/core/steps.py`), in `retort/envs/`.",
        "See [there](../README.md), [here](#part-2-k3-ends) and [out](https://example.org/x).\n## Part 2: `k3` ends",
    ],
)
def test_a_page_that_is_right_is_left_alone(text: str) -> None:
    page = Page.parsed("docs/x.md", text)
    found = [*wrong_prints(page), *uncomputed_numbers(page), *dead_links(page), *unknown_tests(page)]
    assert [*found, *unknown_places(page)] == []
