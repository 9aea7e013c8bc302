"""The output of an actor, in a file with its name."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from pathlib import Path


def redirect(name: str) -> Path:
    """Sends all that this process prints to a new file on its machine; only this user can read it.

    Args:
        name: Of the actor, such as `rank-0`.
    """
    path = Path(tempfile.mkdtemp(prefix=f"retort-{name}-")) / f"{name}.log"
    with path.open("wb") as out:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    faulthandler.enable()
    return path
