"""What a run and the processes that generate for it say to one another, besides `retort.wire.protocol`."""

from __future__ import annotations

import json
import os

#: Paths: have a copy of the student read weights, and have it generate.
LOAD, GENERATE = "/v1/load", "/v1/generate"
#: Variable with the key that every request brings, and that with the addresses of workers which others placed (JSON).
KEY, ADDRESSES = "RETORT_WORKER_KEY", "RETORT_WORKERS"


def placed() -> tuple[str, ...]:
    """Addresses of the workers that whoever started this process has placed; none where the run starts its own."""
    return tuple(json.loads(os.environ.get(ADDRESSES, "[]")))
