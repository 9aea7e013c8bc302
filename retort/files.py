"""Writing files so that nothing half-written is ever taken for whole, and a full disk is said in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from retort.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)


def reason(error: Exception) -> str:
    """An operating system error in words for people (safetensors wraps them in text)."""
    number, text = getattr(error, "errno", None), str(error)
    if number in _FULL or any(words in text for words in ("No space left", "File too large", "Disk quota")):
        return "the disk is full; make room and resume"
    if number in _REFUSED or "Permission denied" in text:
        return "no permission to write there"
    if number == errno.EROFS or "Read-only file system" in text:
        return "the disk is read-only"
    first = (getattr(error, "strerror", None) or text).splitlines()
    return first[0] if first else type(error).__name__


def disk_full(error: Exception) -> bool:
    """Whether an error says that the disk is full, also one of a library that wraps it in text."""
    return reason(error).startswith("the disk is full")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file at once.

    Raises:
        RunError: The file cannot be written; what was there before is untouched.
    """
    # A lone surrogate, which JSON can smuggle in, has no UTF-8.
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file at once. A link that lies at the temporary name is removed, never followed.

    Raises:
        RunError: The file cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".writing-{path.name}")
    try:
        remove(temporary)
        with temporary.open("xb") as file:  # x: a new file, or an error
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise RunError(f"cannot write {path}: {reason(error)}") from None


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to), or a folder with all that is in it. What is not there is fine.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends, and vanishes if the block raises.

    Args:
        folder: Its name in the end. What has that name before is replaced as a whole.

    Raises:
        OSError: The folder cannot be made or put in its place.
    """
    temporary, before = folder.with_name(f".writing-{folder.name}"), folder.with_name(f".before-{folder.name}")
    try:
        remove(temporary)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        remove(before)
        if folder.exists() or folder.is_symlink():
            folder.rename(before)
        temporary.rename(folder)
        flush(folder.parent)
        with contextlib.suppress(OSError):  # what cannot be removed is only in the way
            remove(before)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
            if before.exists() and not folder.exists():
                before.rename(folder)
        raise


def flush(path: Path) -> None:
    """Makes the system write a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
