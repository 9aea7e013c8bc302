"""What a run says before it starts: honestly, and with a forecast of the memory it will take."""

from __future__ import annotations

from retort.apply import wanted
from retort.models.adapter import described
from retort.train.card import beside, self_teachers, standing
from retort.train.memory import forecast
from retort.train.setup import Setup
from retort.train.write import plan_summary


def summary(setup: Setup) -> dict[str, str]:
    """Lines of the start-up summary, by heading."""
    method, config = setup.method, setup.config
    asked = {
        view: ", ".join(str(need) for need in sorted(wanted(method, view, teacher.capabilities)))
        for view, teacher in setup.teachers.items()
    }
    updates = min(config.optimizer.updates, setup.batch_prompts * method.rollout.samples) * config.optimizer.epochs
    return {
        "student": f"{setup.student.name}, {_count(setup.student.parameters)} parameters{_learning(setup)}",
        **({"teacher": _teachers(setup)} if _teachers(setup) else {}),
        **{who: f"{lm.name}, frozen" for who, lm in beside(setup).items()},
        "method": f"{method.name} ({standing(method)})",
        "settings": ", ".join(f"{name} = {value}" for name, value in method.settings.items()),
        **{f"asked of {view}": text for view, text in asked.items()},
        **({"before it": f"{method.before[1].name}, {method.before[0]} batches"} if method.before else {}),
        "data": f"{config.data}: {len(setup.train):,} prompts to learn from, {len(setup.held_out)} held out",
        "graded by": setup.verifier.name if setup.verifier else "nobody (the data has no answers)",
        "batch": f"{plan_summary(method.rollout, setup.batch_prompts)}, {updates} optimizer steps",
        "run": f"{setup.steps} steps (batches), learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule} schedule, {setup.precision} on {setup.student.device.type}, seed {config.seed}",
        "memory": str(forecast(setup)),
    }


def _teachers(setup: Setup) -> str:
    lm = setup.teacher_lm
    other = [] if lm is None else [f"{lm.name}, {_count(lm.parameters)} parameters"]
    return "; ".join([*other, *self_teachers(setup.method)])


def _learning(setup: Setup) -> str:
    """How many of them learn, where that is not all."""
    student = setup.student
    if student.adapter is None:
        return ""
    return f", and {_count(student.trainable_parameters)} more that learn, {described(student.adapter.settings)}"


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)
