"""The report: one HTML file that loads nothing, in which all text of models and data is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from retort.errors import RunError, UserError
from retort.files import reason, write_text
from retort.report.alike import remarks
from retort.report.curves import COLORS, curves_section
from retort.report.denoising import steps_section
from retort.report.flow_words import apart, flow_facts
from retort.report.groups import Group, all_runs, grouped, leaves, method_name
from retort.report.images import with_images
from retort.report.plots import KEY
from retort.report.profiles import profiles_section
from retort.report.read import FILES, RunFiles, as_object, find_runs, read_runs
from retort.report.result import headlines, result_section
from retort.report.reward_matrix import matrix_section
from retort.report.rollouts import rollouts_section
from retort.report.sample_grids import samples_section
from retort.report.samples import with_samples
from retort.report.trust import trust_section
from retort.report.words import escape, path

_GENERATOR = '<meta name="generator" content="Retort">'
#: What tells a page of ours from any other: the first, or (before it was there) the policy under which it runs.
_MARKS = (_GENERATOR.encode(), b"default-src 'none'; style-src 'sha256-")
PAGE = "report.html"
#: Rollouts read, over all runs; the page shows fewer where they are long.
ROLLOUTS = 240


def build_report(paths: Sequence[Path], out: Path | None = None, note: Callable[[str], None] | None = None) -> Path:
    """Writes one self-contained HTML page about a run, or about several side by side.

    Runs that differ in nothing but their seed are shown as one: means with 95 % intervals over seeds.

    Args:
        paths: Folders of runs, or folders with runs in them; files that are missing in a run are named on the page.
        out: The file to write; its folder is made if needed. None: `report.html` in the folder of a single place, or
            in the current folder for several, but not in the place of a page about other runs.
        note: Takes a sentence for each run of which something is damaged and left out; the page says it, too.

    Returns:
        `out`.

    Raises:
        UserError: A folder does not exist or holds no run, a run cannot be read, or another file is at `out`.
        RunError: The page cannot be written.
    """
    if not paths:
        raise UserError("report: name at least one run's folder")
    chosen, out = out, out or (Path(paths[0]) / PAGE if len(paths) == 1 else Path(PAGE))
    there = _refuse_foreign(out)
    groups = grouped(read_runs(find_runs([Path(place) for place in paths]), ROLLOUTS))
    if chosen is None and len(paths) > 1 and there and _head(_title(groups)) not in there:
        raise UserError(f"report: {out} exists and is about other runs; name another file, or that one, with --out")
    page, runs = _page(groups), all_runs(groups)
    for run in runs if note is not None else ():
        if run.damage and note is not None:
            note(f"report: {run.folder}: left out what is damaged: {' '.join(run.damage)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"report: cannot write {out}: {reason(error)}") from None
    write_text(out, page)
    return out


def _refuse_foreign(out: Path) -> bytes:
    """The beginning of a page at `out`, if there is one; raises `UserError` for a file that is not a report."""
    try:
        if out.is_dir():
            raise UserError(f"report: {out} is a folder; name a file with --out")
        if not out.exists():
            return b""
        with out.open("rb") as file:
            begins = file.read(4096)
    except (OSError, ValueError) as error:
        raise UserError(f"report: {out}: {reason(error)}; name another file with --out") from None
    if begins and not any(mark in begins for mark in _MARKS):
        raise UserError(f"report: {out} exists and is no report of Retort's; name another file with --out")
    return begins


def _asset(name: str) -> str:
    return resources.files("retort.report").joinpath(name).read_text(encoding="utf-8")


def _page(groups: Sequence[Group]) -> str:
    flows, texts = apart(groups)
    style = _asset("page.css") + (_asset("flows.css") if flows else "")
    script = "".join(map(_asset, ("plots.js", "episodes.js", "tokens.js")))
    title = _title(groups)
    # Only this style and this script may run, and nothing may be loaded, whatever a model wrote.
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    ) + ("; img-src data:" if with_images(groups) or with_samples(groups) else "")
    sections = (
        matrix_section(flows),
        result_section(groups),
        samples_section(flows),
        steps_section(flows),
        profiles_section(groups),
        trust_section(groups),
        rollouts_section(texts),
        curves_section(groups),
        _settings(groups),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{_GENERATOR}"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"{_head(title).decode()}<style>{style}</style></head>\n"
        f"<body>{_header(groups, title, sections)}<main>{''.join(sections)}</main>{_footer(groups)}"
        f"<script>{script}</script></body></html>\n"
    )


def _head(title: str) -> bytes:
    return f"<title>{escape(title)}</title>".encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- header ---

#: Labels of the links at the top, by the id of the section.
LINKS = {
    "rewards": "Rewards",
    "result": "Before and after",
    "samples": "Samples",
    "steps": "Step by step",
    "where": "Where they disagree",
    "trust": "What to trust",
    "rollouts": "Token by token",
    "curves": "Curves",
    "settings": "Settings",
}


def _title(groups: Sequence[Group]) -> str:
    if len(groups) > 1:
        seeds = sum(len(group.runs) for group in groups)
        what = f"{len(groups)} runs" if seeds == len(groups) else f"{len(groups)} experiments, {seeds} runs"
        return f"{what}: {', '.join(group.name for group in groups)}"
    return " · ".join(dict.fromkeys([method_name(groups[0].runs[0]) or "Distillation", groups[0].name]))


def _paper(name: str) -> str:
    """Title and source of a method's paper, if this version of Retort knows the method."""
    from retort.registry import load

    try:
        paper = load(name).paper
    except UserError:
        return ""
    if paper is None:
        return ""
    source = f"arXiv {paper.arxiv}" if paper.arxiv else paper.url or ""
    return " · ".join(part for part in (paper.title, str(paper.year), source) if part)


