"""What a controller is: a state, numbers that the method reads from it, and rules by which the state moves.

A batch goes like this. The rollout plan reads `numbers` of the state as it is. The batch is written and answered, and
the controller is shown the means of what it `sees` on it (`act`). Terms read `numbers` again, the student learns, and
the controller is told what has become of those means on the same tokens, if it asked for them (`learn`). Where a
`probe` is due after that, the controller hears of it (`probed`). All three give a new state and change nothing. Chance
comes from a generator that is keyed by seed and step, so the state is all that a checkpoint has to hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from retort.core.parts import Part
from retort.core.schedules import Reading
from retort.errors import UserError

#: Named tensors on the CPU; nobody changes them in place.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What a controller may look at besides its state.

    Attributes:
        before: Means over the batch's counted steps before the first update, by the names in `sees`.
        reward_R: Reward of each rollout of the batch, float64; None where nothing was graded.
        length_R: Steps of each.
        longest: The longest answer that was allowed, tokens, where known.
        step: Batches done, of the method's own.
        total_steps: Of the method, where known.
    """

    before: Mapping[str, float]
    step: int = 0
    total_steps: int | None = None
    reward_R: Tensor | None = None
    length_R: Tensor | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Probe:
    """A measurement on prompts that are kept out of the training data for it.

    Attributes:
        parts: What is averaged, over all tokens of all answers, by name.
        source: Whose answers: the student's, written at the plan's horizon, or the data's.
        every: Steps between two probes.
        prompts: How many, at most a fifth of the training data.
        at_start: Probe also before the first step.
        against: The view whose answers the parts read.
    """

    parts: Mapping[str, Part]
    source: Literal["student", "dataset"] = "student"
    every: int = 30
    prompts: int = 64
    at_start: bool = False
    against: str = "teacher"

    def __post_init__(self) -> None:
        if self.every < 1 or self.prompts < 1:
            raise UserError(f"a probe needs every >= 1 and prompts >= 1, not {self.every} and {self.prompts}")


@dataclass(frozen=True)
class Controller:
    """The base: no state, no numbers. What a subclass does not override does nothing.

    Attributes:
        name: By which its numbers are read.
        sees: Parts whose means over a batch it wants before the first update.
        again: Whether it wants the same means after the last update, too. Costs a pass over the batch, as `sees` does.
        probe: A measurement that it wants from time to time.
        against: The view whose answers the parts read.
        rewards: Whether it cannot do without rewards.
    """

    name: str
    sees: Mapping[str, Part] = field(default_factory=lambda: {})
    again: bool = False
    probe: Probe | None = None
    against: str = "teacher"
    rewards: bool = False

    def read(self, number: str) -> Reading:
        """A dial that is one of its numbers."""
        return Reading(self.name, number)

    def init(self, draw: torch.Generator) -> State:
        """The state before the first batch."""
        return {}

    def numbers(self, state: State) -> Mapping[str, float]:
        """What dials read."""
        return {}

    def act(self, state: State, seen: Seen, draw: torch.Generator) -> State:
        """The state with its choice for this batch."""
        return state

    def learn(self, state: State, seen: Seen, after: Mapping[str, float]) -> State:
        """The state after the batch was learnt from; `after` is empty unless it asks to see it `again`."""
        return state

    def probed(self, state: State, found: Mapping[str, float]) -> State:
        """The state after a probe."""
        return state

    def ended(self, state: State) -> str | None:
        """Why the run is to end now, if it is."""
        return None


def scalar(value: float) -> Tensor:
    """A number as a state holds it: float64."""
    return torch.tensor(value, dtype=torch.float64)
