"""Thumbnails of the images of recorded rollouts, embedded into the page.

The files of a run may be damaged or somebody else's: only what looks like a thumbnail of Retort's is read.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retort.report.groups import Group, all_runs
from retort.report.read import RunFiles, as_list

__all__ = ["embedded", "images_of", "with_images"]

#: Folder of the thumbnails in the folder of a run, and most bytes of one.
FOLDER, MOST_BYTES = "thumbnails", 20_000
#: Most images that are embedded, and most of one prompt.
MOST_IMAGES, MOST_OF_A_PROMPT = 150, 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: First bytes and type of a file, by its ending.
_KINDS = {"png": (b"\x89PNG\r\n\x1a\n", "image/png"), "jpg": (b"\xff\xd8\xff", "image/jpeg")}


def images_of(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The digests that a recorded rollout names; empty where it names none.

    Args:
        row: A line of `rollouts.jsonl` or `answers.jsonl`.

    Returns:
        `images`, those of its prompt, and `teacher_images`, those that only a teacher sees; each only if there are any.
    """
    named = {name: [one for one in as_list(row.get(name)) if _is_digest(one)] for name in ("images", "teacher_images")}
    return {name: own[:MOST_OF_A_PROMPT] for name, own in named.items() if own}


def _is_digest(value: object) -> bool:
    # Never a path: the name of a file is made of it.
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def with_images(groups: Sequence[Group]) -> bool:
    """Whether a run has thumbnails."""
    return any((run.folder / FOLDER).is_dir() for run in all_runs(groups))


def embedded(runs: Sequence[RunFiles], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The thumbnails of what the page shows, as data URLs by digest; those that are missing or damaged are left out."""
    found: dict[str, str] = {}
    for row in rows:
        for digest in (*row.get("images", ()), *row.get("teacher_images", ())):
            if digest not in found and len(found) < MOST_IMAGES:
                url = next((url for run in runs if (url := _url(run, digest))), None)
                found |= {digest: url} if url else {}
    return found


def _url(run: RunFiles, digest: str) -> str | None:
    for kind, (begins, about) in _KINDS.items():
        path = run.folder / FOLDER / f"{digest}.{kind}"
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
                continue
            content = path.read_bytes()
        except OSError:
            continue
        if content.startswith(begins):
            return f"data:{about};base64,{base64.b64encode(content).decode()}"
    return None
