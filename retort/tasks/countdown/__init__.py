"""The built-in task: Countdown problems, an exact checker, and a tiny teacher and student."""

from __future__ import annotations

from pathlib import Path

from retort.tasks.countdown.problems import check, rows

MODELS_DIR = Path(__file__).parent / "models"
"""Where the bundled models lie."""

__all__ = ["MODELS_DIR", "check", "rows", "student_path", "teacher_path"]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher."""
    return _bundled("teacher")


def student_path() -> Path:
    """The Hugging Face folder of the bundled, cold-started student."""
    return _bundled("student")


def _bundled(name: str) -> Path:
    path = MODELS_DIR / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model; make it with: python -m retort.tasks.countdown.build --out {MODELS_DIR}"
        )
    return path
