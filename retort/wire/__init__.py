"""HTTP for everything of a run that answers elsewhere: one client, whatever the server speaks."""

from retort.wire.client import CONCURRENCY, KEY_VARIABLE, PATIENCE, TIMEOUT, Client, is_url

__all__ = ["CONCURRENCY", "KEY_VARIABLE", "PATIENCE", "TIMEOUT", "Client", "is_url"]
