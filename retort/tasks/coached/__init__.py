"""The built-in task for self-distillation: Countdown with hints, mistakes and a checker's feedback."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.coached.problems import PRIVILEGED, TEMPLATES, bait, bait_rows, check, feedback, followed, rows

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

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
    return bundled(MODELS_DIR, "teacher", __name__)


def student_path() -> Path:
    """The Hugging Face folder of the bundled student: it can use what it is shown, and alone it often fails."""
    return bundled(MODELS_DIR, "student", __name__)
