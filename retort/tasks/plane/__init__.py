"""The built-in task of flows in the plane: a student, an expert for two moons and one for eight Gaussians."""

from __future__ import annotations

from pathlib import Path

from retort.tasks import bundled
from retort.tasks.plane.problems import DOMAINS, rows

MODELS_DIR = Path(__file__).parent / "models"
"""The folder of the bundled models."""

__all__ = ["DOMAINS", "MODELS_DIR", "rows", "student_path", "teacher_paths"]


def student_path() -> Path:
    """The folder of the bundled student, which knows neither shape well."""
    return bundled(MODELS_DIR, "student", __name__)


def teacher_paths() -> dict[str, Path]:
    """The folders of the bundled experts, by the domain that each knows."""
    return {name: bundled(MODELS_DIR, name, __name__) for name in DOMAINS}
