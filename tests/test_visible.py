"""What others wrote (ids, columns, paths, names) is shown, and obeyed by neither a terminal nor a page."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from retort.console.terminal import RichObserver, examination_table
from retort.errors import quoted, shortened, visible
from retort.train.output.card import code, plain_text

OBEYED = {
    "escape": ("\x1b[31m", r"\x1b[31m"),
    "title": ("\x1b]0;t\x07", r"\x1b]0;t\x07"),
    "return": ("\r", r"\r"),
    "newline": ("\n", r"\n"),
    "nul": ("\0", r"\x00"),
    "delete": ("\x7f", r"\x7f"),
    "csi": ("\x9b2J", r"\x9b2J"),
    "next_line": ("\x85", r"\x85"),
    "override": ("\u202e", r"\u202e"),
    "isolate": ("\u2066", r"\u2066"),
    "mark": ("\u200f", r"\u200f"),
    "line": ("\u2028", r"\u2028"),
    "bom": ("\ufeff", r"\ufeff"),
    "tag": ("\U000e0041", r"\U000e0041"),
    "surrogate": ("\udcff", r"\udcff"),
}


@pytest.mark.parametrize(("text", "written"), list(OBEYED.values()), ids=list(OBEYED))
def test_what_is_obeyed_is_written_as_its_escape(text: str, written: str) -> None:
    assert visible(f"a{text}b") == f"a{written}b"


@pytest.mark.parametrize("text", ["plain", "größer ± 3", "数独", "क्\u200dष", "👩\u200d🔬", "\\x1b", "[red]x[/]"])
def test_what_is_read_stays(text: str) -> None:
    assert visible(text) == text


def _note(observer: RichObserver, text: str) -> None:
    observer.note(text)


def _summary(observer: RichObserver, text: str) -> None:
    observer.summary({text: text}, [text])


def _phase(observer: RichObserver, text: str) -> None:
    observer.phase(text, 0, 2)
    observer.phase(text, 2, 2)


def _table(observer: RichObserver, text: str) -> None:
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    row = {"who": text, f"reward/{text}": cell}
    observer.table({"k": 1, "problems": 2, "rows": [row], "gap_recovered": {text: 0.5}})


def _examination(observer: RichObserver, text: str) -> None:
    check = {"verdict": "warn", "name": text, "saw": text, "why": text, "remedy": text}
    observer.console.print(examination_table({"checks": [check], "verdict": "warn"}))


@pytest.mark.parametrize("way", [_note, _summary, _phase, _table, _examination])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("text", "written"), list(OBEYED.values()), ids=list(OBEYED))
def test_nothing_obeyed_reaches_the_terminal(
    way: Callable[[RichObserver, str], None], terminal: bool, text: str, written: str
) -> None:
    file = io.StringIO()
    way(RichObserver(Console(file=file, force_terminal=terminal, width=400, color_system=None)), f"<{text}>")
    said = file.getvalue()
    assert f"<{text}>" not in said
    if terminal or way is not _phase:  # no bar is drawn in a file or a pipe
        assert f"<{written}>" in said


@pytest.mark.parametrize("text", ["[red]a[/red]", "[/]", "[link=http://x]y[/link]", ":warning:", "\\[bold]"])
@pytest.mark.parametrize("way", [_note, _summary, _phase, _table, _examination])
def test_markup_is_text(way: Callable[[RichObserver, str], None], text: str) -> None:
    file = io.StringIO()
    way(RichObserver(Console(file=file, force_terminal=True, width=400, color_system=None)), text)
    assert text in file.getvalue()


def test_words_and_code_of_a_card() -> None:
    assert plain_text("a|<b>`*[x](y)\n") == r"a\|\<b\>\`\*\[x\](y)\\n"
    assert code("a") == "`a`"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`\x1b") == r"`` `\x1b ``"


def test_long_values_are_cut() -> None:
    assert len(quoted("x" * 10_000)) < 200
    assert quoted(1 << 100_000) == "a very large int"
    assert shortened("abc", 3) == "abc"
