"""A method as a value: its rollout plan, the views of its teachers, its terms, and the methods it collapses to."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, ParamSpec

from torch import Tensor

from retort.controllers import Controller
from retort.core.grading import RubricPlan
from retort.core.needs import GAUSSIAN, Need
from retort.core.numbers import Unbounded as Unbounded
from retort.core.numbers import check_numbers
from retort.core.options import Groups
from retort.core.parts import Part, Stat, Weight
from retort.core.reduce import Denominator, tokens
from retort.core.schedules import ControllerOutput, ScalarOrSchedule
from retort.errors import UserError, did_you_mean
from retort.estimators import Estimator
from retort.rollout.plan import RolloutPlan
from retort.teachers.view import View

Status = Literal["faithful", "partial", "reconstructed"]
P = ParamSpec("P")

#: At temperatures outside of this range, logits in fp32 are infinite or indistinguishable.
COLDEST, HOTTEST = 1e-6, 1e6


@dataclass(frozen=True)
class Paper:
    """The source of a method."""

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    url: str | None = None
    venue: str | None = None

    def bibtex(self, key: str) -> str:
        """A BibTeX entry."""
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "year": str(self.year)}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        fields |= {name: value for name, value in (("url", self.url), ("note", self.venue)) if value}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{key},\n{body}\n}}"


@dataclass(frozen=True)
class Term:
    """One disagreement: its estimator, its view, where it counts and its denominator."""

    name: str
    estimator: Estimator
    against: str = "teacher"
    weight: Weight | None = None
    coef: ScalarOrSchedule = 1.0
    denominator: Denominator = field(default_factory=tokens)

    @property
    def needs(self) -> frozenset[Need]:
        """The term's needs of its view's teacher."""
        return self.needs_of(self.against)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts that are evaluated for the term."""
        return (*self.estimator.parts, *([self.weight] if self.weight else []))

    def needs_of(self, view: str) -> frozenset[Need]:
        """The term's needs of any view's teacher."""
        return frozenset[Need]().union(*(part.needs_of(view, self.against) for part in self.parts))


