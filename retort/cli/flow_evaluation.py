"""`retort eval` of a flow model: rewards of its samples, and the KL of its steps to a teacher's."""

from __future__ import annotations

from typing import Any

import torch

from retort.config import Config
from retort.core.rollouts import Prompt
from retort.core.trajectory import Noise
from retort.errors import UserError
from retort.evaluate.flows import FlowEvaluator
from retort.flows.load import is_flow, open_flow
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowSampling
from retort.rewards.samples import SampleGrader
from retort.teachers.flow import FlowTeacher, refuse_other_flow
from retort.train.events.observe import Observer
from retort.train.flows.checks import check_prompts
from retort.train.models.models import device_for, located


def is_flow_model(name: str) -> bool:
    """Whether a folder, a hub name or a built-in name is that of a flow model."""
    return is_flow(located(name))


def evaluate_flow(config: Config, model: str, prompts: list[Prompt], teacher: str | None, observer: Observer) -> Any:
    """The table of one flow model, in the form of `eval.json`.

    Args:
        config: The resolved configuration.
        model: Folder, hub name, or a built-in one such as `glyphs:student`.
        prompts: The prompts to evaluate on.
        teacher: A flow model with which denoising steps are compared.
        observer: Who watches.

    Raises:
        UserError: Nothing is measured, or a model cannot be opened.
    """
    flow = config.flow
    if not flow.rewards and teacher is None:
        raise UserError("nothing is measured: name rewards (flow.rewards=[...]), or compare with --teacher")
    grader = SampleGrader(flow.rewards) if flow.rewards else None
    if grader is not None:
        grader.check(prompts)
    own = _opened(config, model, "model")
    other = None if teacher is None else _opened(config, teacher, "teacher")
    if other is not None:
        refuse_other_flow(own, other)
    check_prompts({"model": own} if other is None else {"model": own, "teacher": other}, prompts)
    evaluator = FlowEvaluator(
        prompts,
        grader,
        samples=config.eval.samples,
        steps=flow.eval_steps,
        seed=config.seed,
        batch=flow.batch,
        sampling=FlowSampling(Noise(flow.sampler, flow.noise_level), flow.steps, None, None, flow.batch),
    )
    row = evaluator.evaluate(
        own,
        None if other is None else FlowTeacher(other, batch=flow.batch),
        lambda done, total: observer.phase("evaluating", done, total),
    )
    beside = ("pass_at", "by_domain", "kl_by_step", "samples")
    return {
        "k": evaluator.samples,
        "problems": len(prompts),
        "each": "sample",
        "seed": evaluator.seed,
        "rows": [{"who": model, **{name: cell for name, cell in row.items() if name not in beside}}],
        **{name: {model: row[name]} for name in ("pass_at", "by_domain", "kl_by_step") if name in row},
    }


def _opened(config: Config, name: str, role: str) -> FlowModel:
    device = device_for(config)
    made = open_flow(located(name), role=role, device=device, height=config.flow.height, width=config.flow.width)
    made.module.to(torch.device(device))
    precision = config.precision if config.precision != "auto" else ("bf16" if device == "cuda" else "fp32")
    return FlowModel(made, name, guidance=config.flow.guidance, precision=precision, frozen=True)
