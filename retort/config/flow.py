"""Settings of runs in which a flow model decides denoising steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from retort.config.sections import Section


class FlowSection(Section):
    """Denoising steps of a student that is a flow model (docs/flow.md); text students read none of it."""

    sampler: Literal["sde", "cps", "dance_sde"] = Field(
        default="sde", description="how a step adds noise: as in Flow-GRPO (sde), in CPS or in DanceGRPO (dance_sde)"
    )
    noise_level: float = Field(
        default=0.7, gt=0, description="the sampler's own factor: a of sde and of cps (at most 1), eta of dance_sde"
    )
    steps: int = Field(default=10, ge=2, description="denoising steps of a rollout")
    eval_steps: int = Field(default=40, ge=1, description="denoising steps of an evaluation, without noise")
    window: int | None = Field(
        default=None,
        ge=1,
        description="add noise at, and learn, only so many neighbouring steps, drawn anew for each visit to a prompt; "
        "the others are computed without noise. default: all steps but the last",
    )
    window_end: int | None = Field(
        default=None, ge=1, description="the window lies within the first so many steps; default: all but the last"
    )
    guidance: float = Field(
        default=1.0,
        ge=0,
        description="scale of classifier-free guidance, the same for student and teachers; 1: none",
    )
    height: int | None = Field(default=None, ge=8, description="height of images, pixels; default: the pipeline's own")
    width: int | None = Field(default=None, ge=8, description="width of images, pixels; default: the pipeline's own")
    batch: int = Field(default=64, ge=1, description="latents per forward pass")
    rewards: list[str] = Field(
        default_factory=list[str],
        description="what is measured of the samples, by name (docs/flow.md) or as module:function; the reward of a "
        "sample is the one that its prompt's domain names, or else their mean",
    )
    start: Literal["student", "merge", "merge_products"] = Field(
        default="student",
        description="the weights that the student begins with: its own; or the mean of its teachers', of LoRA adapters "
        "factor by factor (merge) or of their products (merge_products)",
    )
