"""Controllers: parts of a method with a state that changes during a run and is saved with it."""

from retort.controllers.base import Controller, Observation, Probe, State

__all__ = ["Controller", "Observation", "Probe", "State"]
