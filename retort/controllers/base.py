"""Controllers: a state, numbers that the method reads from it, and rules by which the state changes.

A batch goes like this. The rollout plan reads `numbers` of the current state. The completions are generated and scored,
and the controller observes the batch means of the parts in `observes` (`act`). Terms read `numbers` again, and the
student learns. Then the controller observes those means again on the same tokens, if it asked for them (`learn`). Where
a `probe` is due, it gets the results (`probed`). All three return a new state and change nothing. Randomness comes from
a generator that is keyed by seed and step, so the state is all that a checkpoint has to hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from retort.core.parts import Part
from retort.core.schedules import ControllerOutput
from retort.errors import UserError

#: Named tensors on the CPU; they are never changed in place.
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Observation:
    """What a controller observes of a batch.

    Attributes:
        before: Means over the batch's counted steps before the first update, by the names in `observes`.
        reward_R: Reward of each rollout of the batch, float64; None where nothing was graded.
        length_R: Number of steps of each rollout.
        longest: The longest completion allowed, tokens, where known.
        step: Batches that the method has done.
        total_steps: Batches of the method in all, where known.
    """

    before: Mapping[str, float]
    step: int = 0
    total_steps: int | None = None
    reward_R: Tensor | None = None
    length_R: Tensor | None = None
    longest: int | None = None


@dataclass(frozen=True)
class Probe:
    """A measurement on prompts that are kept out of the training data.

    Attributes:
        parts: Parts to average, over all tokens of all completions, by name.
        source: The completions: the student's, generated at the plan's horizon, or the data's.
        every: Steps between two probes.
        prompts: Number of prompts, at most a fifth of the training data.
        at_start: Probe also before the first step.
        against: The view whose signals the parts read.
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
    """Base class: no state, no numbers. A method that a subclass does not override does nothing.

    Attributes:
        name: Name by which its numbers are read.
        observes: Parts whose means over a batch it needs before the first update.
        again: Whether it needs the same means after the last update, too. Either costs a pass over the batch.
        probe: A measurement that is taken from time to time.
        against: The view whose signals the parts read.
        rewards: Whether it needs rewards.
    """

    name: str
    observes: Mapping[str, Part] = field(default_factory=lambda: {})
    again: bool = False
    probe: Probe | None = None
    against: str = "teacher"
    rewards: bool = False

    def read(self, number: str) -> ControllerOutput:
        """A reference to one of its numbers, for a setting that may be a schedule."""
        return ControllerOutput(self.name, number)

    def init(self, draw: torch.Generator) -> State:
        """The state before the first batch."""
        return {}

    def numbers(self, state: State) -> Mapping[str, float]:
        """Its outputs, by name."""
        return {}

    def act(self, state: State, observation: Observation, draw: torch.Generator) -> State:
        """The state with its choice for this batch."""
        return state

    def learn(self, state: State, observation: Observation, after: Mapping[str, float]) -> State:
        """The state after the update; `after` is empty unless it observes the batch `again`."""
        return state

    def probed(self, state: State, found: Mapping[str, float]) -> State:
        """The state after a probe."""
        return state

    def ended(self, state: State) -> str | None:
        """The reason to end the run now, if there is one."""
        return None


def scalar(value: float) -> Tensor:
    """A number as a state holds it: a float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)
