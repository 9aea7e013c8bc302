"""The page of all methods, from their docstrings: `retort methods --markdown`."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

import retort.methods
from retort import registry
from retort.method import Method, groups_of

_HEAD = """# Methods

<!-- Written by `retort methods --markdown`; edit the docstrings. -->

*Faithful* means that the method has the paper's equation and defaults, lists each departure, and its numbers are
tested. *Partial* means that the named parts are reconstructed, because no source states them; *reconstructed*, that the
core is, too. [Choose a method](choose-a-method.md) says which to try first, the [lab](lab/lab.md) what each did on the
built-in task.
"""


def page() -> str:
    """Markdown: a table of contents, then every method with its formula, settings, needs and departures."""
    made = [registry.load(name) for name in registry.names()]
    examples = _markdown((inspect.getdoc(retort.methods) or "").partition("\n\n")[2])
    return "\n\n".join([_HEAD.rstrip(), examples, table(links=True), *(_entry(method) for method in made)]) + "\n"


def listed(*, as_json: bool) -> str:
    """Name, summary, paper, settings and needs of every method, as text or as JSON."""
    rows: list[dict[str, Any]] = []
    for name in registry.names():
        made = registry.load(name)
        rows.append(
            {
                "name": name,
                "summary": made.summary,
                "status": made.status,
                "settings": made.settings,
                "needs": _needs(made),
                "paper": made.paper.title if made.paper else None,
                "arxiv": made.paper.arxiv if made.paper else None,
            }
        )
    if as_json:
        return json.dumps(rows, indent=2)
    lines: list[str] = []
    for row in rows:
        where = f"arXiv {row['arxiv']}" if row["arxiv"] else "no arXiv id"
        asked = [f"of {view}: {', '.join(of_it)}" for view, of_it in row["needs"].items()]
        only = ", ".join(next(iter(row["needs"].values())))
        lines += [
            f"{row['name']}  ({row['status']}; {where})\n    {row['summary']}",
            f"    paper:    {row['paper']}",
            f"    settings: {', '.join(f'{key}={value}' for key, value in row['settings'].items())}",
            f"    needs:    {only if len(asked) == 1 else '; '.join(asked)}\n",
        ]
    return "\n".join(lines)


def table(*, links: bool = False) -> str:
    """One row per method: name, paper, what it does, status."""
    rows = ["| name | paper | what it does | status |", "|---|---|---|---|"]
    for name in registry.names():
        method = registry.load(name)
        shown = f"[`{name}`](#{name})" if links else f"`{name}`"
        rows.append(f"| {shown} | {_paper(method)} | {method.summary.rstrip('.')} | {method.status} |")
    return "\n".join(rows)


def _paper(method: Method) -> str:
    paper = method.paper
    if paper is None:
        return "none"
    if paper.arxiv:
        return f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    return f"[{paper.title}]({paper.url})" if paper.url else paper.title


def _needs(method: Method) -> dict[str, list[str]]:
    """What a method asks of the teacher behind each view, and of a judge."""
    found = {view: [str(need) for need in sorted(method.needs(view))] for view in method.views}
    return found if method.grading is None else {**found, "judge": ["rubrics", "verdicts"]}


def _entry(method: Method) -> str:
    text = inspect.getdoc(registry.builder(method.name)) or ""
    before, found, after = text.partition("\nArgs:\n")
    _, _, rest = after.partition("\n\n")
    paper = method.paper
    where = f"{paper.title} ({paper.year})" if paper else "no paper"
    needs = [f"from `{view}`: {', '.join(words) or 'nothing'}" for view, words in _needs(method).items()]
    parts = [f"## {method.name}", f"{where}; {_paper(method)}. Status: **{method.status}**. Needs {'; '.join(needs)}."]
    parts += [_markdown(before.strip()), *([_settings(method)] if found else []), _markdown(rest.strip())]
    return "\n\n".join(part for part in parts if part)


def _markdown(text: str) -> str:
    """Formulas and examples as Markdown writes them."""
    text = re.sub(r"^ *\.\. math::((?:.|\n(?!\n|\S))*)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r"\n+( *>>> (?:.|\n(?!\n))*)", _example, text)
    return re.sub(r":math:`([^`]+)`", r"$\1$", text)


def _formula(found: re.Match[str]) -> str:
    body = textwrap.dedent(found[1]).strip()
    inside = "\n".join(line.strip() for line in body.splitlines())
    aligned = f"\\begin{{aligned}}\n{inside}\n\\end{{aligned}}" if "&" in inside else inside
    return f"```math\n{aligned}\n```"


def _example(found: re.Match[str]) -> str:
    return f"\n\n```pycon\n{textwrap.dedent(found[1])}\n```"


def _settings(method: Method) -> str:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, text in registry.described(method.name).items():
        words = _markdown(text).replace("|", "\\|")
        rows.append(f"| `{name}` | {_default(method.settings[name])} | {words} |")
    return "\n".join([*rows, *_groups(method.name)])


def _groups(name: str) -> list[str]:
    """How the settings of a method can be given in groups."""
    groups = groups_of(registry.builder(name))
    if not groups.defaults:
        return []
    shown = ", ".join(
        f"`{group}={type(default).__name__}({', '.join(groups.settings(group).values())})`"
        for group, default in groups.defaults.items()
    )
    table = f"`[method.{next(iter(groups.defaults))}]`"
    words = f"Groups of settings are dataclasses of `retort.methods.{name}`, or tables in TOML such as {table}"
    return ["", f"{words}. Their fields, in the order of the settings: {shown}."]


def _default(value: object) -> str:
    return "null" if value is None else f"`{value}`"
