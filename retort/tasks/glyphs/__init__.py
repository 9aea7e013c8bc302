"""The built-in image task: small pictures of characters, a student, and an expert each for character and colour."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.glyphs.problems import DOMAINS, rows

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

__all__ = ["DOMAINS", "MODELS_DIR", "rows", "student_path", "teacher_paths"]


def student_path() -> Path:
    """The folder of the bundled student, which gets neither characters nor colours right often."""
    return bundled(MODELS_DIR, "student", __name__)


def teacher_paths() -> dict[str, Path]:
    """The folders of the bundled experts, by the domain that each knows."""
    return {name: bundled(MODELS_DIR, name, __name__) for name in DOMAINS}
