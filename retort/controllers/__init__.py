"""Controllers: parts of a method with a state that changes during a run and is saved with it."""

from retort.controllers.base import Controller, Probe, Seen, State

__all__ = ["Controller", "Probe", "Seen", "State"]
