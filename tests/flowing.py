"""Tiny flows of points in the plane with random weights, and rows of prompts with the expert of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from retort.flows.small import SmallConfig, SmallFlow

WORDS = ("upper", "lower", "moon", "east", "west", "gaussians")
EXPERTS = ("moons", "gaussians")
ROWS = (
    {"id": "1", "prompt": "upper moon", "domain": "moons"},
    {"id": "2", "prompt": "east gaussians", "domain": "gaussians"},
    {"id": "3", "prompt": "lower moon", "domain": "moons"},
    {"id": "4", "prompt": "west gaussians", "domain": "gaussians"},
)


def flow(seed: int, **config: Any) -> SmallFlow:
    """A flow with random weights everywhere, so that its velocities are no zeros."""
    made = SmallFlow.new(SmallConfig(**{"latent_shape": (2,), "words": WORDS, "width": 16, **config}), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in made.module.parameters():
            own += 0.1 * torch.randn(own.shape, generator=draw)
    return made


def planes(folder: Path) -> None:
    """A student, two experts and `data.jsonl` in a folder."""
    for seed, name in enumerate(("student", *EXPERTS)):
        flow(seed).save(folder / name)
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    """Settings of a run on them, of which some may be changed, nested."""
    found: dict[str, Any] = {
        "student": str(folder / "student"),
        "models": {name: {"path": str(folder / name)} for name in EXPERTS},
        "teachers": {"models": list(EXPERTS)},
        "data": str(folder / "data.jsonl"),
        "method": {"name": "flow_opd", "samples": 3},
        "device": "cpu",
        "steps": 4,
        "rollout": {"prompts": 3},
        "flow": {"steps": 5, "eval_steps": 4, "batch": 8},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2},
        "eval": {"problems": 0},
    }
    for name, value in changed.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **value} if both else value
    return found
