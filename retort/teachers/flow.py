"""Teachers of denoising steps: flow models, which score the student's own trajectories. Axis letters: `retort.core`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from retort.core.gaussian import Gaussian as GaussianPolicy
from retort.core.needs import Capability
from retort.core.rollouts import Group
from retort.core.signals import Gaussian
from retort.errors import UserError
from retort.flows.model import FlowModel
from retort.flows.steps import DecidedSteps, gaussian_of
from retort.teachers.base import ScoreRequest
from retort.teachers.view import View

#: Denoising steps whose noise levels two models must share.
_COMPARED = 10


class FlowTeacher:
    """The Gaussian of a flow model at every decided step of a trajectory, under the student's own prompt."""

    def __init__(self, model: FlowModel, *, batch: int) -> None:
        """Takes the model, and the number of steps per forward pass."""
        self.model, self.batch = model, batch

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        """See `Teacher`: what a Gaussian over latents meets."""
        return frozenset(GaussianPolicy.offers)

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> Gaussian:
        """See `Teacher`.

        Args:
            groups: Rollouts that are trajectories (`retort.core.trajectory`).
            request: The request; all of a Gaussian is returned whatever it needs.

        Raises:
            UserError: A view with a prompt of its own, or a rollout that decided tokens.
            SignalError: A mean is not finite.
        """
        refuse_other_prompts({self.name: request.view})
        steps = DecidedSteps.of_rollouts([rollout for group in groups for rollout in group])
        found = gaussian_of(self.model, steps, batch=self.batch)
        return Gaussian.of(found.mean_ND, found.std_N, steps.decided_ND.cpu(), source=self.name)


def refuse_other_prompts(views: Mapping[str, View]) -> None:
    """Refuses views of which a flow model cannot make anything: all but that of the student's own prompt.

    Args:
        views: The views, by name.

    Raises:
        UserError: One renders a prompt of its own, shows columns, texts or images, or leaves rollouts out.
    """
    for name, view in views.items():
        own = View(model=view.model, weights=view.weights, rewards=view.rewards, by_step=view.by_step)
        if view != own:
            raise UserError(
                f"view '{name}': a flow model reads the student's own prompt and no other one; choose a method without "
                "a view that renders a prompt, such as flow_opd, gkd or opd"
            )


def refuse_other_flow(student: FlowModel, teacher: FlowModel) -> None:
    """Refuses two models whose steps cannot be compared.

    Raises:
        UserError: They differ in architecture, latents or schedule; the line shows both.
    """
    own, other = student.of.identity, teacher.of.identity
    for name in dict.fromkeys([*own, *other]):
        mine, theirs = own.get(name, "none"), other.get(name, "none")
        if mine != theirs:
            raise UserError(
                f"{teacher.name} cannot teach {student.name}: its {name} is {theirs}, the student's is {mine}; step by "
                "step only models of one architecture and one schedule can be compared"
            )
    if student.of.latent_shape != teacher.of.latent_shape:
        raise UserError(
            f"{teacher.name} cannot teach {student.name}: its latents have shape {teacher.of.latent_shape}, the "
            f"student's {student.of.latent_shape}; give both the same height and width"
        )
    mine, theirs = student.sigmas(_COMPARED), teacher.sigmas(_COMPARED)
    if not torch.allclose(mine, theirs, rtol=0.0, atol=1e-6):
        step = int((mine - theirs).abs().argmax())
        raise UserError(
            f"{teacher.name} cannot teach {student.name}: of {_COMPARED} steps, step {step + 1} is at noise level "
            f"{float(theirs[step]):g}, the student's at {float(mine[step]):g}; step by step only models of one "
            "schedule can be compared"
        )
