"""Evaluating a flow model on fixed prompts. Axis letters: see `retort.core`.

Noise is keyed by prompt and member only, so that the pictures of all models start from the same noise, and a prompt's
picture is the same whenever it is made. Samples are made without noise on the way. The KL to the teacher is that of
denoising steps, so it is measured on a few trajectories with noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from retort.core.images import PromptImage
from retort.core.needs import GAUSSIAN, can_meet
from retort.core.rollouts import Prompt, Rollout, in_groups
from retort.errors import UserError
from retort.evaluate.measures import bounds
from retort.evaluate.passk import Estimate
from retort.evaluate.rewarded import of_parts, of_rewards, tally_parts
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowRequest, FlowSampling, decoded, denoise, samples
from retort.flows.steps import DecidedSteps, gaussian_of
from retort.ranks import here
from retort.rewards.base import Grade
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.view import View

__all__ = ["FlowEvaluator", "GradesSamples", "ModelOf"]

#: Prompts of which images are kept, and images of each.
_PICTURED, _EACH = 12, 2
#: Most points that are kept of samples in a plane.
_POINTS = 2000
#: Most prompts on whose trajectories the KL is measured.
_TRAJECTORIES = 32
#: Longest side of an image that is kept, pixels.
_LONGEST = 256

#: Names the model that makes the samples of a prompt.
ModelOf = Callable[[Prompt], FlowModel]


class GradesSamples(Protocol):
    """Grades samples of flow models."""

    def grade(self, samples: Tensor, prompts: Sequence[Prompt]) -> Sequence[Grade]:
        """The grade of each sample.

        Args:
            samples: [n, ...]: images [n, 3, H, W] from 0 to 1, or points [n, 2].
            prompts: The prompt of each.
        """
        ...


@dataclass(frozen=True)
class _Sample:
    """A sample of which the numbers are kept; the sample itself only where somebody looks at it."""

    prompt: Prompt
    member: int
    grade: Grade | None
    shown: PromptImage | list[float] | None

    def plain(self) -> dict[str, Any]:
        """For a report."""
        kind = "image" if isinstance(self.shown, PromptImage) else "point"
        return {
            "prompt": self.prompt.id,
            "text": self.prompt.text,
            "domain": self.prompt.domain,
            "member": self.member,
            "rewards": {} if self.grade is None else dict(self.grade.parts),
            kind: self.shown,
        }


@dataclass(frozen=True, eq=False)
class FlowEvaluator:
    """Evaluates flow models on fixed prompts.

    Attributes:
        prompts: The held-out prompts.
        grader: Grades samples; None where nothing does.
        samples: k, samples per prompt.
        steps: Denoising steps of a sample, without noise.
        seed: The seed of the run.
        batch: Latents per forward pass.
        sampling: How the trajectories are generated on which the KL is measured; its window is left aside, so that the
            KL is known of every step that may add noise.
    """

    prompts: Sequence[Prompt]
    grader: GradesSamples | None
    _: KW_ONLY
    samples: int
    steps: int
    seed: int
    batch: int
    sampling: FlowSampling

    def evaluate(
        self,
        model: FlowModel | ModelOf,
        teacher: Teacher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Computes one row of the before/after table.

        Args:
            model: The model that is evaluated; or for each prompt one, as experts have their prompts.
            teacher: The teacher that its denoising steps are compared with, such as a routed one.
            progress: Called with prompts done (at first 0) and prompts in all.

        Returns:
            Estimates with value, low and high, as `Evaluator.evaluate` has them: `avg@k` and `pass@k` of the rewards,
            `reward/<name>` of each part of the grades, and against a teacher `reverse_kl`, nats per denoising step.
            Besides: `pass_at`, pass@j for j = 1, 2, 4, ...; `by_domain`, the estimates of all parts by the domain of
            the prompts; `kl_by_step`, the KL to the teacher at each step that may add noise, nats, in order; and
            `samples`, a row for each sample that is kept, with `prompt` (its id), `text`, `domain`, `member`,
            `rewards`, and either `image` (a `PromptImage`; of the first 12 prompts' first two) or `point`.

        Raises:
            RunError: The model has diverged.
            UserError: Samples are images, and Pillow is missing.
        """
        chosen: ModelOf = (lambda _: model) if isinstance(model, FlowModel) else model
        made: list[_Sample] = []
        block = max(1, self.batch // self.samples)
        if progress is not None:
            progress(0, len(self.prompts))
        for start in range(0, len(self.prompts), block):
            some = range(len(self.prompts))[start : start + block]
            made += here().divide(some, lambda own: self._made(chosen, own), key=lambda index: index)
            if progress is not None:
                progress(some.stop, len(self.prompts))
        row = self._rewarded(made)
        if teacher is not None and can_meet(teacher.capabilities, GAUSSIAN):
            row |= self._against(chosen, teacher)
        shown = [one.plain() for one in made if one.shown is not None]
        return {**row, "samples": shown} if shown else row

    def graded(self) -> dict[str, int]:
        """As `Evaluator.graded`: a grader of samples grades all prompts."""
        return {}

    def _made(self, chosen: ModelOf, indices: Sequence[int]) -> list[_Sample]:
        """The samples of some prompts, graded."""
        rows = [(index, member) for index in indices for member in range(self.samples)]
        if not rows:
            return []
        found: dict[int, Tensor] = {}
        for model, own in _by_model(chosen, [self.prompts[index] for index, _ in rows]):
            requests = [self._request(self.prompts[rows[number][0]], rows[number][1]) for number in own]
            latents = samples(model, requests, steps=self.steps, batch=self.batch)
            found |= dict(zip(own, decoded(model, latents, batch=self.batch), strict=True))
        whole = torch.stack([found[number] for number in range(len(rows))])
        asked = [self.prompts[index] for index, _ in rows]
        grades = [None] * len(rows) if self.grader is None else self.grader.grade(whole, asked)
        return [
            _Sample(self.prompts[index], member, grade, self._shown(index, member, own))
            for (index, member), grade, own in zip(rows, grades, whole, strict=True)
        ]

    def _request(self, prompt: Prompt, member: int) -> FlowRequest:
        return FlowRequest(
            prompt.text, (self.seed, "evaluation", prompt.id, member), (self.seed, "evaluation", prompt.id)
        )

    def _shown(self, index: int, member: int, sample: Tensor) -> PromptImage | list[float] | None:
        """What a report shows of a sample: a point's coordinates, or an image in grey or colours; None for nothing."""
        if sample.ndim == 1:
            most = max(1, _POINTS // len(self.prompts))
            return [round(float(one), 4) for one in sample] if index < _POINTS and member < most else None
        is_image = sample.ndim == 3 and len(sample) in (1, 3)
        return _image(sample) if is_image and index < _PICTURED and member < _EACH else None

    def _rewarded(self, made: Sequence[_Sample]) -> dict[str, Any]:
        """The estimates of rewards and their parts, over prompts."""
        rewards: list[list[float]] = []
        parts: dict[str, list[float]] = {}
        by_domain: dict[str, dict[str, list[float]]] = {}
        for start in range(0, len(made), self.samples):
            own = [one.grade for one in made[start : start + self.samples] if one.grade is not None]
            if own:
                rewards.append([grade.reward for grade in own])
            for table in (parts, by_domain.setdefault(made[start].prompt.domain, {})):
                tally_parts(table, [grade.parts for grade in own])
        row = {**of_rewards(rewards, self.samples), **of_parts(parts)}
        found = {name: cell.plain() if isinstance(cell, Estimate) else cell for name, cell in row.items()}
        matrix = {domain: _named(of_parts(own)) for domain, own in by_domain.items() if own and domain}
        return {**found, "by_domain": matrix} if matrix else found

    def _against(self, chosen: ModelOf, teacher: Teacher) -> dict[str, Any]:
        """The KL of denoising steps to the teacher's, on one trajectory for each of some prompts."""
        sampling = replace(self.sampling, window=None, window_end=None)
        asked = list(self.prompts)[:: max(1, -(-len(self.prompts) // _TRAJECTORIES))]
        sums: list[float] = []
        by_step = torch.zeros(sampling.steps - 1, dtype=torch.float64)
        for model, own in _by_model(chosen, asked):
            paths = denoise(model, [self._request(asked[number], 0) for number in own], sampling)
            rollouts = [Rollout(asked[number], (path,)) for number, path in zip(own, paths, strict=True)]
            steps = DecidedSteps.of_rollouts(rollouts)
            signal = teacher.score(in_groups(rollouts), ScoreRequest(View(), frozenset({GAUSSIAN})))
            rows = signal.select(torch.arange(len(steps))).rows(slice(None))
            kl_N = gaussian_of(model, steps, batch=self.batch).reverse_kl(rows.policy)
            kl_each = kl_N.reshape(len(rollouts), -1)  # every trajectory decides the same steps
            sums += [float(one) for one in kl_each.sum(1)]
            by_step += kl_each.sum(0)
        found = Estimate.ratio(sums, [float(len(by_step))] * len(sums))
        plain = None if found is None else found.within(*bounds("reverse_kl")).plain()
        return {"reverse_kl": plain, "kl_by_step": [float(one) / len(sums) for one in by_step]}


def _by_model(chosen: ModelOf, prompts: Sequence[Prompt]) -> list[tuple[FlowModel, list[int]]]:
    """The models of some prompts, each with the indices of its own."""
    found: dict[int, tuple[FlowModel, list[int]]] = {}
    for index, prompt in enumerate(prompts):
        model = chosen(prompt)
        found.setdefault(id(model), (model, []))[1].append(index)
    return list(found.values())


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("reward/"): cell for name, cell in row.items()}


def _image(sample: Tensor) -> PromptImage:
    """A small image of a sample [3, H, W] from 0 to 1.

    Raises:
        UserError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures of samples need Pillow: pip install 'retort-distill[vision]'") from None
    bytes_HW3 = (sample.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    image = Image.fromarray(bytes_HW3.contiguous().numpy())
    image.thumbnail((_LONGEST, _LONGEST))
    return PromptImage.of(image)
