"""Built-in tasks: small, complete, checkable, and ready without a download; and the paths of their models."""

from __future__ import annotations

from pathlib import Path


def bundled(folder: Path, name: str, task: str) -> Path:
    """The Hugging Face folder of a model that ships with a task.

    Args:
        folder: Folder of the task's models.
        name: Name of the model.
        task: The task's package, whose module `build` makes them.

    Raises:
        FileNotFoundError: The model is missing; the message says how to make it.
    """
    path = folder / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no model; make it with: python -m {task}.build --out {folder}")
    return path
