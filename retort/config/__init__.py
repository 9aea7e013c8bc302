"""The settings of a run: their sources, their precedence, and what is refused."""

from retort.config.run_config import (
    BUILTIN,
    DEFAULT_FOR_TWO_TOKENIZERS,
    DEFAULT_METHOD,
    RECIPES,
    Config,
    keys,
    merge,
    overrides,
    read_json,
    read_toml,
    recipe,
    resolve,
    save,
    value,
)

__all__ = [
    "BUILTIN",
    "DEFAULT_FOR_TWO_TOKENIZERS",
    "DEFAULT_METHOD",
    "RECIPES",
    "Config",
    "keys",
    "merge",
    "overrides",
    "read_json",
    "read_toml",
    "recipe",
    "resolve",
    "save",
    "value",
]
