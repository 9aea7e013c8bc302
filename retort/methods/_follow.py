"""How a self-teacher follows the student, as a setting of a method."""

from __future__ import annotations

from typing import Literal

from retort.teachers import moving

Follow = Literal["frozen", "ema", "live"]


def follow(kind: Follow, update_rate: float) -> moving.Weights:
    """The weights of a self-teacher; only an average looks at `update_rate`."""
    return {"frozen": moving.frozen, "live": moving.live, "ema": lambda: moving.ema(update_rate)}[kind]()
