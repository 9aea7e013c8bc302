"""The model card of a flow model after a run, as plain text, in which nothing acts as markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retort.train.output.card import code, front, plain_text, short, standing, table, versions

if TYPE_CHECKING:
    from retort.train.flows.prepare import FlowPrepared


def flow_card(prepared: FlowPrepared, results: Mapping[str, Any], step: int) -> str:
    """The card of the student after a run.

    Args:
        prepared: The parts of the run.
        results: The before/after table.
        step: Number of batches that the student learnt from.
    """
    method, config, student = prepared.method, prepared.config, prepared.student
    flow, optimizer = config.flow, config.optimizer
    settings = ", ".join(f"{name} = {value}" for name, value in method.settings.items())
    lines = [
        *front(student.library, ["on-policy-distillation", "flow-matching", "retort"], []),
        f"# {plain_text(short(student.name))}, distilled with {plain_text(method.name)}",
        "",
        "Trained by on-policy distillation with Retort: the student denoised, the teacher scored every step.",
        "",
        f"- student: {code(short(student.name))} ({student.parameters:,} weights)",
        *[
            f"- {plain_text(name)}: {code(short(model.name))}, frozen"
            for name, model in prepared.models.items()
            if name != "student"
        ],
        f"- method: {code(method.name)} ({plain_text(standing(method))})",
        f"- settings of the method: {plain_text(settings) or 'none'}",
        f"- denoising: {flow.steps} steps, sampler {code(flow.sampler)}, noise level {flow.noise_level:g}, guidance "
        f"{flow.guidance:g}; evaluated with {flow.eval_steps} steps without noise",
        f"- data: {code(short(str(config.data)))}, {len(prepared.source.prompts)} prompts",
        f"- training: {step} steps, each on {prepared.source.count} prompts x {method.rollout.samples} samples; AdamW, "
        f"learning rate {optimizer.learning_rate:g}, {optimizer.schedule} schedule, warm-up {optimizer.warmup}; seed "
        f"{config.seed}; fp32 master weights, {student.precision} products",
        f"- versions: {versions()}",
        "- licence: not known here; what those of student and teachers allow is for you to check",
        "",
        *table(results),
    ]
    return "\n".join(lines) + "\n"