@dataclass(frozen=True)
class Watch:
    """A curve that the paper shows. It is logged if the teacher's signal allows it; it never makes a teacher necessary.

    Attributes:
        name: Name of the curve.
        part: The number per step that is averaged over counted steps.
        where: Average only over steps on which this is not 0.
        against: The view that it reads.
        alarm_below: Show `advice` once if the average falls below this.
        advice: One sentence for the user.
        every: Only at every so many batches, for expensive parts.
        by_position: Also averaged by the position in the completion.
        summed_up: The function that makes one number of those of an optimizer step, [N]; None for their mean.
    """

    name: str
    part: Part
    where: Weight | None = None
    against: str = "teacher"
    alarm_below: float | None = None
    advice: str = ""
    every: int = 1
    by_position: bool = False
    summed_up: Callable[[Tensor], float] | None = None

    def needs_of(self, view: str) -> frozenset[Need]:
        """The curve's optional needs of a view's teacher."""
        return frozenset[Need]().union(*(part.needs_of(view, self.against) for part in self.parts))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are evaluated for it."""
        return (self.part, *([self.where] if self.where else []))


@dataclass(frozen=True)
class Limit:
    """Executable documentation: with these settings the method equals another one, in value and gradient."""

    settings: Mapping[str, Any]
    equals: tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A distillation method. Compose it from parts; `retort.load` makes the published ones.

    Attributes:
        rollout: The rollout plan: which model generates, and how.
        views: What each teacher sees, by name.
        terms: The loss, a sum.
        temperature: Both distributions are evaluated at this temperature, in training (curves included) and in
            `token_losses`. Held-out completions are evaluated at 1.
        limits: Settings at which it equals other methods.
        watch: Curves worth watching.
        controllers: Parts with a state that changes during the run; settings read their outputs.
        before: Another method, and for how many steps it is run first (`retort.methods._cold_start`).
        recipe: The paper's training settings, as sections of a run's configuration; used where the user gives none.
        adam_variance: Whether to log the gradient's variance that Adam's moments imply (`adam_variance`).
        grading: How a judge grades the training rollouts; None: the task's own grader does.
        name, settings, paper, status, summary, made_of: Filled in by the `method` decorator.
    """

    rollout: RolloutPlan
    terms: tuple[Term, ...]
    views: Mapping[str, View] = field(default_factory=lambda: {"teacher": View.same_prompt()})
    temperature: float = 1.0
    limits: tuple[Limit, ...] = ()
    watch: tuple[Watch, ...] = ()
    controllers: tuple[Controller, ...] = ()
    before: tuple[int, Method] | None = None
    recipe: Mapping[str, Any] = field(default_factory=lambda: {})
    adam_variance: bool = False
    grading: RubricPlan | None = None
    name: str = "custom"
    settings: Mapping[str, Any] = field(default_factory=lambda: {})
    paper: Paper | None = None
    status: Status = "faithful"
    summary: str = ""
    made_of: tuple[object, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names:
            raise UserError(f"method {self.name} has no terms, so nothing would be learnt")
        if len(set(names)) != len(names):
            raise UserError(f"method {self.name} has two terms of one name: {names}")
        for term in self.terms:
            if term.against not in self.views and (self.views or term.needs):  # a reward needs no view
                raise UserError(
                    f"term '{term.name}' is against view '{term.against}'; {did_you_mean(term.against, self.views)}"
                )
            if term.estimator.reads_hidden and term.weight is not None:
                raise UserError(f"term '{term.name}' compares hidden states, and such a term has no weight")
            for view in (view for part in term.parts for view in part.also):
                if view not in self.views:
                    raise UserError(f"term '{term.name}' also asks view '{view}'; {did_you_mean(view, self.views)}")
        if not COLDEST <= self.temperature <= HOTTEST:
            raise UserError(f"temperature must be positive, {COLDEST:g} to {HOTTEST:g}, not {self.temperature}")
        under = self.rollout.prompt_view
        if under is not None and under not in self.views:
            raise UserError(f"the rollout plan is written under view '{under}'; {did_you_mean(under, self.views)}")
        if under is not None and (self.views[under].rewards or self.views[under].draft is not None):
            raise UserError(f"the rollout plan is written under view '{under}', which shows what is written later")
        own = [term.name for term in self.terms if term.estimator.uses_old_logp]
        if own and under is not None:
            raise UserError(
                f"term '{own[0]}' is a policy gradient, which holds only for completions of the student's own prompt, "
                f"but the rollout plan has them written under view '{under}'; use pathwise(...), or leave that out"
            )
        if own and (self.rollout.replay is not None or "teacher" in self.rollout.sources):
            others = "the teacher's" if "teacher" in self.rollout.sources else "old ones"
            raise UserError(
                f"term '{own[0]}' is a policy gradient, which holds only for the student's own completions, but the "
                f"rollout plan mixes in {others}; use pathwise(...), or let the student generate everything"
            )
        self._check_draws()
        controllers = [controller.name for controller in self.controllers]
        if len(set(controllers)) != len(controllers):
            raise UserError(f"method {self.name} has two controllers of one name: {controllers}")
        for controller in self.controllers:
            for view in (controller.against, *((controller.probe.against,) if controller.probe else ())):
                if view not in self.views:
                    raise UserError(
                        f"controller '{controller.name}' reads view '{view}'; {did_you_mean(view, self.views)}"
                    )
        coefs = [term.coef for term in self.terms if isinstance(term.coef, ControllerOutput)]
        for output in (*coefs, *self.rollout.controller_outputs):
            if output.controller not in controllers:
                raise UserError(f"a setting reads '{output}'; {did_you_mean(output.controller, controllers)}")

    def _check_draws(self) -> None:
        """Raises `UserError` where a part that needs draws from the whole distribution would get others."""
        plan = self.rollout
        for name in (part.name for term in self.terms for part in term.parts if part.whole_support):
            if plan.top_p < 1:
                raise UserError(
                    f"'{name}' is unbiased only for tokens drawn from the student's whole distribution, and the "
                    f"rollout plan has top_p = {plan.top_p:g}; set it to 1"
                )
            if plan.temperature != self.temperature:
                raise UserError(
                    f"'{name}' is unbiased only for tokens drawn at the loss temperature {self.temperature:g}, and the "
                    f"rollout plan has {plan.temperature:g}; set both to the same"
                )

    @property
    def as_published(self) -> bool:
        """Whether this is the method of its name and settings, with no part replaced."""
        return self.parts_as_published and self.before is None

    @property
    def parts_as_published(self) -> bool:
        """The same, whatever method is run before it."""
        parts = (self.rollout, self.terms, self.views, self.temperature, self.controllers)
        return bool(self.made_of) and all(mine is made for mine, made in zip(parts, self.made_of, strict=True))

    @property
    def needs_rewards(self) -> str | None:
        """The first of its parts that needs graded rollouts, if any."""
        users = [f"statistic '{stat.name}'" for stat, _ in self.stats.values() if stat.rewards]
        users += [f"view '{name}'" for name, view in self.views.items() if view.rewards]
        users += [f"controller '{controller.name}'" for controller in self.controllers if controller.rewards]
        return next(iter(users), None)

    @property
    def needs_groups(self) -> str | None:
        """The first of its parts that compares the rollouts of one prompt, if any."""
        return next((f"statistic '{stat.name}'" for stat, _ in self.stats.values() if stat.groups), None)

    @property
    def needs_latents(self) -> bool:
        """Whether some part needs steps that decide latents, as those of a flow model do; a token student has none."""
        return any(GAUSSIAN in self.needs(view) for view in self.views)

    def needs(self, view: str = "teacher") -> frozenset[Need]:
        """The method's needs of the teacher behind a view."""
        termed = (term.needs_of(view) for term in self.terms)
        seen = (part.needs for c in self.controllers if c.against == view for part in c.observes.values())
        probes = (c.probe for c in self.controllers if c.probe is not None and c.probe.against == view)
        probed = (part.needs for probe in probes for part in probe.parts.values())
        return frozenset[Need]().union(*termed, *seen, *probed)

    def optional_needs(self, view: str = "teacher", step: int = 0) -> frozenset[Need]:
        """The optional needs of its curves, at a batch of rollouts counted from 0."""
        due = (watch.needs_of(view) for watch in self.watched(step))
        return frozenset[Need]().union(*due) - self.needs(view)

    def watched(self, step: int) -> tuple[Watch, ...]:
        """Its curves at a batch, counted from 0; without those of a statistic that no term asks for."""
        known = self.stats.keys()
        return tuple(
            watch
            for watch in self.watch
            if step % watch.every == 0 and all(stat.name in known for part in watch.parts for stat in part.stats)
        )

    @property
    def stored(self) -> Mapping[str, tuple[Part, str]]:
        """Parts, with their view, that the score pass must evaluate before the first of several updates on a batch."""
        parts: dict[str, tuple[Part, str]] = {}
        for term in self.terms:
            for name, part in term.estimator.stored.items():
                parts[f"{term.name}.{name}"] = (part, term.against)
            if term.weight is not None and _by_own_weight(term):
                parts[f"{term.name}.weight"] = (term.weight, term.against)
        return parts

    @property
    def uses_old_logp(self) -> bool:
        """Whether some term compares with the student before the first update on a batch."""
        by_weight = any(term.weight.uses_old_logp for term in self.terms if term.weight is not None)
        return by_weight or any(term.estimator.uses_old_logp for term in self.terms)

    @property
    def weighs_batch(self) -> bool:
        """Whether a denominator can only be known after a pass over the whole batch."""
        return any(_by_own_weight(term) for term in self.terms)

    @property
    def stats(self) -> Mapping[str, tuple[Stat, str]]:
        """Whole-batch values, with their view, that must be known before the first update on a batch."""
        used = [(part, term.against) for term in self.terms for part in term.parts]
        return {stat.name: (stat, view) for part, view in used for stat in part.stats}


def _by_own_weight(term: Term) -> bool:
    return term.denominator.kind in ("weighted", "weighted_rollouts") and term.denominator.by is None


def method(*, paper: Paper, status: Status) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Marks a function as a published method: its name is the method's, its signature the home of the defaults.

    Settings in a group (`retort.core.options`) can be given by themselves, too; the result's signature lists these.
    """

    def mark(build: Callable[P, Method]) -> Callable[P, Method]:
        summary = (inspect.getdoc(build) or "").split("\n", 1)[0]
        groups = Groups.of(build)
        signature = groups.signature()

        @functools.wraps(build)
        def made(*args: P.args, **settings: P.kwargs) -> Method:
            bound = signature.bind(*args, **groups.spread(settings))
            bound.apply_defaults()
            check_numbers(made, bound.arguments)
            try:
                bare: Method = groups.build(**groups.gathered(bound.arguments))
            except UserError as error:
                raise _about_settings(error, build.__name__, signature.parameters) from None
            return replace(
                bare,
                made_of=(bare.rollout, bare.terms, bare.views, bare.temperature, bare.controllers),
                name=build.__name__,
                settings=dict(bound.arguments),
                paper=paper,
                status=status,
                summary=summary,
            )

        hints = {name: one.annotation for name, one in signature.parameters.items()}
        vars(made).update(__signature__=signature, groups=groups)
        made.__annotations__ = {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}
        return made

    return mark


#: How a part begins a message of its own: with the name of the function that makes it, which no user of a run knows.
_FUNCTION = re.compile(r"^(\w+): ")


def _about_settings(error: UserError, name: str, settings: Container[str]) -> UserError:
    """The refusal of a method's settings, which names the method in place of a part of it that is no setting."""
    text = str(error)
    part = _FUNCTION.match(text)
    own = text if part is None or part[1] in settings else text[part.end() :]
    return error if text.startswith("method") else UserError(f"method '{name}': {own}")


def groups_of(build: Callable[..., Method]) -> Groups:
    """The groups of settings of a method, from the function that makes it."""
    return vars(build)["groups"]
