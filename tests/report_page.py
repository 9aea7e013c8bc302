"""Reading a report the strict way."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "wbr", "line", "circle", "path", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what the tests ask about."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.raw = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.raw)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def plots(self) -> dict[str, Any]:
        """Each plot's data, by its title."""
        svgs = [svg for svg in self.all("svg") if "data-plot" in svg]
        return {str(svg["data-title"]): json.loads(str(svg["data-plot"])) for svg in svgs}

    def rollouts(self) -> dict[str, Any]:
        """The data of the token view."""
        found = re.search(r'<script type="application/json" id="rollout-data">(.*?)</script>', self.raw, re.DOTALL)
        assert found is not None
        return json.loads(found[1])


class Fragment(Page):
    """A piece of a page."""

    def __init__(self, text: str) -> None:
        HTMLParser.__init__(self, convert_charrefs=True)
        self.raw, self.open, self.tags, self.text = text, [], [], ""
        self.feed(text)
