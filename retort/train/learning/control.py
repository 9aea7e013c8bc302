"""The controllers of a run's method: their states, and when these are read and updated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from retort.controllers import Controller, Probe, State
from retort.core.random_streams import generator
from retort.core.steps import Clock
from retort.errors import UserError
from retort.loss.scoring import observe
from retort.method import Method
from retort.train.learning.learner import Learner
from retort.train.learning.passes import Batch

#: A function that runs a probe.
Measure = Callable[[Probe, Clock], Mapping[str, float]]
_PREFIX = "control/"


class Control:
    """Controller states by name. A method without controllers leaves them all alone."""

    def __init__(self, controllers: Sequence[Controller], seed: int) -> None:
        """Initializes the states before the first batch."""
        self.seed = seed
        self.states: dict[str, State] = {}
        for controller in controllers:
            self.states[controller.name] = controller.init(generator(self.seed, "controllers", controller.name))

    def controller_outputs(self, method: Method) -> dict[str, float]:
        """The controller outputs, by `<controller>.<number>`."""
        return {
            f"{controller.name}.{number}": value
            for controller in method.controllers
            for number, value in controller.numbers(self.states[controller.name]).items()
        }

    def act(self, batch: Batch, learner: Learner) -> Batch:
        """Shows a batch to the controllers that act before an update; returns it with their new outputs."""
        controllers, evaluate = batch.method.controllers, learner.evaluator(batch)
        self._seen = {}
        for controller in controllers:
            observation = observe(controller, batch.steps, batch.clock, batch.valid, evaluate)
            draw = generator(self.seed, "controllers", controller.name, batch.clock.step)
            self.states[controller.name] = controller.act(self.states[controller.name], observation, draw)
            self._seen[controller.name] = observation
        if not controllers:
            return batch
        return replace(batch, clock=replace(batch.clock, controller_outputs=self.controller_outputs(batch.method)))

    def learn(self, batch: Batch, learner: Learner) -> None:
        """Updates the controllers after a batch was learnt from."""
        for controller in batch.method.controllers:
            again = controller.again and controller.observes
            after = learner.averages(batch, controller.observes, controller.against) if again else {}
            state = self.states[controller.name]
            self.states[controller.name] = controller.learn(state, self._seen[controller.name], after)

    def probe(self, method: Method, clock: Clock, measure: Measure) -> dict[str, float]:
        """Runs the probes that are due after `clock.done` batches, and returns their results for the log.

        Args:
            method: The current method.
            clock: The position in the run.
            measure: Runs a probe and returns its means over all tokens of the completions of its held-out prompts.
        """
        logged: dict[str, float] = {}
        for controller in method.controllers:
            probe, done = controller.probe, clock.done
            if probe is None or (done % probe.every if done else not probe.at_start):
                continue
            found = measure(probe, replace(clock, controller_outputs=self.controller_outputs(method)))
            self.states[controller.name] = controller.probed(self.states[controller.name], found)
            logged |= {f"probe/{controller.name}.{name}": value for name, value in found.items()}
        return logged

    def ended(self, method: Method) -> str | None:
        """The reason to end the run now; None to go on."""
        reasons = (controller.ended(self.states[controller.name]) for controller in method.controllers)
        return next((reason for reason in reasons if reason is not None), None)

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the present states."""
        states = dict(self.states)
        return lambda: self.states.update(states)

    def tensors(self) -> dict[str, Tensor]:
        """All states, flat."""
        return {f"{_PREFIX}{name}/{key}": x for name, state in self.states.items() for key, x in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts.

        Raises:
            UserError: The tensors are not of this method's controllers.
        """
        given = {name for name in tensors if name.startswith(_PREFIX)}
        if given != self.tensors().keys():
            wrong = sorted(given ^ self.tensors().keys())[0]
            raise UserError(f"the checkpoint is of a method with other controllers (state '{wrong}')")
        for name, state in self.states.items():
            self.states[name] = {key: tensors[f"{_PREFIX}{name}/{key}"] for key in state}
