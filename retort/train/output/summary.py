"""The start-up summary of a run, with a forecast of its memory."""

from __future__ import annotations

from retort.config import Config
from retort.loss.terms import wanted
from retort.models.adapter import described
from retort.models.lm import LanguageModel
from retort.rollout.plan import plan_summary
from retort.train.output.card import beside, self_teachers, standing
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import Prepared


def summary(prepared: Prepared) -> dict[str, str]:
    """Lines of the start-up summary, by heading."""
    method, config, source, student = prepared.method, prepared.config, prepared.source, prepared.student
    needs = {
        view: ", ".join(str(need) for need in sorted(wanted(method, view, teacher.capabilities)))
        for view, teacher in prepared.teachers.behind(prepared.method).items()
    }
    updates = min(config.optimizer.updates, prepared.source.count * method.rollout.samples) * config.optimizer.epochs
    return {
        "student": f"{prepared.student.name}, {_count(prepared.student.parameters)} parameters"
        f"{_rounded(student)}{_learning(prepared)}",
        **({"teacher": _teachers(prepared)} if _teachers(prepared) else {}),
        **{who: f"{lm.name}{_rounded(lm)}, frozen" for who, lm in beside(prepared).items()},
        "method": f"{method.name} ({standing(method)})",
        "settings": ", ".join(f"{name} = {value}" for name, value in method.settings.items()),
        **{f"asked of {view}": text for view, text in needs.items()},
        **({"before it": f"{method.before[1].name}, {method.before[0]} batches"} if method.before else {}),
        "data": f"{config.data}: {len(source.prompts):,} prompts to learn from, {len(prepared.held_out)} held out",
        "graded by": source.grader.name if source.grader else "nothing (the data has no answers)",
        **({"rewards": f"points of a rubric, by {_rubricator(config)}"} if source.rubric_grader else {}),
        **({"written by": _writer(prepared)} if prepared.writer else {}),
        "batch": f"{plan_summary(method.rollout, prepared.source.count)}, {updates} optimizer steps",
        **({"environment": _environment(prepared)} if config.environment else {}),
        "run": f"{prepared.steps} steps (batches), learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule} schedule, {student.precision} on {student.device.type}, seed {config.seed}",
        "memory": str(forecast(prepared)),
    }


def _writer(prepared: Prepared) -> str:
    asked = prepared.config.rollout
    corrected = "policy gradients corrected for it" if asked.correction == "truncated" else "uncorrected"
    return f"vLLM of {asked.vllm_python}, in a process of its own, {corrected}"


def _rubricator(config: Config) -> str:
    return f"the record {config.judge.replay}" if config.judge.replay else str(config.judge.model)


def _environment(prepared: Prepared) -> str:
    """The environment, and what of a run does not follow from its seed."""
    config = prepared.config
    waiting = config.rollout.waiting
    said = [f"{config.environment}"]
    if waiting.turns == "ready":
        said.append("turns=ready: an episode goes on when its reply is there, so that runs repeat up to rounding only")
    if waiting.deadline is not None:
        said.append(f"a reply that takes longer than {waiting.deadline:g} s ends its episode, and is recorded")
    return "; ".join(said)


def _teachers(prepared: Prepared) -> str:
    lm = prepared.teachers.lms.get("teacher")
    other = [] if lm is None else [f"{lm.name}, {_count(lm.parameters)} parameters{_rounded(lm)}"]
    together = [prepared.teachers.models["teacher"].name] if prepared.config.teachers.models else []
    return "; ".join([*together, *other, *self_teachers(prepared.method)])


def _rounded(lm: LanguageModel) -> str:
    """How its weights were rounded, and where they wait."""
    return "".join(f", {words}" for words in (lm.rounded, lm.offload.words) if words)


def _learning(prepared: Prepared) -> str:
    """How many parameters learn, where not all do."""
    student = prepared.student
    if student.adapter is None:
        return ""
    return f", and {_count(student.trainable_parameters)} more that learn, {described(student.adapter.settings)}"


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)
