"""Retort: on-policy distillation of language models, every published method behind one loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retort import functional as functional
    from retort.api import distill as distill
    from retort.api import doctor as doctor
    from retort.errors import RetortError as RetortError
    from retort.errors import RunError as RunError
    from retort.errors import UserError as UserError
    from retort.method import Limit as Limit
    from retort.method import Method as Method
    from retort.method import Paper as Paper
    from retort.method import Term as Term
    from retort.method import Watch as Watch
    from retort.registry import load as load
    from retort.rewards.base import Grade as Grade
    from retort.train.callbacks import Callback as Callback
    from retort.train.events.hooks import Stop as Stop

#: Public name -> where it lives; imported when first asked for, so that `import retort` costs nothing.
_HOMES = {
    "distill": "retort.api",
    "doctor": "retort.api",
    "load": "retort.registry",
    "Callback": "retort.train.callbacks",
    "Grade": "retort.rewards.base",
    "Limit": "retort.method",
    "Method": "retort.method",
    "Paper": "retort.method",
    "Stop": "retort.train.events.hooks",
    "Term": "retort.method",
    "Watch": "retort.method",
    "RetortError": "retort.errors",
    "RunError": "retort.errors",
    "UserError": "retort.errors",
}

__all__ = [
    "Callback",
    "Grade",
    "Limit",
    "Method",
    "Paper",
    "RetortError",
    "RunError",
    "Stop",
    "Term",
    "UserError",
    "Watch",
    "distill",
    "doctor",
    "functional",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("retort.functional")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'retort' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
