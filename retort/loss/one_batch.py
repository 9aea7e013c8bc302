"""A method applied to one whole optimizer batch of a caller: the code that both functions of `retort.functional` share.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from retort.controllers import Controller, State
from retort.core.definition import Values
from retort.core.head import Head
from retort.core.losses import TokenLoss, TokenLosses
from retort.core.per_token import Core, loss_pass, per_token
from retort.core.random_streams import generator
from retort.core.signals import Dense, TeacherSignal
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.loss.scoring import Evaluate, observe, scored
from retort.loss.terms import batch_scales, check_needs, counted, hidden_values, losses, term_values
from retort.method import Method
from retort.registry import load

#: How sure K teachers say to be, 0 to 100: of all rollouts, [K], or of each, [R, K]; None or NaN: one says nothing.
Confidences = Tensor | Sequence[float | None] | Sequence[Sequence[float | None]]

#: (values of some steps, their slice) -> their part of the loss, a scalar.
Loss = Callable[[Mapping[str, Tensor], slice], Tensor]
#: A loss, None where none was asked for, and the values of all steps, [N] each, by name.
Passed = tuple[Tensor | None, dict[str, Tensor]]


class PassOver(Protocol):
    """Evaluates a function of the context at all steps of a batch: a pass over what the student computed."""

    def __call__(self, values: Values, steps: Steps, clock: Clock, loss: Loss | None) -> Passed:
        """Returns the loss made of the values, if one is asked for, and the values; both are differentiable."""
        ...


@dataclass(frozen=True)
class BatchInputs:
    """The caller's inputs of a batch, as the functions of `retort.functional` take them; see there for shapes."""

    tokens: Tensor
    mask: Tensor | None = None
    turns: Tensor | None = None
    rollouts: Tensor | None = None
    groups: Tensor | None = None
    rewards: Tensor | None = None
    old_logp: Tensor | None = None
    engine_logp: Tensor | None = None
    confidences: Confidences | None = None

    def check(self) -> None:
        """Raises `UserError` where an input does not fit the tokens."""
        tokens = self.tokens
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise UserError(f"tokens must be [N] integers, not {tuple(tokens.shape)} {tokens.dtype}")
        for name in ("mask", "turns", "rollouts", "old_logp", "engine_logp"):
            values: Tensor | None = getattr(self, name)
            if values is not None and values.shape != tokens.shape:
                raise UserError(f"{name} must be [N] = {tuple(tokens.shape)}, not {tuple(values.shape)}")
        for name in ("turns", "rollouts", "groups"):
            values = getattr(self, name)
            if values is not None and (values.is_floating_point() or values.dtype == torch.bool):
                raise UserError(f"{name} must be whole numbers that say which one, not {values.dtype}")
        if len(tokens) and int(self.rollout_N.min()) < 0:
            raise UserError(f"rollouts count from 0; one is {int(self.rollout_N.min())}")
        for name, values in {"old_logp": self.old_logp, "engine_logp": self.engine_logp}.items():
            _check_own_logp(name, values, self.mask)
        count = self._rollouts
        for name, values in {"groups": self.groups, "rewards": self.rewards}.items():
            if values is not None and values.shape not in ((count,), tokens.shape):
                raise UserError(
                    f"{name} must be [R] = ({count},), one per rollout, or repeated per step, not {tuple(values.shape)}"
                )

    @property
    def rollout_N(self) -> Tensor:
        """Index of each step's rollout, [N]; one rollout by default."""
        return torch.zeros_like(self.tokens) if self.rollouts is None else self.rollouts

    @property
    def _rollouts(self) -> int:
        """R, the number of rollouts."""
        return int(self.rollout_N.max()) + 1 if len(self.tokens) else 0

    @property
    def kept_N(self) -> Tensor:
        """Indices of the steps that count."""
        if self.mask is None:
            return torch.arange(len(self.tokens), device=self.tokens.device)
        return self.mask.bool().nonzero().squeeze(-1)

    def steps(self, kept_N: Tensor) -> Steps:
        """The table of the steps that count."""
        rollout_N, rewards, groups = self.rollout_N, self.rewards, self.groups
        cut: Callable[[Tensor | None], Tensor | None] = lambda values: None if values is None else values[kept_N]  # noqa: E731
        reward_N = cut(None if rewards is None else _per_step(rewards, rollout_N))
        table = Steps.of(
            self.tokens[kept_N],
            rollout_N[kept_N],
            turn_N=cut(self.turns),
            group_N=cut(None if groups is None else _per_step(groups, rollout_N)),
            reward_N=None if reward_N is None else reward_N.double(),
            engine_logp_N=None if self.engine_logp is None else self.engine_logp.detach()[kept_N],
            stored={} if self.old_logp is None else {"old_logp": self.old_logp.detach()[kept_N]},
        )
        if self.confidences is None:
            return table
        return replace(table, confidence_NK=confidence_RK(self.confidences, self._rollouts)[table.rollout_N])


