"""The built-in structured-output task: ranked JSON lists, a parser, and a tiny teacher and student."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.ranking.lists import ListScore, check, rows, score_list

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

__all__ = ["MODELS_DIR", "ListScore", "check", "rows", "score_list", "student_path", "teacher_path"]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher."""
    return bundled(MODELS_DIR, "teacher", __name__)


def student_path() -> Path:
    """The Hugging Face folder of the bundled student: warm-started, so that it parses now and then."""
    return bundled(MODELS_DIR, "student", __name__)
