"""Who answers: views and teachers (models are imported lazily)."""

from retort.teachers.view import View

__all__ = ["View"]
