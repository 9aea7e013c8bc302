"""Settings that mean something for students of text alone: a run of denoising steps refuses them."""

from __future__ import annotations

from retort.config import Config, keys
from retort.errors import UserError

#: Settings that a run of denoising steps reads; sections whole, others by name.
_READ = (
    *("student", "teacher", "base", "models", "data", "prompt_template", "method", "steps", "seed", "out", "precision"),
    *("device", "threads", "trust_remote_code", "checks", "own_method", "tracker", "columns", "split", "limit"),
    *("optimizer", "lora", "checkpoint", "record", "teachers", "flow", "cold_start"),
    *("rollout.prompts", "eval.problems", "eval.samples", "eval.every", "eval.teacher", "eval.data"),
)


def refuse_settings(config: Config) -> None:
    """Refuses settings that would do nothing, where they are not at their defaults.

    Raises:
        UserError: One is set; the message names it.
    """
    plain: Config = Config()
    for key in keys():
        read = any(key == name or key.startswith(f"{name}.") for name in _READ)
        if not read and config.value(key) != plain.value(key):
            raise UserError(
                f"{key} is for students of text, and this one decides denoising steps; leave it out (docs/flow.md)"
            )
