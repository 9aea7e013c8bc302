"""From a configuration to the parties of a run whose student decides denoising steps, with every check before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retort import registry
from retort.config import Config
from retort.config.flow import FlowSection
from retort.core.rollouts import Prompt
from retort.core.trajectory import Noise
from retort.errors import UserError
from retort.flows.load import is_adapter, is_flow, open_flow
from retort.flows.lora import ATTENTION, add_lora
from retort.flows.merging import merged_start
from retort.flows.model import FlowModel
from retort.flows.sampling import FlowSampling
from retort.loss.latents import for_latents
from retort.method import Method
from retort.ranks import here
from retort.rewards.samples import SampleGrader
from retort.rollout.plan import RolloutPlan
from retort.teachers.flow import FlowTeacher, refuse_other_flow, refuse_other_prompts
from retort.train.events import tracking
from retort.train.flows.checks import check_learns, check_prompts
from retort.train.flows.cold_start import Examples, maker, with_examples
from retort.train.flows.passes import FlowPasses, flow_rounds
from retort.train.flows.settings import own_settings
from retort.train.flows.source import FlowSource
from retort.train.given.given import CallerObjects
from retort.train.learning.learner import Learner
from retort.train.models.models import device_for, located
from retort.train.models.several import several
from retort.train.setup import pair
from retort.train.setup.before import batch_prompts, fit_steps, paper_settings, step_count
from retort.train.setup.phases import Phased
from retort.train.setup.prompts import read_prompts
from retort.train.teaching.teachers import Teachers

#: Built-in data whose models are flows.
FLOW_DATA = ("plane", "glyphs")


@dataclass(frozen=True, eq=False)
class FlowPrepared(Phased):
    """The parts of a run before its first step; `retort.train.output.base.Parts` describes them.

    Attributes:
        config: The resolved configuration.
        method: The method.
        source: Generates the trajectories.
        teachers: Score them.
        learner: Trains the student.
        held_out: Prompts for evaluation.
        grader: Grades samples, where rewards are named.
        models: Every model by name, the student first.
        notes: Notes for the user before the run starts.
    """

    config: Config
    method: Method
    source: FlowSource
    teachers: Teachers
    learner: Learner
    held_out: Sequence[Prompt]
    grader: SampleGrader | None
    models: Mapping[str, FlowModel]
    notes: list[str] = field(default_factory=list)
    attention: None = None

    @property
    def student(self) -> FlowModel:
        """The model that learns."""
        return self.models["student"]

    @property
    def batches(self) -> FlowSource:
        """Gives the trajectories batch by batch: the source, in this process."""
        return self.source

    @property
    def steps(self) -> int:
        """Number of batches of trajectories in the run."""
        return step_count(self.config, len(self.source.prompts))

    def spread(self, say: Callable[[str], None]) -> None:
        """A flow model learns in one process."""

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Asks no model in words, and keeps nothing."""

    def begin(self, say: Callable[[str], None]) -> None:
        """Starts nothing: trajectories are made in this process."""

    def close(self) -> None:
        """Has started nothing."""

    def metrics(self) -> dict[str, float]:
        """Numbers of a step that the teachers counted."""
        return self.teachers.metrics()

    def difficulties(
        self, plan: RolloutPlan, folder: Path, *, first: bool, progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """Refused: prompts are shuffled.

        Raises:
            UserError: Always.
        """
        raise UserError("prompts are ordered by how hard they are for students of text only; switch the order off")


def decides_latents(config: Config, method: Method | None, caller_objects: CallerObjects) -> bool:
    """Whether the student of a run is a flow model: given as an object, in a folder, or asked for by the settings.

    Args:
        config: The resolved configuration.
        method: The caller's own method, if there is one.
        caller_objects: The objects behind placeholders.
    """
    name = config.student
    if name is None:
        return False
    if caller_objects.source(name) is not None or caller_objects.flow(name) is not None:
        return caller_objects.flow(name) is not None
    place = located(name)
    if Path(place).exists():
        return is_flow(place)
    return config.flow != FlowSection() or (method or registry.load(**config.method)).needs_latents


def prepare_flow(config: Config, method: Method | None, caller_objects: CallerObjects) -> FlowPrepared:
    """Loads and checks everything.

    Args:
        config: The resolved configuration.
        method: A method of the caller's own, instead of the configuration's.
        caller_objects: The objects behind placeholders in the configuration.

    Raises:
        UserError: Whatever is wrong, in one line.
    """
    config = own_settings(config)
    tracking.need(config.tracker)
    notes: list[str] = []
    method = for_latents(with_examples(config, method or registry.load(**config.method)))
    config = pair.without_idle_teacher(config, method, may_generate=True)
    _check_method(method)
    student, teacher, data = pair.named(config, method)
    if config.threads:
        torch.set_num_threads(config.threads)
    sampling = FlowSampling(
        Noise(config.flow.sampler, config.flow.noise_level),
        config.flow.steps,
        config.flow.window,
        config.flow.window_end,
        config.flow.batch,
    )
    train, held_out = read_prompts(config, data, notes, caller_objects)
    grader = _grader(config, method, [*train, *held_out])
    config = fit_steps(config, method, len(train), notes)
    if config.lora.rank and not config.set_by_user("lora.targets"):
        config = config.changed("lora.targets", [ATTENTION])
    notes[:0] = paper_settings(config, method)
    models = _models(config, pair.model_paths(config, method, student, teacher), caller_objects)
    own = models["student"]
    teachers: dict[str, Any] = {
        name: FlowTeacher(model, batch=config.flow.batch) for name, model in models.items() if name != "student"
    }
    if config.teachers.models:
        if config.teachers.combine in ("mixture", "product"):
            raise UserError(
                f"teachers.combine = {config.teachers.combine} is of distributions over tokens; for denoising steps "
                "use combine = route"
            )
        teachers["teacher"] = several(config.teachers, teachers, [*train, *held_out], grader)  # pyright: ignore
    check_learns(own)
    check_prompts(models, [*train, *held_out], teachers.get("teacher"))
    return FlowPrepared(
        config=config,
        method=method,
        source=FlowSource(
            train,
            batch_prompts(config, len(train)),
            config.seed,
            own,
            sampling,
            grader,
            _examples(config, method, teachers),
        ),
        teachers=Teachers(teachers),
        learner=Learner(
            FlowPasses.over(own, config.flow.batch),
            config.optimizer,
            variance_every=config.record.gradient_variance_every,
            rounds=flow_rounds,
        ),
        held_out=held_out,
        grader=grader,
        models=models,
        notes=notes,
    )


def _examples(config: Config, method: Method, teachers: Mapping[str, Any]) -> Examples | None:
    """Who makes what a cold start learns from, where there is one."""
    if method.before is None:
        return None
    flow = config.flow
    count = flow.window or flow.window_end or flow.steps - 1
    return Examples(maker(teachers["teacher"]), config.seed, flow.eval_steps, flow.batch, count)


def _check_method(method: Method) -> None:
    """Refuses what no trajectory can give a method.

    Raises:
        UserError: As said.
    """
    if here().size > 1:
        raise UserError(
            "a student that decides denoising steps learns in one process, and several ranks were started; start "
            "`retort train` without torchrun"
        )
    for phase in [method] if method.before is None else [method.before[1], method]:
        plan = phase.rollout
        own = phase is method or plan.sources != {"teacher"}
        if (own and plan.sources != {"student"}) or plan.replay is not None or plan.order is not None:
            raise UserError(
                f"method '{phase.name}' also learns from what the student did not sample now, or orders prompts by "
                "difficulty; for denoising steps switch that off (method.on_policy_fraction=1), or choose another"
            )
        refuse_other_prompts(phase.views)
        for name, view in phase.views.items():
            if view.model == "student":
                raise UserError(
                    f"method '{phase.name}' has the student teach itself (view '{name}'), which is for students of "
                    "text; choose one that asks a teacher"
                )


def _grader(config: Config, method: Method, prompts: Sequence[Prompt]) -> SampleGrader | None:
    if not config.flow.rewards:
        if method.needs_rewards is not None:
            raise UserError(
                f"method '{method.name}' learns from rewards ({method.needs_rewards}); name them in flow.rewards"
            )
        return None
    grader = SampleGrader(config.flow.rewards)
    grader.check(prompts)
    return grader


def _models(config: Config, paths: Mapping[str, str], caller_objects: CallerObjects) -> dict[str, FlowModel]:
    """All models by name, the student first; a base that is the student is a copy of it."""
    device, precision = device_for(config), config.precision
    chosen = precision if precision != "auto" else ("bf16" if device == "cuda" else "fp32")

    def opened(name: str, path: str, base: Any = None) -> FlowModel:
        given = caller_objects.flow(path)
        made = (
            copy.deepcopy(given)
            if given is not None
            else open_flow(
                located(path), role=name, device=device, height=config.flow.height, width=config.flow.width, base=base
            )
        )
        made.module.to(device)
        return FlowModel(made, path, guidance=config.flow.guidance, precision=chosen, frozen=name != "student")

    student = opened("student", paths["student"])
    found = {"student": student}
    for name, path in paths.items():
        if name == "student":
            continue
        again = name == "base" and path == paths["student"]
        model = (
            FlowModel(copy.deepcopy(student.of), path, guidance=config.flow.guidance, precision=chosen, frozen=True)
            if again
            else opened(name, path, student.of)
        )
        refuse_other_flow(student, model)
        if not again and model.parameters and model.digest() == student.digest():
            raise UserError(f"{name} {path} holds the same weights as the student, so it would teach nothing")
        found[name] = model
    if config.lora.rank:
        lora = config.lora
        student.adapter = add_lora(
            student.of.module,
            rank=lora.rank,
            alpha=lora.alpha or 2.0 * lora.rank,
            targets=lora.targets,
            rslora=lora.rslora,
            seed=config.seed,
            name=located(student.name),
        )
    if config.flow.start != "student":
        _merge(config, student, found, {name: located(path) for name, path in paths.items()})
    return found


def _merge(config: Config, student: FlowModel, models: Mapping[str, FlowModel], places: Mapping[str, str]) -> None:
    """Begins the student with the mean of its teachers.

    Raises:
        UserError: There is one teacher, or their weights have no mean.
    """
    names = config.teachers.models
    if not names:
        raise UserError(f"flow.start = {config.flow.start} merges several teachers; name them in teachers.models")
    adapters = {name for name in names if is_adapter(places[name])}
    experts = [places[name] if name in adapters else models[name].of for name in names]
    merged_start(student.of, experts, products=config.flow.start == "merge_products")
