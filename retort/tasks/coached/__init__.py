"""The built-in task of models that teach themselves: Countdown with hints, mistakes and what a checker says."""

from __future__ import annotations

from pathlib import Path

from retort.tasks.coached.problems import PRIVILEGED, TEMPLATES, bait, bait_rows, check, feedback, followed, rows

MODELS_DIR = Path(__file__).parent / "models"
"""Where the bundled models lie."""

__all__ = [
    "MODELS_DIR",
    "PRIVILEGED",
    "TEMPLATES",
    "bait",
    "bait_rows",
    "check",
    "feedback",
    "followed",
    "rows",
    "student_path",
    "teacher_path",
]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher: bigger, and it understands hints too."""
    return _bundled("teacher")


def student_path() -> Path:
    """The Hugging Face folder of the bundled student: what it is shown it can use, and alone it often fails."""
    return _bundled("student")


def _bundled(name: str) -> Path:
    path = MODELS_DIR / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model; make it with: python -m retort.tasks.coached.build --out {MODELS_DIR}"
        )
    return path
