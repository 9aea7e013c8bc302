"""From noise to data: trajectories of decided steps, and samples without noise. Axis letters: see `retort.core`.

Every draw is keyed by the request alone: its first state and the noise of each step are the same whatever else is in
the batch, and whichever model denoises. What a model makes of them differs between batches by the rounding of its
products, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retort.core.random_streams import Stream, generator, uniforms
from retort.core.trajectory import Noise, Trajectory
from retort.errors import RunError, UserError, quoted
from retort.flows.model import FlowModel
from retort.flows.samplers import denoising_step

#: Key of a draw: seed, stream, and parts such as the prompt and the member.
Key = tuple[int, Stream, *tuple[str | int, ...]]


@dataclass(frozen=True)
class FlowSampling:
    """How trajectories are generated.

    Attributes:
        noise: Sampler and noise level of the steps that add noise; the second sigma is the model's, not read here.
        steps: Denoising steps; the last one never adds noise.
        window: Number of neighbouring steps that add noise and are decided; None: all but the last.
        window_end: The window lies within the first so many steps; None: within all but the last.
        batch: Latents per forward pass.

    Raises:
        UserError: An unknown sampler, a noise level out of its range, or a window that does not fit into the steps.

    Example:
        >>> from retort.flows import Noise
        >>> from retort.flows.sampling import FlowSampling
        >>> sampling = FlowSampling(Noise("cps", 0.8), steps=10, window=3, window_end=5, batch=8)
        >>> sampling.decided((0, "rollouts", "a prompt", 0))  # three of the first five
        range(0, 3)
    """

    noise: Noise
    steps: int
    window: int | None
    window_end: int | None
    batch: int

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"flow.steps = {self.steps}: the last step adds no noise, so give 2 or more")
        if self.batch < 1:
            raise UserError(f"flow.batch = {self.batch}: give 1 or more")
        one, middle = torch.zeros(1, 1), torch.tensor([0.5])
        denoising_step(self.noise.sampler, one, one, middle, middle / 2, self.noise.level)
        if self.window is None and self.window_end is not None:
            raise UserError(f"flow.window_end = {self.window_end} without flow.window: give the window's length, too")
        if self._end > self.steps - 1:
            raise UserError(
                f"flow.window_end = {self._end}: of flow.steps = {self.steps} only the first {self.steps - 1} add noise"
            )
        if not 1 <= self._length <= self._end:
            raise UserError(
                f"flow.window = {self._length} does not fit into the first {self._end} of flow.steps = {self.steps}; "
                f"give 1 to {self._end}"
            )

    def decided(self, key: Key) -> range:
        """The steps that add noise and are decided, counted from 0, under the key of a window."""
        begins = self._end - self._length + 1
        start = int(uniforms(*key, "window", count=1) * begins)
        return range(start, start + self._length)

    @property
    def _end(self) -> int:
        return self.steps - 1 if self.window_end is None else self.window_end

    @property
    def _length(self) -> int:
        return self._end if self.window is None else self.window


@dataclass(frozen=True)
class FlowRequest:
    """One sample that is asked for.

    Attributes:
        text: The prompt.
        noise: Key of its noise. Requests with the same key start from the same first state.
        window: Key of its window, which the requests of a group share.
    """

    text: str
    noise: Key
    window: Key


@torch.no_grad()
def denoise(model: FlowModel, requests: Sequence[FlowRequest], sampling: FlowSampling) -> list[Trajectory]:
    """Takes each request from noise to data by steps that add noise, which are its decisions.

    Steps outside of the window, and the last one, are Euler steps `x + v d` without noise, and no decisions.

    Args:
        model: Predicts the velocities. No gradient is kept.
        requests: What is asked for, in any number.
        sampling: How.

    Returns:
        A trajectory for each request, in order, on the CPU. Latents are fp32, under a model in float64 float64.

    Raises:
        RunError: A latent is not finite: the model has diverged.
    """
    sigmas_L = model.sigmas(sampling.steps)
    noise = replace(sampling.noise, sigma_max=float(sigmas_L[1]))
    found: list[Trajectory] = []
    for own in _batches(requests, sampling.batch):
        windows = [sampling.decided(request.window) for request in own]
        states = [_first_states(model, own)]
        for step in range(sampling.steps):
            states.append(_next_states(model, own, states[-1], sigmas_L, step, windows, noise))
        states = [state.cpu() for state in states]
        for row, window in enumerate(windows):
            decided = torch.tensor([step in window for step in range(sampling.steps)])
            latents = torch.stack([state[row] for state in states])
            found.append(Trajectory.of_states(latents, sigmas_L, decided, noise))
    return found


@torch.no_grad()
def samples(model: FlowModel, requests: Sequence[FlowRequest], *, steps: int, batch: int) -> Tensor:
    """Takes each request from noise to data without noise on the way, by Euler steps.

    Args:
        model: As in `denoise`.
        requests: As there; the keys of windows are not read.
        steps: Denoising steps.
        batch: Latents per forward pass.

    Returns:
        The last latents, [n, ...], on the CPU.

    Raises:
        RunError: As `denoise`.
    """
    sigmas_L = model.sigmas(steps)
    found: list[Tensor] = []
    for own in _batches(requests, batch):
        latents = _first_states(model, own)
        for step in range(steps):
            latents = _next_states(model, own, latents, sigmas_L, step)
        found.append(latents.cpu())
    return torch.cat(found) if found else torch.empty(0, *model.of.latent_shape)


@torch.no_grad()
def decoded(model: FlowModel, latents: Tensor, *, batch: int) -> Tensor:
    """Samples out of latents without noise, fp32, on the CPU: images [n, 3, H, W] from 0 to 1, or whatever it makes.

    Args:
        model: Whose latents they are.
        latents: [n, ...], n at least 1.
        batch: Latents that are decoded at once.

    Raises:
        UserError: The model gives no sample for each.
    """
    parts = [latents[start : start + batch].to(model.device) for start in range(0, len(latents), batch)]
    found: list[Tensor] = []
    for own in parts:
        made: Any = model.of.decoded(own)  # a caller's own, whatever its types say
        if not isinstance(made, Tensor) or made.shape[:1] != own.shape[:1]:
            what = tuple(made.shape) if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise UserError(
                f"{model.name}: its decoded of {len(own)} latents must be a tensor [{len(own)}, ...], not {what}"
            )
        found.append(made.float().cpu())
    return torch.cat(found)


def _batches(requests: Sequence[FlowRequest], batch: int) -> Iterator[Sequence[FlowRequest]]:
    for start in range(0, len(requests), batch):
        yield requests[start : start + batch]


def _first_states(model: FlowModel, requests: Sequence[FlowRequest]) -> Tensor:
    """The first states, [n, ...], on the model's device."""
    drawn = torch.stack([_normal(model, request) for request in requests])
    return drawn.to(model.device, model.dtype)


