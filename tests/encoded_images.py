"""Small images for tests, encoded."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def encoded(
    color: Any = "red", size: tuple[int, int] = (4, 3), kind: str = "PNG", mode: str = "RGB", **more: Any
) -> bytes:
    """The bytes of an image of one color."""
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format=kind, **more)
    return file.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    """Bytes as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
