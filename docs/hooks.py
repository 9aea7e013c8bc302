"""Hooks of MkDocs: formulas become MathML, links out of docs/ become paths, and nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: A link to a file; its text holds no brackets, and it is no picture.
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```python$", re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
_INTERVAL = re.compile(r" ± [\d.]+|\[[−+-]?[\d.]+, [−+-]?[\d.]+\]")
_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links to other files of the repository into paths, because the site holds only the pages.

    A page with hardly a heading gets no table of contents, and one that stands alone in the navigation gets no list of
    its neighbours: the room goes to tables and code. The name of a file stands above the block that shows it.

    Raises:
        ValueError: A link leads to no file of the repository.
    """
    few = len(re.findall(r"^##+ ", markdown, re.MULTILINE)) < 2
    page.meta["hide"] = [*(["toc"] if few else []), *(["navigation"] if page.parent is None else [])]
    source = Path(page.file.abs_src_path)

    def shown(link: re.Match[str]) -> str:
        text, target = link[1], (source.parent / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]  # MkDocs checks these itself
        if not target.is_relative_to(ROOT) or not target.exists():
            raise ValueError(f"{page.file.src_uri}: the link to {link[2]} leads to no file of the repository")
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if text.strip("`") in (path, target.name) else f"{text} (`{path}`)"

    return _FILE.sub(r'```python title="\1"', _LINK.sub(shown, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw by themselves, and keeps each interval on one line."""
    from latex2mathml.converter import convert

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return convert(html.unescape(formula[2]), display=display)

    content = _INTERVAL.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), content)
    return _MATH.sub(drawn, content)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuses a page that would load something from elsewhere.

    Raises:
        ValueError: It names what would be loaded.
    """
    if found := _LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} would load {found[1]}: put it into docs/assets/")
    return output


def on_post_build(*, config: Any, **_: Any) -> None:
    """Writes the index of the search as a script, too, because pages opened as files can read no JSON."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")
