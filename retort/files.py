"""Files of a run: a half-written file is never taken for a whole one, and errors say in words what is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retort.errors import RunError, UserError, quoted

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)
#: Deepest nesting of lists and objects that is read: files of a run need six levels, and recursion has its limits.
_DEEPEST = 64
#: Longest file name in bytes that the usual file systems allow.
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


def reason(error: Exception) -> str:
    """An operating system error in words (safetensors wraps them in text)."""
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
    """Whether an error means that the disk is full, also one of a library that wraps it in text."""
    return reason(error).startswith("the disk is full")


def named(text: str) -> Path:
    """The path that a text names.

    Raises:
        UserError: The text is empty, holds a NUL or bytes that are not UTF-8 (JSON, model files and cards cannot name
            those), or is longer than any file's name.
    """
    problem = unnameable(text)
    if problem is not None:
        raise UserError(f"{quoted(text)}: {problem}")
    return Path(text)


def unnameable(text: str) -> str | None:
    """The reason why a text cannot be a path, in words; None where it can."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        return f"no path: character {error.start + 1} is not UTF-8; use another name"
    if not content.strip():
        return "no path: it is empty; give a name"
    if b"\0" in content:
        return "no path: it holds a NUL character; use another name"
    if len(content) > _LONGEST_PATH or max(map(len, content.split(b"/"))) > _LONGEST_NAME:
        return f"no path: a name has at most {_LONGEST_NAME} bytes; use a shorter one"
    return None


def write_text(path: Path, text: str) -> None:
    """Replaces a text file at once.

    Raises:
        RunError: The file cannot be written; what was there before is untouched.
    """
    # A lone surrogate, which JSON can hold, has no UTF-8.
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
    """Removes a file, a link (not its target), or a folder with all that is in it. A missing path is fine.

    Raises:
        OSError: It cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `folder` when the block ends, and is removed if the block raises.

    Args:
        folder: Its final name. An existing folder of that name is replaced as a whole.

    Raises:
        OSError: The folder cannot be made or moved to its name.
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
    """Makes the system flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_object(content: bytes) -> dict[str, Any]:
    """Parses the JSON object of a file or of one of its lines.

    Raises:
        ValueError: It is no JSON object; the text says why, with line and column.
    """
    if not content.strip(b"\0 \t\r\n"):
        raise ValueError("holds only NUL bytes" if b"\0" in content else "is empty")
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("holds a number of thousands of digits") from None
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__} where an object is expected")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        level = [
            inner
            for thing in level
            for inner in (thing.values() if isinstance(thing, dict) else thing)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise ValueError("is nested too deeply")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        UserError: The file cannot be read, or holds no object: one sentence without a remedy, which depends on the
            file.
    """
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
