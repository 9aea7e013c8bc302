"""Hooks of MkDocs: formulas become MathML, and a link out of docs/ becomes the path that it leads to."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
#: A link with a relative address; its text may hold a picture's brackets but no others.
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```python$", re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links to other files of the repository into paths, because the site holds only the pages.

    A page with hardly a heading gets no table of contents. The name of a file stands above the block that shows it.

    Raises:
        PluginError: A link leads to no file of the repository.
    """
    source = Path(page.file.abs_src_path)
    if len(re.findall(r"^##+ ", markdown, re.MULTILINE)) < 2:
        page.meta.setdefault("hide", ["toc"])  # the room goes to tables

    def shown(link: re.Match[str]) -> str:
        text, target = link[1], (source.parent / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]  # MkDocs checks these itself
        if not target.is_relative_to(ROOT) or not target.exists():
            raise PluginError(f"{page.file.src_uri}: the link to {link[2]} leads to no file of the repository")
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if text.strip("`") in (path, target.name) else f"{text} (`{path}`)"

    return _FILE.sub(r'```python title="\1"', _LINK.sub(shown, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw by themselves."""

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return convert(html.unescape(formula[2]), display=display)

    return _MATH.sub(drawn, content)
