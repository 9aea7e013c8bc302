"""Settings that mean something for students of text alone, which a run of denoising steps does not read."""

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


def refuse_flow_settings(config: Config) -> None:
    """Refuses settings of denoising steps for a student of text, which reads none of them.

    Raises:
        UserError: The user set one; the message names it.
    """
    plain: Config = Config()
    for key in keys():
        if key.startswith("flow.") and config.set_by_user(key) and config.value(key) != plain.value(key):
            raise UserError(
                f"{key} is for students that decide denoising steps, and {config.student} decides tokens; leave it out"
            )


def own_settings(config: Config) -> Config:
    """The settings of a run of denoising steps, without what a method's paper says of settings for text alone.

    Raises:
        UserError: The user set one, which would do nothing; the message names it.
    """
    plain: Config = Config()
    for key in keys():
        if any(key == name or key.startswith(f"{name}.") for name in _READ) or config.value(key) == plain.value(key):
            continue
        if config.set_by_user(key):
            raise UserError(
                f"{key} is for students of text, and this one decides denoising steps; leave it out (docs/flow.md)"
            )
        config = config.changed(key, plain.value(key))
    return config