@dataclass(frozen=True, eq=False)
class OneBatch:
    """A method and the steps of a batch that count."""

    method: Method
    tokens_N: Tensor
    kept_N: Tensor
    steps: Steps
    clock: Clock
    state: Mapping[str, Tensor]

    @staticmethod
    def from_inputs(
        method: Method | str, inputs: BatchInputs, clock: Clock, state: Mapping[str, Tensor] | None
    ) -> OneBatch:
        """Builds it, and checks the inputs.

        Raises:
            UserError: An input does not fit, or the method needs one that was not given.
        """
        inputs.check()
        found, kept_N = load(method) if isinstance(method, str) else method, inputs.kept_N
        steps = inputs.steps(kept_N)
        needed = (("rewards", inputs.rewards, found.needs_rewards), ("groups", inputs.groups, found.needs_groups))
        for name, values, wants in needed:
            if wants is not None and values is None:
                raise UserError(f"method '{found.name}' needs {name} ({wants}), which were not given")
        if found.needs_rewards is not None and bool(steps.reward_N is not None and steps.reward_N.isnan().any()):
            raise UserError(f"method '{found.name}' needs the reward of every rollout; one is NaN")
        return OneBatch(found, inputs.tokens, kept_N, steps, clock, dict(state or {}))

    def check_rows(self, name: str, values: Tensor, ndim: int) -> None:
        if values.ndim != ndim or len(values) != len(self.tokens_N):
            raise UserError(f"{name} must have one row per token ({len(self.tokens_N)}), not {tuple(values.shape)}")

    def signal(self, name: str, logits: Tensor | TeacherSignal) -> TeacherSignal:
        """The signal at the steps that count, from logits [N, V] or from a signal about all N steps."""
        if isinstance(logits, TeacherSignal):
            logits.check_tokens(self.tokens_N)
            return logits.select(self.kept_N)
        self.check_rows(f"{name} logits", logits, 2)
        return Dense.of(logits[self.kept_N], self.steps.tokens_N, source=name, temperature=self.method.temperature)

    def linear_signal(self, name: str, hidden_ND: Tensor, head: Tensor | Head) -> TeacherSignal:
        """The same from hidden states and a head."""
        self.check_rows(f"{name} hidden states", hidden_ND, 2)
        found, kept_ND = as_head(head), hidden_ND.detach()[self.kept_N]
        temperature = self.method.temperature
        return Dense(
            self.steps.tokens_N,
            name,
            lambda rows: found.logits(kept_ND[rows]),
            found.width,
            temperature,
            found.shard,
            hidden=lambda rows: kept_ND[rows],
        )

    def evaluate(
        self,
        hidden_ND: Tensor,
        head: Head | None,
        width: int,
        signals: Mapping[str, TeacherSignal],
        chunk: int | None,
        states_ND: Tensor | None,
    ) -> TokenLosses:
        """Evaluates the method on hidden states and a head, or on logits and no head; terms compare `states_ND`."""
        check_needs(self.method, {name: signal.offers for name, signal in signals.items()})
        for name, signal in signals.items():
            self._check_lists(name, signal, width)
        vocab = min([width, *(signal.width for signal in signals.values() if isinstance(signal, Dense))])
        tokens_N = self.steps.tokens_N
        whole = head is None or not head.shard.spread  # a rank with some of the ids does not know how many there are
        if whole and len(tokens_N) and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab:
            raise UserError(f"tokens hold ids outside the shared vocabulary of {vocab}")
        core = Core(term_values(self.method), self.steps, self.clock, signals, head, vocab, self.method.temperature)

        def passed(values: Values, steps: Steps, clock: Clock, loss: Loss | None) -> Passed:
            here = replace(core, values=values, steps=steps, clock=clock)
            if loss is None:
                return None, per_token(here, hidden_ND, chunk=chunk)
            return loss_pass(here, hidden_ND, loss, chunk=chunk)

        return self.apply(signals, passed, states_ND)

    def apply(
        self, signals: Mapping[str, TeacherSignal], passed: PassOver, states_ND: Tensor | None = None
    ) -> TokenLosses:
        """Applies the method; it does not ask what a step decides, which only `passed` knows.

        Args:
            signals: Each view's signal at the steps that count.
            passed: Evaluates functions of the context at these steps.
            states_ND: The student's hidden states there, for terms that compare them.
        """
        begun = self._read()
        valid = {name: signal.valid_N for name, signal in signals.items()}

        @torch.no_grad()
        def evaluated(values: Values, steps: Steps, clock: Clock) -> dict[str, Tensor]:
            return passed(values, steps, clock, None)[1]

        steps = scored(self.method, self.steps, begun, valid, evaluated, several=False)
        device = steps.tokens_N.device
        counted_N = {name: in_N.to(device) for name, in_N in counted(self.method, valid, len(steps)).items()}
        scale_N = batch_scales(self.method, steps, counted_N)
        state, clock = self._controlled(steps, begun, valid, evaluated)

        def terms_of(values: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, dict[str, TokenLoss]]:
            return losses(
                self.method,
                values,
                clock,
                counted_N={name: in_N[rows] for name, in_N in counted_N.items()},
                scale_N={name: scale_N[rows] for name, scale_N in scale_N.items()},
            )

        scalar: Loss = lambda values, rows: terms_of(values, rows)[0]  # noqa: E731
        loss, values = passed(term_values(self.method), steps, clock, scalar)
        assert loss is not None
        if outside := hidden_values(self.method, states_ND, signals, steps, clock):
            loss, values = loss + terms_of(outside, slice(None))[0], {**values, **outside}
        terms = terms_of(values, slice(None))[1]
        return TokenLosses(loss, {name: self._spread(term) for name, term in terms.items()}, state)

    def _read(self) -> Clock:
        """The clock with the controllers' numbers before this batch."""
        states = ((controller, self._state_of(controller)) for controller in self.method.controllers)
        controller_outputs = {f"{c.name}.{number}": x for c, state in states for number, x in c.numbers(state).items()}
        return replace(self.clock, controller_outputs=controller_outputs)

    def _state_of(self, controller: Controller) -> State:
        """The given state of a controller, or its state at the start of a run."""
        name = controller.name
        given = {key.removeprefix(f"{name}/"): x for key, x in self.state.items() if key.startswith(f"{name}/")}
        return given or controller.init(generator(0, "controllers", name))

    def _controlled(
        self, steps: Steps, clock: Clock, valid: Mapping[str, Tensor | None], evaluate: Evaluate
    ) -> tuple[dict[str, Tensor], Clock]:
        """The state of all controllers after this batch, flat, and the clock with the numbers that its terms read."""
        flat, controller_outputs = dict(self.state), dict[str, float]()
        for controller in self.method.controllers:
            name, state = controller.name, self._state_of(controller)
            observation = observe(controller, steps, clock, valid, evaluate) if len(steps) else None
            if observation is not None:
                state = controller.act(state, observation, generator(0, "controllers", name, clock.step))
            controller_outputs |= {f"{name}.{number}": x for number, x in controller.numbers(state).items()}
            if observation is not None and not controller.again:
                state = controller.learn(state, observation, {})
            flat |= {f"{name}/{key}": x for key, x in state.items()}
        return flat, replace(clock, controller_outputs=controller_outputs)

    def _check_lists(self, name: str, signal: TeacherSignal, width: int) -> None:
        """Refuses lists of ids that are shorter than needed, or that hold ids outside the student's vocabulary."""
        for kind, (ids_NK, whole) in signal.lists(width).items():
            wanted = max((need.k for need in self.method.needs(name) if need.kind == kind), default=0)
            kept = ids_NK.shape[1]
            if kept < wanted and not whole:
                requested = f"the top-{wanted} of '{name}', which gives its top-{kept}"
                about = f"log-probs of the student's top-{wanted} from '{name}', which gives those of {kept} ids"
                raise UserError(f"method '{self.method.name}' needs {requested if kind == 'topk' else about}")
            if ids_NK.numel() and int(ids_NK.max()) >= width:
                raise UserError(f"'{name}' names id {int(ids_NK.max())}; the student's vocabulary has {width}")

    def _spread(self, term: TokenLoss) -> TokenLoss:
        """Spreads a term over all N steps; it is 0 at steps that do not count."""

        def spread(values: Tensor) -> Tensor:
            if len(self.kept_N) == len(self.tokens_N):
                return values
            empty_N = torch.zeros(len(self.tokens_N), dtype=values.dtype, device=values.device)
            return empty_N.index_copy(0, self.kept_N, values)

        return TokenLoss(spread(term.value_N), spread(term.weight_N), spread(term.counted_N))


