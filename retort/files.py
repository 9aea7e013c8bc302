"""Writing files so that nothing half-written is ever taken for whole, and a full disk is said in words."""

from __future__ import annotations

import errno
from pathlib import Path

from retort.errors import RunError


def reason(error: Exception) -> str:
    """An operating system error in words for people (safetensors wraps them in text)."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return "the disk is full; make room and resume"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in str(error):
        return "no permission to write there"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Replaces a text file at once.

    Raises:
        RunError: It cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {reason(error)}") from None
