"""Images of a flow model's samples in the folder of a run: one PNG file for each image, named by its digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retort.core.images import PromptImage
from retort.errors import RunError
from retort.files import reason, write_bytes

__all__ = ["FOLDER", "keep"]

#: Folder of them in the folder of a run.
FOLDER = "samples"


def keep(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the images of a row of the before/after table. A file that is there already is the same image.

    Args:
        folder: The folder of the run.
        row: As `FlowEvaluator.evaluate` returns it; any other row has no `samples` and stays as it is.

    Returns:
        The row with names of files, such as `samples/DIGEST.png`, in the place of images.

    Raises:
        RunError: One cannot be written.
    """
    if "samples" not in row:
        return dict(row)
    return {**row, "samples": [_kept(folder, sample) for sample in row["samples"]]}


def _kept(folder: Path, sample: Mapping[str, Any]) -> dict[str, Any]:
    image = sample.get("image")
    if not isinstance(image, PromptImage):
        return dict(sample)
    name = f"{FOLDER}/{image.digest}.png"
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {folder / FOLDER}: {reason(error)}") from None
    if not (folder / name).exists():
        write_bytes(folder / name, image.encoded())
    return {**sample, "image": name}
