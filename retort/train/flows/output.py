"""What runs leave behind whose student decides denoising steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from retort.config import Config
from retort.core.needs import Need
from retort.core.random_streams import permutation
from retort.core.signals import TeacherSignal
from retort.core.trajectory import Trajectory
from retort.data import fingerprint
from retort.errors import RunError, UserError
from retort.files import disk_full, new_folder, reason, write_text
from retort.flows.lora import save_adapter
from retort.loss.terms import wanted
from retort.train.flows.card import flow_card
from retort.train.flows.evaluations import FlowEvaluations
from retort.train.flows.prepare import FlowPrepared
from retort.train.learning.passes import Batch
from retort.train.output.card import standing
from retort.train.output.identity import compare, settings_of, versions_now
from retort.train.output.record import rollout_metrics, view_metrics
from retort.train.storage.checkpoint import Found

#: Name of an adapter's folder, beside that of the model.
ADAPTER = "adapter"


@dataclass(frozen=True, eq=False)
class FlowOutput:
    """See `retort.train.output.base.Output`.

    Attributes:
        prepared: The parts of the run.
        decides: See `Output`.
        example: See `Output`.
    """

    prepared: FlowPrepared
    decides: str = "denoising_steps"
    example: str = "model"

    def with_config(self, config: Config) -> FlowOutput:
        """See `Output`."""
        return FlowOutput(replace(self.prepared, config=config))

    def identity(self) -> dict[str, Any]:
        """See `Output`."""
        prepared = self.prepared
        digests = {f"the {name}'s weights": model.digest() for name, model in prepared.models.items()}
        digests |= {f"the {name}'s schedule": _words(model.of.identity) for name, model in prepared.models.items()}
        digests["the held-out prompts"] = fingerprint(prepared.held_out)
        return {
            "settings": settings_of(prepared.config, prepared.method),
            "digests": digests,
            "versions": versions_now(),
        }

    def state(self, best: tuple[float, int] | None, advised: Collection[str], identity: Mapping[str, Any]) -> Any:
        """See `Output`."""
        prepared = self.prepared
        return {
            "best": best,
            "data": fingerprint(prepared.source.prompts),
            "models": {name: model.digest() for name, model in prepared.models.items() if name != "student"},
            "remote": {},
            "start": None,
            "precision": prepared.student.precision,
            "advised": sorted(advised),
            "run": identity,
        }

    def refuse_other_run(
        self, path: Path, found: Found, identity: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        """See `Output`."""
        prepared, then = self.prepared, found.state
        if then["data"] != fingerprint(prepared.source.prompts):
            raise UserError(
                f"{path}: the training data changed since this checkpoint; resume with the data it was made with"
            )
        if then["precision"] != prepared.student.precision:
            raise UserError(
                f"{path}: it was made with precision = {then['precision']}, not {prepared.student.precision}; put "
                "precision back in the run's config.json"
            )
        shapes = {name: own.shape for name, own in prepared.student.trainable().items()}
        if shapes != found.weights.shapes:
            raise UserError(
                f"{path}: the student {prepared.student.name} is another model than the one it was made with"
            )
        compare(path, then, identity, path.parents[1], note)

    def summary(self) -> dict[str, str]:
        """See `Output`."""
        prepared = self.prepared
        method, config, source, student = prepared.method, prepared.config, prepared.source, prepared.student
        flow, learning = config.flow, sum(own.numel() for own in student.trainable().values())
        updates = min(config.optimizer.updates, source.count * method.rollout.samples) * config.optimizer.epochs
        guided = "" if flow.guidance == 1 else f", guidance {flow.guidance:g}"
        windowed = "all but the last" if flow.window is None else f"{flow.window} neighbours"
        needs = {
            view: ", ".join(map(_asked, sorted(wanted(method, view, teacher.capabilities))))
            for view, teacher in prepared.teachers.behind(method).items()
        }
        return {
            "student": f"{student.name}, {student.parameters:,} weights, of which {learning:,} learn",
            **{
                name: f"{model.name}, {model.parameters:,} weights, frozen"
                for name, model in prepared.models.items()
                if name != "student"
            },
            "method": f"{method.name} ({standing(method)})",
            "settings": ", ".join(f"{name} = {value}" for name, value in method.settings.items()),
            **{f"asked of {view}": text for view, text in needs.items()},
            "denoising": f"{flow.steps} steps, decided: {windowed}; sampler {flow.sampler}, noise level "
            f"{flow.noise_level:g}{guided}; evaluated with {flow.eval_steps} steps without noise",
            "data": f"{config.data}: {len(source.prompts):,} prompts to learn from, {len(prepared.held_out)} held out",
            "rewards": ", ".join(flow.rewards) or "none",
            "batch": f"{source.count} prompts x {method.rollout.samples} samples, {updates} optimizer steps",
            "run": f"{prepared.steps} steps (batches), learning rate {config.optimizer.learning_rate:g}, "
            f"{config.optimizer.schedule} schedule, {student.precision} on {student.device.type}, seed {config.seed}",
        }

    def evaluations(self, folder: Path, check: Callable[[], None]) -> FlowEvaluations:
        """See `Output`."""
        return FlowEvaluations(self.prepared, folder, check)

    def record(self, batch: Batch, values: Mapping[str, Tensor], step: int, folder: Path) -> list[dict[str, Any]]:
        """See `Output`: what was decided is not kept, but what was computed of each decision."""
        pack, count = batch.pack, self.prepared.config.record.rollouts
        chosen = permutation(batch.clock.seed, "record", step, count=len(pack.rollouts))[:count]
        found: list[dict[str, Any]] = []
        for index in sorted(chosen):
            rollout, index_A = pack.rollouts[index], pack.steps_of([index])
            path = cast("Trajectory", rollout.sequence)
            columns = {name.removeprefix("watch."): values_N[index_A] for name, values_N in values.items()}
            found.append(
                {
                    "step": step,
                    "prompt_id": rollout.prompt.id,
                    "prompt": rollout.prompt.readable,
                    "domain": rollout.prompt.domain,
                    "member": rollout.member,
                    "reward": rollout.reward,
                    "rewards": dict(rollout.reward_parts),
                    "sigmas": [round(float(sigma), 6) for sigma in path.sigmas_L[path.from_A]],
                    "columns": {name: [_short(x) for x in own.tolist()] for name, own in columns.items()},
                }
            )
        return found

    def metrics(
        self,
        batch: Batch,
        values: Mapping[str, Tensor],
        signals: Mapping[str, TeacherSignal],
        version: int,
        given_up: int,
    ) -> dict[str, float]:
        """See `Output`: rewards, the teachers' shares, and the KL at each denoising step, counted from 1."""
        found = rollout_metrics(batch, version) | view_metrics(signals, batch.method.views, len(batch.pack.rollouts))
        found = {name: value for name, value in found.items() if name not in ("length", "truncated_fraction")}
        place_N = torch.cat([cast("Trajectory", own.sequence).from_A for own in batch.pack.rollouts])
        kl_N = values.get("watch.reverse_kl", torch.empty(0))
        for place in range(self.prepared.source.limit if len(kl_N) else 0):
            own_N = kl_N[place_N == place].double()
            if len(own_N):
                found[f"reverse_kl/step-{place + 1}"] = float(own_N.mean())
        return found

    def save_model(self, folder: Path, results: Mapping[str, Any], step: int, check: Callable[[], None]) -> None:
        """See `Output`: a folder that `retort train` opens again, of a diffusers pipeline a whole one."""
        check()
        student = self.prepared.student
        try:
            if student.adapter is not None:
                with new_folder(folder.with_name(ADAPTER)) as temporary:
                    save_adapter(student.adapter, temporary)
            with new_folder(folder) as temporary:
                student.save(temporary)
                write_text(temporary / "README.md", flow_card(self.prepared, results, step))
        except Exception as error:
            if not isinstance(error, OSError | SafetensorError) and not disk_full(error):
                raise
            raise RunError(f"cannot write {folder}: {reason(error)}; the last checkpoint is intact") from None


def _words(identity: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in sorted(identity.items()))


def _asked(need: Need) -> str:
    """What is asked of a teacher, in the words of denoising steps."""
    return str(need).replace("the sampled token", "the next latent")


def _short(value: float) -> float | str | None:
    """A number with six digits; a word for infinity, which JSON has not."""
    if math.isnan(value):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else ("inf" if value > 0 else "-inf")
