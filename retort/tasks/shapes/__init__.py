"""The built-in visual task: pictures of shapes, questions about them with a note, and a tiny teacher and student."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.shapes.problems import answer_in, check, noted, rows

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

__all__ = ["MODELS_DIR", "answer_in", "check", "noted", "rows", "student_path", "teacher_path"]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher, which looks at the picture."""
    return bundled(MODELS_DIR, "teacher", __name__)


def student_path() -> Path:
    """The Hugging Face folder of the bundled student, which mostly follows the note."""
    return bundled(MODELS_DIR, "student", __name__)