def _itself(run: RunFiles) -> str:
    """Describes the teacher of a student that teaches itself, if this version of Retort knows the method."""
    from retort.registry import load

    settings = dict(as_object(run.config.get("method")))
    try:
        views = load(str(settings.pop("name", "")), **settings).views.values()
    except UserError:
        return ""
    ways = dict.fromkeys(view.weights.words for view in views if view.model == "student")
    return "; ".join(f"the student itself, {words}" for words in ways)


def _header(groups: Sequence[Group], title: str, sections: Sequence[str]) -> str:
    parts = [f"<header><h1>{escape(title)}</h1>"]
    runs = [run for group in groups for run in group.runs]
    for name, own in dict.fromkeys((method_name(run), run.config.get("own_method") is True) for run in runs):
        paper = _paper(name) if name else ""
        paper = f"changed by the user, not as published: {paper}" if paper and own else paper
        if paper:
            parts.append(f'<p class="muted">{escape(f"{name}: {paper}" if len(groups) > 1 else paper)}</p>')
    parts += [f'<p class="lead">{escape(sentence)}</p>' for sentence in headlines(groups)]
    if len(groups) > 1:
        parts.append(f'<ul class="runs">{"".join(_run_key(group) for group in groups)}</ul>')
    else:
        parts.append(_facts(groups[0]))
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    aside = [f"{run.name}: {said}" if len(runs) > 1 else said for run in runs for said in run.remarks]
    parts += [_list("remarks", [*remarks(groups), *aside]), _list("notes", notes)]
    links = "".join(
        f'<a href="#{key}">{words}</a>'
        for key, words in LINKS.items()
        if any(f'<h2 id="{key}"' in section for section in sections)
    )
    return f'{"".join(parts)}</header><nav aria-label="Sections">{links}</nav>'


def _list(kind: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _run_key(group: Group) -> str:
    swatch = KEY.format(f"c{group.color % COLORS}", 0)
    facts = " · ".join(fact for fact in (method_name(group.runs[0]), group.seeds()) if fact)
    return f'<li>{swatch}{escape(group.name)} <span class="muted">{escape(facts)}</span></li>'


def _facts(group: Group) -> str:
    run = group.runs[0]
    models = run.config.get("models")
    models = models if isinstance(models, dict) else {}
    others = {f"model {name}": own.get("path") for name, own in models.items() if isinstance(own, dict)}
    keys = ("student", "teacher", "base", *others, "data", "task", "steps", "precision", "device")
    config = {**others, **run.config, "teacher": run.config.get("teacher") or _itself(run)}
    found = [(key.capitalize(), str(config[key])) for key in keys if config.get(key) not in (None, "")]
    found += flow_facts(run)
    if "seed" in run.config:
        found.append(("Seed", group.seeds().removeprefix("seed ")))
    items = "".join(
        f"<div{' class=wide' * (len(value) > 24)}><dt>{escape(key)}</dt><dd>{path(value)}</dd></div>"
        for key, value in found
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


# --- settings ---


def _settings(groups: Sequence[Group]) -> str:
    configs = [run for group in groups for run in group.runs[:1] if run.config]
    if not configs:
        return ""
    names = {id(group.runs[0]): group.name for group in groups}
    blocks = "".join(
        f"<details><summary>{escape(names[id(run)])}</summary>"
        f"<pre>{_lines(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre></details>"
        for run in configs
    )
    differing = _differences(configs, [names[id(run)] for run in configs]) if len(configs) > 1 else ""
    seeds = '<p class="muted">Of the first seed of each.</p>' if any(group.several for group in groups) else ""
    return (
        '<section aria-labelledby="settings"><h2 id="settings">Settings</h2>' + seeds + differing + blocks
    ) + "</section>"


def _lines(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


def _differences(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    flats: list[Mapping[str, object]] = [leaves(run.config) for run in runs]
    missing = object()
    rows = [
        (key, [str(flat.get(key, "–")) for flat in flats])
        for key in dict.fromkeys(key for flat in flats for key in flat)
        if key != "out" and any(flat.get(key, missing) != flats[0].get(key, missing) for flat in flats)
    ]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        f"{''.join(f'<td>{path(value)}</td>' for value in values)}</tr>"
        for key, values in rows
    )
    return (
        '<p class="muted">What differs between the runs.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Settings that differ"><table>'
        f'<thead><tr><th scope="col">Setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _footer(groups: Sequence[Group]) -> str:
    names = escape(", ".join(run.name for group in groups for run in group.runs))
    return f"<footer>Made by Retort from {', '.join(FILES)} of {names}. This page loads nothing.</footer>"
