"""The built-in environment: Rooms, a text game of many turns, its expert, and a tiny teacher and student."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.rooms.episodes import rows
from retort.tasks.rooms.game import Rooms

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

__all__ = ["MODELS_DIR", "Rooms", "rows", "student_path", "teacher_path"]


def teacher_path() -> Path:
    """The Hugging Face folder of the bundled teacher."""
    return bundled(MODELS_DIR, "teacher", __name__)


def student_path() -> Path:
    """The Hugging Face folder of the bundled, cold-started student."""
    return bundled(MODELS_DIR, "student", __name__)
