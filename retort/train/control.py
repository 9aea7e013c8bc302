"""The stateful parts of a run's method: their state, and when they are asked and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from retort.controllers import Controller, Probe, Seen, State
from retort.errors import UserError
from retort.rollout.single_turn import Task, write
from retort.sequences import TokenSequence
from retort.streams import generator, uniforms
from retort.teachers.local import answers
from retort.train.moment import Moment
from retort.train.score import Batch, averages
from retort.train.setup import Setup
from retort.train.write import given_rollout, horizon
from retort.types import Pack, Rollout

_PREFIX = "control/"


class Control:
    """States by the controllers' names. A method at hand without controllers leaves them all alone."""

    def __init__(self, setup: Setup) -> None:
        """The states before the first batch."""
        self.seed = setup.config.seed
        self.states: dict[str, State] = {}
        for controller in setup.method.controllers:
            self.states[controller.name] = controller.init(generator(self.seed, "controllers", controller.name))

    def readings(self, setup: Setup) -> dict[str, float]:
        """What dials read, by `<controller>.<number>`."""
        return {
            f"{controller.name}.{number}": value
            for controller in setup.method.controllers
            for number, value in controller.numbers(self.states[controller.name]).items()
        }

    def act(self, setup: Setup, batch: Batch) -> Batch:
        """Shows the batch to those that look at it, before it is learnt from; the batch with their new numbers."""
        controllers = setup.method.controllers
        self._seen = {}
        for controller in controllers:
            seen = self._look(setup, batch, controller)
            draw = generator(self.seed, "controllers", controller.name, batch.step)
            self.states[controller.name] = controller.act(self.states[controller.name], seen, draw)
            self._seen[controller.name] = seen
        if not controllers:
            return batch
        return replace(batch, moment=replace(batch.moment, readings=self.readings(setup)))

    def learn(self, setup: Setup, batch: Batch) -> None:
        """Tells them what became of the batch."""
        for controller in setup.method.controllers:
            again = controller.again and controller.sees
            after = averages(setup, batch, controller.sees, controller.against) if again else {}
            state = self.states[controller.name]
            self.states[controller.name] = controller.learn(state, self._seen[controller.name], after)

    def probe(self, setup: Setup, moment: Moment) -> dict[str, float]:
        """Makes the probes that are due after `moment.done` batches; what they found, to be logged."""
        logged: dict[str, float] = {}
        for controller in setup.method.controllers:
            probe, done = controller.probe, moment.done
            if probe is None or (done % probe.every if done else not probe.at_start):
                continue
            found = _measured(setup, probe, replace(moment, readings=self.readings(setup)))
            self.states[controller.name] = controller.probed(self.states[controller.name], found)
            logged |= {f"probe/{controller.name}.{name}": value for name, value in found.items()}
        return logged

    def ended(self, setup: Setup) -> str | None:
        """Why the run is to end now, if it is."""
        reasons = (controller.ended(self.states[controller.name]) for controller in setup.method.controllers)
        return next((reason for reason in reasons if reason is not None), None)

    def tensors(self) -> dict[str, Tensor]:
        """All states, flat."""
        return {f"{_PREFIX}{name}/{key}": x for name, state in self.states.items() for key, x in state.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts `tensors` back; those of others are not looked at.

        Raises:
            UserError: They are not those of this method's controllers.
        """
        given = {name for name in tensors if name.startswith(_PREFIX)}
        if given != self.tensors().keys():
            wrong = sorted(given ^ self.tensors().keys())[0]
            raise UserError(f"the checkpoint is of a method with other controllers (state '{wrong}')")
        for name, state in self.states.items():
            self.states[name] = {key: tensors[f"{_PREFIX}{name}/{key}"] for key in state}

    def _look(self, setup: Setup, batch: Batch, controller: Controller) -> Seen:
        now = batch.moment
        found = averages(setup, batch, controller.sees, controller.against) if controller.sees else {}
        rewards_R = batch.pack.reward_R
        return Seen(
            found,
            now.done,
            now.total,
            None if bool(rewards_R.isnan().any()) else rewards_R,
            torch.tensor([rollout.steps for rollout in batch.pack.rollouts]),
            setup.config.rollout.max_new_tokens,
        )


def _measured(setup: Setup, probe: Probe, moment: Moment) -> dict[str, float]:
    """A probe's means over all tokens of the answers to the prompts kept out for it."""
    prompts, longest = setup.probe[: probe.prompts], horizon(setup, moment)
    if probe.source == "dataset":
        limit = setup.config.rollout.max_new_tokens
        rollouts = [given_rollout(setup, prompt, 0, limit) for prompt in prompts]
    else:
        rollouts = _written(setup, probe, longest)
    pack, view = Pack.of(rollouts), probe.against
    needs = frozenset(need for part in probe.parts.values() for need in part.needs)
    views = {view: setup.method.views[view]} if needs else {}
    signals = answers(setup.teachers, views, pack, lambda _: needs, setup.method.temperature)
    return averages(setup, Batch(pack, signals, {}, (), moment), probe.parts, view)


def _written(setup: Setup, probe: Probe, longest: int) -> list[Rollout]:
    """The student's answers, always with the same luck."""
    plan, tasks = setup.method.rollout, list[Task]()
    for prompt in setup.probe[: probe.prompts]:
        chance = uniforms(setup.config.seed, "probe", prompt.id, count=longest)
        tasks.append(Task(prompt, TokenSequence.of(setup.render(prompt)), 0, chance))
    return write(setup.engine, tasks, max_new_tokens=longest, temperature=plan.temperature, top_p=plan.top_p)
