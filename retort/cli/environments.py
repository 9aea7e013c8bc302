"""`retort envs`: the environments that Retort knows, and what each needs."""

from __future__ import annotations

import json

from retort.envs.registry import ENVIRONMENTS


def listed(*, as_json: bool) -> str:
    """Name, summary, the extra that installs what it needs, and whether that is there."""
    if as_json:
        rows = [
            {"name": name, "summary": own.summary, "extra": own.extra or None, "installed": own.installed}
            for name, own in ENVIRONMENTS.items()
        ]
        return json.dumps(rows, indent=2)
    lines: list[str] = []
    for name, own in ENVIRONMENTS.items():
        needs = f"pip install 'retort-distill[{own.extra}]'" if own.extra else "nothing more"
        there = "" if own.installed else ", which is missing here"
        lines.append(f"{name}\n    {own.summary}\n    needs:    {needs}{there}")
    return "\n\n".join(lines)
