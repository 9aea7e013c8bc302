"""Checks that the data has what a method's rollout plan, probes and views need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retort.config import Config
from retort.core.random_streams import permutation
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.method import Method
from retort.rewards.base import Grader
from retort.train.given.given import CallerObjects
from retort.train.setup import templates
from retort.train.setup.grading import need_rubricator
from retort.train.setup.prompts import graders, read_prompts
from retort.train.setup.split import set_aside


@dataclass(frozen=True)
class Data:
    """The prompts and graders of a run.

    Attributes:
        train: Prompts to learn from.
        probe: Prompts kept out of them for the method's probes.
        held_out: Prompts for evaluation.
        grader: Grades training rollouts, where any prompt has an answer.
        eval_grader: Grades completions of held-out prompts, where any has an answer.
    """

    train: list[Prompt]
    probe: list[Prompt]
    held_out: list[Prompt]
    grader: Grader | None
    eval_grader: Grader | None

    @property
    def full(self) -> Grader | None:
        """The grader where it can grade every prompt, as learning from rewards or showing them takes; else None."""
        return self.grader if self.grader is not None and all(map(self.grader.can_grade, self.train)) else None


def read_data(config: Config, method: Method, data: str, notes: list[str], caller_objects: CallerObjects) -> Data:
    """Reads the data, and sets aside probe prompts and held-out prompts.

    Raises:
        UserError: The data cannot be read, or lacks what the method needs.
    """
    need_rubricator(config, method)
    need_play(config, method, notes)
    train, held_out = read_prompts(config, data, notes, caller_objects)
    train, probe = probe_prompts(config, method, train, notes)
    need_responses(method, train, probe)
    found = Data(train, probe, held_out, *graders(config, train, held_out, notes, caller_objects))
    need_verifier(method, found.full, train)
    need_columns(method, train, notes)
    templates.refuse_views(config, method)
    return found


def probe_prompts(
    config: Config, method: Method, train: list[Prompt], notes: list[str]
) -> tuple[list[Prompt], list[Prompt]]:
    """Splits the prompts into training and probe prompts: the latter are chosen by seed, a fifth at most."""
    wanted = max((c.probe.prompts for c in method.controllers if c.probe is not None), default=0)
    if wanted == 0:
        return train, []
    order = permutation(config.seed, "probe", count=len(train))
    rest, probe = set_aside(train, order, wanted, lambda prompt: prompt.response is not None)
    if not probe:
        raise UserError(
            f"method '{method.name}' needs training prompts to probe on, and keeps a fifth at most: give it 5 or more "
            "different ones"
        )
    notes.append(f"{len(probe)} of {len(train)} training prompts are kept out for the probes of '{method.name}'")
    return rest, probe


def need_play(config: Config, method: Method, notes: list[str]) -> None:
    """Refuses what no environment plays: an expert's turns without one, and completions by others where there is one.

    A horizon of turns or a history without an environment, and how one is waited for, is noted.
    """
    rollout = config.rollout
    if config.environment is None and rollout.history is not None:
        notes.append("rollout.history changes nothing without an environment (rollout.env): a completion is one turn")
    if config.environment is None and (rollout.deadline is not None or rollout.turns != "lockstep"):
        notes.append("rollout.deadline and rollout.turns change nothing without an environment (rollout.env)")
    phases = [method] if method.before is None else [method.before[1], method]
    for phase in phases:
        curriculum = phase.rollout.curriculum
        if curriculum is not None and config.environment is None:
            if curriculum.kind == "backward":
                raise UserError(
                    f"method '{phase.name}' begins behind an expert's turns, which takes an environment that knows "
                    "one; name it in rollout.env (`retort envs` lists them), or set method.curriculum=forward"
                )
            grows = curriculum.kind == "forward"
            played = "a horizon of turns that grows" if grows else "one turn of each episode"
            notes.append(
                f"method '{phase.name}' has {played}, and without an environment (rollout.env) every completion is one "
                f"turn, so {'the horizon' if grows else 'that'} changes nothing"
            )
        if config.environment is not None and phase.rollout.prompt_view is not None:
            raise UserError(
                f"method '{phase.name}' has completions written under the prompt of a view, which an environment "
                f"('{config.environment}') does not show; switch that off, or leave out rollout.env"
            )
        if config.environment is not None and rollout.history is None and _by_step(phase):
            raise UserError(
                f"method '{phase.name}' has the teachers debate every turn of an episode, which takes turns that are "
                "read anew; set rollout.history to the number of earlier turns that are shown"
            )
        others = sorted(set(phase.rollout.sources) - {"student"})
        if config.environment is not None and others:
            whose = "the teacher's" if others[0] == "teacher" else "those of the data"
            remedy = "set cold_start.steps=0" if phase is not method else "choose one that learns from the student's"
            raise UserError(
                f"method '{phase.name}' also learns from completions that are {whose}, and in the environment "
                f"'{config.environment}' only the student plays; {remedy}"
            )


def _by_step(method: Method) -> bool:
    """Whether texts are written about each turn of an episode."""
    return any(view.draft is not None and view.draft.per == "step" for view in method.views.values())


def need_responses(method: Method, train: Sequence[Prompt], probe: Sequence[Prompt]) -> None:
    """Refuses data without responses where a phase of the run, or a probe, would learn from them."""
    missing = next((prompt for prompt in train if prompt.response is None), None)
    phases = [method] if method.before is None else [method.before[1], method]
    for phase in phases:
        if missing is None or "dataset" not in phase.rollout.sources:
            continue
        share = phase.rollout.on_policy_fraction
        part = f"{1 - share:.0%}" if isinstance(share, int | float) else "part"
        remedy = "set cold_start.answers=teacher" if phase is not method else "set method.on_policy_fraction=1"
        raise UserError(
            f"method '{phase.name}' takes {part} of its answers from data, but row '{missing.id}' has no `response`; "
            f"add the column, or {remedy}"
        )
    probed = any(c.probe is not None and c.probe.source == "dataset" for c in method.controllers)
    missing = next((prompt for prompt in probe if prompt.response is None), None)
    if probed and missing is not None:
        raise UserError(
            f"method '{method.name}' probes on responses of the data, but row '{missing.id}' has no `response`; "
            "add the column"
        )


def need_verifier(method: Method, verifier: Grader | None, train: Sequence[Prompt]) -> None:
    """Refuses data that cannot be graded where prompts are ordered by pass rate, or the method learns from rewards."""
    alone = "student" in method.rollout.sources and method.rollout.samples < 2
    if method.needs_groups is not None and alone:
        raise UserError(
            f"method '{method.name}' compares the completions of one prompt ({method.needs_groups}), and with "
            "samples = 1 there is nothing to compare; set method.samples to 2 or more"
        )
    siblings = next((name for name, view in method.views.items() if view.rewards), None)
    if siblings is not None and alone and not (verifier is not None and verifier.explains):
        raise UserError(
            f"method '{method.name}' shows what siblings wrote (view '{siblings}'), of which there are none with "
            "samples = 1, and this verifier says nothing of what is wrong; set method.samples to 2 or more"
        )
    lacking = [prompt.id for prompt in train if prompt.answer is None]
    some = f", and {len(lacking)} of {len(train)} have none ('{lacking[0]}' first)" if lacking else ""
    wants = method.needs_rewards if method.grading is None else None  # else a judge grades: see `grading`
    if wants is not None and verifier is None:
        raise UserError(
            f"method '{method.name}' learns from rewards ({wants}), which takes an `answer` in every row of the data"
            f"{some}; add the column, or choose a method without rewards (`retort methods` says what each needs)"
        )
    if method.rollout.order is not None and verifier is None:
        raise UserError(
            f"method '{method.name}' orders prompts by the student's pass rate, which takes an `answer` in every row "
            f"of the data{some}; add the column, or switch the order off"
        )


def need_columns(method: Method, train: Sequence[Prompt], notes: list[str]) -> None:
    """Refuses data in which no row has what a view shows to its teacher; notes where only some have."""
    for name, view in method.views.items():
        for column in view.columns:
            lacking = [prompt for prompt in train if not prompt.shown(column)]
            if len(lacking) == len(train):
                raise UserError(
                    f"method '{method.name}' shows its teacher the column `{column}` (view '{name}'), which no row of "
                    f"the data has; add the column, or map it: columns.{column}=NAME_IN_THE_FILE"
                )
            if lacking:
                notes.append(
                    f"{len(lacking)} of {len(train)} training prompts, '{lacking[0].id}' first, have no `{column}` "
                    f"for view '{name}': their rollouts are not learnt from"
                )
        if view.images is not None:
            _need_images(method, name, train, notes)


#: What an image view of either kind needs of a row, in words, and the column that holds it.
_IMAGES = {"own": ("image", "images"), "teacher": ("image for the teacher alone", "teacher_images")}


def _need_images(method: Method, name: str, train: Sequence[Prompt], notes: list[str]) -> None:
    """The same of the images that a view shows."""
    view = method.views[name]
    what, column = _IMAGES[view.images or "own"]
    lacking = [prompt for prompt in train if not view.can_show(prompt)]
    if len(lacking) == len(train):
        raise UserError(
            f"method '{method.name}' shows its teacher images (view '{name}'), and no training prompt has an {what}; "
            f"give data with a column `{column}`, or choose a method that needs none, such as opd"
        )
    if lacking:
        notes.append(
            f"{len(lacking)} of {len(train)} training prompts, '{lacking[0].id}' first, have no {what} for view "
            f"'{name}': their rollouts are not learnt from"
        )
