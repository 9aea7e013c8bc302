"""Passes of a flow model over the decided steps of trajectories. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from retort.core.definition import Values
from retort.core.gaussian import Gaussian as GaussianPolicy
from retort.core.rollouts import Pack
from retort.core.signals import Gaussian
from retort.errors import RunError, SignalError, UserError
from retort.flows.model import FlowModel
from retort.flows.steps import DecidedSteps, step_of
from retort.loss.latents import LatentPass
from retort.method import Method
from retort.train.learning.passes import Batch, Passes, fill
from retort.train.learning.rounds import Part, Round, not_finite_at
from retort.train.storage.metrics import Stopwatch

if TYPE_CHECKING:
    from retort.models.lm import LanguageModel


@dataclass(frozen=True, eq=False)
class FlowPasses(Passes):
    """Passes of a flow model; `lm` is the model.

    The learner asks its student for the parameters that learn and where they are, which both kinds have; all that reads
    a sequence is here.
    """

    @staticmethod
    def over(model: FlowModel, batch: int) -> FlowPasses:
        """The passes of a model.

        Args:
            model: The student.
            batch: Denoising steps per forward pass; a trajectory is never cut, so a longer one is a pass of its own.
        """
        return FlowPasses(cast("LanguageModel", model), vocab=0, batch_tokens=batch)

    @property
    def model(self) -> FlowModel:
        """The student."""
        return cast("FlowModel", self.lm)

    def micro_batches(self, pack: Pack, rollouts: Sequence[int]) -> list[list[int]]:
        """Splits rollouts, by their index in the pack, into passes."""
        found: list[list[int]] = []
        room = 0
        for place in pack.sequences_of(rollouts):
            steps = pack.sequences[place].steps
            if not found or steps > room:
                found.append([])
                room = self.batch_tokens
            found[-1].append(place)
            room -= steps
        return found

    def steps(self, pack: Pack, sequences: Sequence[int]) -> DecidedSteps:
        """The decided steps of some trajectories, on the model's device."""
        numbers = set(sequences)
        assert len(numbers) == len(sequences) and len(pack.sequences) == len(pack.rollouts)
        return DecidedSteps.of_rollouts([pack.rollouts[place] for place in sequences]).to(self.model.device)

    def latent_pass(self, batch: Batch, index_N: Tensor, steps: DecidedSteps) -> LatentPass:
        """The student's policy at some steps, with the teachers' signals about them."""
        mean, std_N = step_of(self.model, steps)
        signals: dict[str, Gaussian] = {}
        for name, signal in batch.signals.items():
            own = signal.select(batch.share.local(index_N))
            if not isinstance(own, Gaussian):
                raise SignalError(f"{own.source}: its signal is no Gaussian over latents, which this student decides")
            signals[name] = own.to(self.model.device)
            signals[name].check_decided(steps.decided_ND)
        return LatentPass(GaussianPolicy(mean.flatten(1), std_N, self.model.name), steps.decided_ND, signals)

    @torch.no_grad()
    def evaluate(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """A function of the context at every step of a batch, without gradient: named values, [N] each."""
        found: dict[str, Tensor] = {}
        for chosen in self.micro_batches(batch.pack, batch.share.own(range(len(batch.pack.rollouts)))):
            index_N = batch.pack.steps_in(chosen)
            one = self.latent_pass(batch, index_N, self.steps(batch.pack, chosen))
            rows = batch.steps.select(index_N).to(self.model.device)
            fill(found, batch.pack, chosen, one(values, rows, batch.clock, None)[1])
        return batch.share.columns(found, len(batch.pack))

    def top_ids(self, method: Method, pack: Pack, k: int) -> Tensor:
        """Refused: a denoising step has no ids.

        Raises:
            UserError: Always.
        """
        raise UserError(f"method '{method.name}' asks for the student's most likely ids, and latents have none")


class FlowRound(Round):
    """One pass with gradient over denoising steps, all at once: there is no head, and so no chunk."""

    def losses(self, every: Values, part: Part, own_part: Part, watch: Stopwatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Round`."""
        passes = cast("FlowPasses", self.passes)
        steps = passes.steps(self.batch.pack, self.own)
        rows = self.batch.steps.select(self.own_N).to(passes.model.device)
        with watch("student"):
            one = passes.latent_pass(self.batch, self.own_N, steps)
        if not one.policy.mean_ND.requires_grad:
            raise UserError(
                f"student {passes.model.name}: its velocity has no gradient; compute it without detach() and no_grad()"
            )
        with watch("loss"):
            loss, values = one(every, rows, self.batch.clock, lambda found, chosen: part(found, chosen)[0])
        assert loss is not None
        return loss, dict(values)

    def not_finite(self, values: Mapping[str, Tensor]) -> RunError:
        """The error for a loss that is not finite: it names the denoising step and the prompt."""
        batch = self.batch
        found = not_finite_at(batch, self.own, values)
        if found is None:
            return RunError(f"step {batch.clock.step + 1}: the loss is not finite; stopping before the update")
        term, _, step = found
        rollout = batch.pack.rollouts[int(batch.steps.rollout_N[step])]
        return RunError(
            f"step {batch.clock.step + 1}: term '{term}' is not finite at decision {int(batch.steps.position_N[step])} "
            f"of a trajectory of '{rollout.prompt.id}'; stopping before the update (a smaller learning rate, or a "
            "larger flow.noise_level, keeps the means apart from infinity)"
        )


def flow_rounds(passes: Passes, batch: Batch, rollouts: Sequence[int]) -> Iterator[Round]:
    """The passes with gradient over some rollouts of a batch."""
    for micro in passes.micro_batches(batch.pack, batch.share.own(rollouts)):
        yield FlowRound(passes, batch, micro)
