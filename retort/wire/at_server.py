"""What whoever started this process also serves, so that it need not have it itself: models and environments."""

from __future__ import annotations

import json
import os

#: Variable of the environment: addresses by the path or name that settings give, as JSON.
VARIABLE = "RETORT_SERVED"


def at_server(path: str) -> str:
    """The address at which a model, or an environment, is served to this process, or the path as it is."""
    return json.loads(os.environ.get(VARIABLE, "{}")).get(path, path)