def _check_own_logp(name: str, values: Tensor | None, mask: Tensor | None) -> None:
    """Refuses numbers at counted steps that are no log-probs; NaN of the engine means "not known"."""
    if values is None:
        return
    kept = values if mask is None else values[mask.bool()]
    bad = kept.isinf() | (kept.isnan() if name == "old_logp" else False)
    if bool(bad.any()):
        raise UserError(
            f"{name} holds {float(kept[bad][0]):g}, which is no log-prob of a generated token; give finite nats"
        )


def confidence_RK(given: Confidences, rollouts: int) -> Tensor:
    """The confidences of K teachers about each of R rollouts, [R, K], float64; NaN where one says nothing.

    Raises:
        UserError: They are neither [K] nor [R, K].
    """
    values = given
    if not isinstance(values, Tensor):
        try:
            rows = [[_nan(own) for own in row] if isinstance(row, Sequence) else _nan(row) for row in values]
            values = torch.tensor(rows, dtype=torch.float64)
        except (TypeError, ValueError):
            raise UserError("confidences must be numbers, [K] or [R, K], None where a teacher says nothing") from None
    values = values.detach().double()
    whole = values.expand(rollouts, -1) if values.ndim == 1 else values
    if whole.ndim != 2 or len(whole) != rollouts or not whole.shape[1]:
        raise UserError(
            f"confidences must be [K] or [R, K] with R = {rollouts}, one for each teacher, not {tuple(values.shape)}"
        )
    return whole


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _per_step(values: Tensor, rollout_N: Tensor) -> Tensor:
    """Repeats a number per rollout at each of its steps; a number per step stays."""
    # One rollout per step fits both; the index is then the identity, or the caller's own order of rollouts.
    per_step = values.shape == rollout_N.shape
    return values if per_step and (not len(values) or len(values) != int(rollout_N.max()) + 1) else values[rollout_N]


def as_head(head: Tensor | Head) -> Head:
    """A head from a `Head` or from its weight [V, D]."""
    return head if isinstance(head, Head) else Head(head)
