"""The `retort` command."""

from retort.cli.commands import main

__all__ = ["main"]