def _normal(model: FlowModel, request: FlowRequest, *parts: str | int) -> Tensor:
    """Standard normal numbers of one latent. They are drawn in fp32 whatever the model is in, so they are the same."""
    return torch.randn(model.of.latent_shape, generator=generator(*request.noise, *parts), dtype=torch.float32)


def _next_states(
    model: FlowModel,
    requests: Sequence[FlowRequest],
    latents: Tensor,
    sigmas_L: Tensor,
    step: int,
    windows: Sequence[range] = (),
    noise: Noise | None = None,
) -> Tensor:
    """The states after a step, [n, ...]: with noise where it lies in a request's window, else without.

    Args:
        model: Predicts the velocities.
        requests: What is asked for.
        latents: Their states before.
        sigmas_L: Noise levels of all states.
        step: Index of the step.
        windows: The decided steps of each request; none where nothing is decided.
        noise: How decided steps add noise.
    """
    sigma_N, next_N = (sigmas_L[at].expand(len(latents)) for at in (step, step + 1))
    v = model.velocity(latents, sigma_N, [request.text for request in requests])
    found = latents + v * float(sigmas_L[step + 1] - sigmas_L[step])
    rows = [row for row, window in enumerate(windows) if step in window]
    if rows and noise is not None:
        at = torch.tensor(rows)
        moved = denoising_step(
            noise.sampler, v[rows], latents[rows], sigma_N[at], next_N[at], noise.level, sigma_max=noise.sigma_max
        )
        drawn = torch.stack([_normal(model, requests[row], "step", step) for row in rows]).to(found)
        found[rows] = moved.mean + moved.std_N.reshape(-1, *(1 for _ in model.of.latent_shape)) * drawn
    finite = found.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        text = quoted(requests[int((~finite).nonzero()[0])].text)
        why = (
            "it does not learn here, so its weights are broken, or flow.guidance is far too large"
            if model.frozen
            else "the model has diverged: start again from an earlier checkpoint with a smaller learning rate"
        )
        raise RunError(
            f"{model.name}: latents of prompt {text} are not finite after step {step + 1} of {len(sigmas_L) - 1}; {why}"
        )
    return found
