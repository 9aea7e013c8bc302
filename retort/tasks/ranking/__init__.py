"""The built-in structured-output task: ranked JSON lists, a parser, and a tiny teacher and student."""

from __future__ import annotations

from pathlib import Path

from retort.tasks.ranking.lists import Judged, check, judge, rows

MODELS_DIR = Path(__file__).parent / "models"
"""Where the bundled models lie."""

__all__ = ["MODELS_DIR", "Judged", "check", "judge", "rows", "student_path", "teacher_path"]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher."""
    return _bundled("teacher")


def student_path() -> Path:
    """The Hugging Face folder of the bundled student: warm-started, so that it parses now and then."""
    return _bundled("student")


def _bundled(name: str) -> Path:
    path = MODELS_DIR / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model; make it with: python -m retort.tasks.ranking.build --out {MODELS_DIR}"
        )
    return path
