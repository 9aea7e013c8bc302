"""Where a run is: what every dial is read at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from retort.schedules import Dial, at


@dataclass(frozen=True)
class Moment:
    """A place in a run.

    Attributes:
        step: Batches done in the run; random streams are keyed by it.
        begun: Batches done before the method at hand took over (a cold start runs another one first).
        end: Batches after which that method is done.
        readings: Numbers of the method's controllers.
    """

    step: int
    end: int
    begun: int = 0
    readings: Mapping[str, float] = field(default_factory=lambda: {})

    @property
    def done(self) -> int:
        """Batches that the method at hand has done: what its schedules count."""
        return self.step - self.begun

    @property
    def total(self) -> int:
        """Batches of the method at hand."""
        return self.end - self.begun

    def at(self, dial: Dial) -> float:
        """The value of a dial now."""
        return at(dial, self.done, self.total, self.readings)
