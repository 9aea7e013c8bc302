"""Settings that a run may be given anew where it is resumed: what it may spend, and who generates beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from retort.config.precedence import flat
from retort.config.run_config import Config
from retort.errors import UserError

#: Their full names.
CHANGED = (
    *("judge.budget_calls", "judge.budget_tokens", "judge.budget_money"),
    *("rollout.workers", "rollout.worker_timeout"),
)


def changed_by(settings: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """The settings, by full name, that a resumed run may be given.

    Args:
        settings: What it is given, nested or by full name.
        others: Further names of what it is given.

    Raises:
        UserError: One may not be changed.
    """
    found = flat(settings)
    refused = sorted({*found, *others} - set(CHANGED))
    if refused:
        raise UserError(
            "--resume keeps the settings of the run; only --steps may be given besides, and judge.budget_calls, "
            f"_tokens or _money, and rollout.workers, not {refused[0]}"
        )
    return found


def resumed(config: Config, changed: Mapping[str, Any]) -> Config:
    """The settings of a run that is resumed with others.

    Args:
        config: As the run was started.
        changed: Settings by full name.

    Raises:
        UserError: One may not be changed, or its value is none.
    """
    for name, value in changed_by(changed).items():
        section, _, key = name.partition(".")
        own = getattr(config, section)
        try:
            new = type(own).model_validate({**own.model_dump(), key: value})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{'.'.join([section, *map(str, first['loc'])])}: {first['msg']}") from None
        config = config.model_copy(update={section: new})
    return config
