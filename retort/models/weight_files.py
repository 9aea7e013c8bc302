"""Where the weights of a model folder, or of one in the cache of the hub, lie."""

from __future__ import annotations

from pathlib import Path


def weight_files(location: str) -> list[Path]:
    """The safetensors files of a model that is on this machine, sorted; empty where it has none.

    Args:
        location: A folder, or the hub name of a model in the cache.
    """
    from transformers.utils.hub import cached_file

    # In the cache of the hub, too, the weights lie beside the settings.
    config = cached_file(
        location,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return [] if config is None else sorted(Path(config).parent.glob("*.safetensors"))
