"""Parts of a method that learn or switch as a run goes, and are saved with it."""

from retort.controllers.base import Controller, Probe, Seen, State

__all__ = ["Controller", "Probe", "Seen", "State"]
