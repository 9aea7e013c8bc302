"""`retort serve` for the tests, as a user starts it: the command, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(model: str, *words: str) -> Iterator[str]:
    """The address of a server of a model, started with settings as `key=value`; it ends with the block."""
    command = [sys.executable, "-m", "retort", "serve", model, "--port", "0", *words]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=surroundings) as process:
        assert process.stdout is not None
        try:
            said = list[str]()
            for line in process.stdout:  # notes may come first
                said.append(line)
                found = re.search(r" at (http://127\.0\.0\.1:\d+);", line)
                if found is not None:
                    yield found[1]
                    return
            raise AssertionError(f"retort serve {model} did not start: {''.join(said)}")
        finally:
            process.send_signal(signal.SIGTERM)
