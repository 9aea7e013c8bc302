"""The page about a run: one HTML file that loads nothing; whatever came from a model or from data is escaped in it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from retort.errors import RunError, UserError
from retort.report.curves import COLORS, curves_section
from retort.report.plots import KEY
from retort.report.read import FILES, RunFiles, read_runs
from retort.report.result import headlines, result_section
from retort.report.rollouts import rollouts_section

#: Rollouts shown, over all runs.
ROLLOUTS = 12


def build_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes one self-contained HTML page about a run, or about several side by side.

    Args:
        run_dirs: Folders of the runs; files that are missing in them are named on the page.
        out: The file to write; its folder is made if needed.

    Returns:
        `out`.

    Raises:
        UserError: A folder does not exist or holds no run.
        RunError: The page cannot be written.
    """
    runs = read_runs([Path(path) for path in run_dirs], ROLLOUTS)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.part")
        # A lone surrogate, which JSON can smuggle in, has no UTF-8.
        temporary.write_bytes(_page(runs).encode("utf-8", "replace"))
        temporary.replace(out)
    except OSError as error:
        raise RunError(f"report: cannot write {out}: {error.strerror}") from error
    return out


def _page(runs: Sequence[RunFiles]) -> str:
    style = resources.files("retort.report").joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files("retort.report").joinpath("page.js").read_text(encoding="utf-8")
    title = _title(runs)
    # Only this style and this script may run, and nothing may be loaded, whatever a model wrote.
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    body = "".join(
        (
            _header(runs, title),
            result_section(runs),
            curves_section(runs),
            rollouts_section(runs),
            _settings(runs),
            _footer(runs),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- header ---


def _title(runs: Sequence[RunFiles]) -> str:
    if len(runs) == 1:
        return " · ".join(dict.fromkeys([_method(runs[0]) or "Distillation", runs[0].name]))
    return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"


def _method(run: RunFiles) -> str:
    method = run.config.get("method", "")
    return str(method.get("name", "")) if isinstance(method, Mapping) else str(method)


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


def _header(runs: Sequence[RunFiles], title: str) -> str:
    parts = [f"<header><h1>{escape(title)}</h1>"]
    for name in dict.fromkeys(_method(run) for run in runs):
        paper = _paper(name) if name else ""
        if paper:
            parts.append(f'<p class="muted">{escape(f"{name}: {paper}" if len(runs) > 1 else paper)}</p>')
    parts += [f'<p class="lead">{escape(sentence)}</p>' for run in runs for sentence in headlines(run, len(runs) > 1)]
    if len(runs) > 1:
        parts.append(f'<ul class="runs">{"".join(_run_key(index, run) for index, run in enumerate(runs))}</ul>')
    else:
        parts.append(_facts(runs[0]))
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    if notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    return "".join(parts) + "</header>"


def _run_key(index: int, run: RunFiles) -> str:
    swatch = KEY.format(f"c{index % COLORS}", 0)
    facts = " · ".join(fact for fact in (_method(run), f"seed {run.config.get('seed', '?')}") if fact)
    return f'<li>{swatch}{escape(run.name)} <span class="muted">{escape(facts)}</span></li>'


def _facts(run: RunFiles) -> str:
    keys = ("student", "teacher", "data", "task", "steps", "seed", "precision", "device")
    found = [(key.capitalize(), str(run.config[key])) for key in keys if run.config.get(key) not in (None, "")]
    items = "".join(
        f"<div{' class=wide' * (len(value) > 24)}><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in found
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


# --- settings ---


def _settings(runs: Sequence[RunFiles]) -> str:
    configs = [run for run in runs if run.config]
    if not configs:
        return ""
    blocks = "".join(
        f"<details><summary>{escape(run.name)}</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre></details>"
        for run in configs
    )
    return (
        '<section aria-labelledby="settings"><h2 id="settings">Settings</h2>'
        f"{_differences(configs) if len(configs) > 1 else ''}{blocks}</section>"
    )


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _differences(runs: Sequence[RunFiles]) -> str:
    leaves = [_leaves(run.config) for run in runs]
    missing = object()
    rows = [
        (key, [str(flat.get(key, "–")) for flat in leaves])
        for key in dict.fromkeys(key for flat in leaves for key in flat)
        if any(flat.get(key, missing) != leaves[0].get(key, missing) for flat in leaves)
    ]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(f'<tr><th scope="row"><code>{escape(key)}</code></th>{_cells(values)}</tr>' for key, values in rows)
    return (
        '<p class="muted">What differs between the runs.</p><div class="scroll"><table>'
        f'<thead><tr><th scope="col">Setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _footer(runs: Sequence[RunFiles]) -> str:
    names = escape(", ".join(run.name for run in runs))
    return f"<footer>Made by Retort from {', '.join(FILES)} of {names}. This page loads nothing.</footer>"
