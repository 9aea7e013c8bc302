"""A method applied to one whole optimizer batch that a caller holds: what both functions of `retort.functional` share.

Axis letters: see `retort.types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retort.apply import (
    batch_shares,
    check_needs,
    counted,
    finish_stats,
    hidden_values,
    losses,
    means,
    part_values,
    stat_values,
    stored_values,
    term_values,
)
from retort.controllers import Controller, Seen, State
from retort.errors import UserError
from retort.method import Method
from retort.models.core import Core, Steps, loss_pass, per_token
from retort.models.head import Head
from retort.parts import Layout
from retort.registry import load
from retort.signals import Dense, TeacherSignal
from retort.streams import generator
from retort.types import TokenLoss, TokenLosses


@dataclass(frozen=True, eq=False)
class OneBatch:
    """The checked arguments that both entry points share, cut to the steps that count."""

    method: Method
    tokens_N: Tensor
    kept_N: Tensor
    steps: Steps
    layout: Layout
    state: Mapping[str, Tensor]

    @staticmethod
    def of(
        method: Method | str,
        tokens: Tensor,
        mask: Tensor | None,
        turns: Tensor | None,
        rollouts: Tensor | None,
        groups: Tensor | None,
        rewards: Tensor | None,
        old_logp: Tensor | None,
        engine_logp: Tensor | None,
        longest: int | None,
        step: int,
        total_steps: int | None,
        state: Mapping[str, Tensor] | None,
    ) -> OneBatch:
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise UserError(f"tokens must be [N] integers, not {tuple(tokens.shape)} {tokens.dtype}")
        per_step = {
            "mask": mask,
            "turns": turns,
            "rollouts": rollouts,
            "old_logp": old_logp,
            "engine_logp": engine_logp,
        }
        for name, values in per_step.items():
            if values is not None and values.shape != tokens.shape:
                raise UserError(f"{name} must be [N] = {tuple(tokens.shape)}, not {tuple(values.shape)}")
        for name, values in {"old_logp": old_logp, "engine_logp": engine_logp}.items():
            _check_own_logp(name, values, mask)
        rollout_N = torch.zeros_like(tokens) if rollouts is None else rollouts
        count = int(rollout_N.max()) + 1 if len(rollout_N) else 0
        for name, values in {"groups": groups, "rewards": rewards}.items():
            if values is not None and values.shape not in ((count,), tokens.shape):
                raise UserError(
                    f"{name} must be [R] = ({count},), one per rollout, or repeated per step, not {tuple(values.shape)}"
                )
        kept_N = torch.arange(len(tokens), device=tokens.device) if mask is None else mask.bool().nonzero().squeeze(-1)
        steps = Steps(
            tokens_N=tokens[kept_N],
            stored={} if old_logp is None else {"old_logp": old_logp.detach()[kept_N]},
            engine_logp_N=None if engine_logp is None else engine_logp.detach()[kept_N],
            rollout_N=rollout_N[kept_N],
            turn_N=None if turns is None else turns[kept_N],
            step=step,
            total_steps=total_steps,
        )
        found = load(method) if isinstance(method, str) else method
        layout = Layout(
            rollout_N[kept_N],
            reward_N=None if rewards is None else _per_step(rewards, rollout_N)[kept_N].double(),
            group_N=None if groups is None else _per_step(groups, rollout_N)[kept_N],
            longest=longest,
            step=step,
        )
        for name, given, wants in (("rewards", rewards, found.wants_rewards), ("groups", groups, found.wants_groups)):
            if wants is not None and given is None:
                raise UserError(f"method '{found.name}' needs {name} ({wants}), which were not given")
        if found.wants_rewards is not None and bool(layout.reward_N is not None and layout.reward_N.isnan().any()):
            raise UserError(f"method '{found.name}' needs the reward of every rollout; one is NaN")
        return OneBatch(found, tokens, kept_N, steps, layout, dict(state or {}))

    @property
    def rollout_N(self) -> Tensor:
        """Rollout of each step that counts."""
        return self.layout.rollout_N

    def check_rows(self, name: str, values: Tensor, ndim: int) -> None:
        if values.ndim != ndim or len(values) != len(self.tokens_N):
            raise UserError(f"{name} must have one row per token ({len(self.tokens_N)}), not {tuple(values.shape)}")

    def signal(self, name: str, given: Tensor | TeacherSignal) -> TeacherSignal:
        """The steps that count of logits [N, V] or of a signal about all N steps."""
        if isinstance(given, TeacherSignal):
            given.check_tokens(self.tokens_N)
            return given.select(self.kept_N)
        self.check_rows(f"{name} logits", given, 2)
        return Dense.of(given[self.kept_N], self.steps.tokens_N, source=name, temperature=self.method.temperature)

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
        """The method on hidden states and a head, or on logits and no head; `states_ND` are compared as they are."""
        check_needs(self.method, {name: signal.offers for name, signal in signals.items()})
        for name, signal in signals.items():
            self._check_lists(name, signal, width)
        vocab = min([width, *(signal.width for signal in signals.values() if isinstance(signal, Dense))])
        tokens_N = self.steps.tokens_N
        whole = head is None or not head.shard.spread  # a rank with some of the ids does not know how many there are
        if whole and len(tokens_N) and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab:
            raise UserError(f"tokens hold ids outside the shared vocabulary of {vocab}")
        core = Core(term_values(self.method), self._read(), signals, head, vocab, self.method.temperature)
        if self.method.stats:
            core = replace(core, steps=self._with_stats(core, hidden_ND, chunk))
        if self.method.weighs_batch:
            core = replace(core, steps=self._weighed(core, hidden_ND, chunk))
        valid = {name: signal.valid_N for name, signal in signals.items()}
        counted_N = {name: in_N.to(tokens_N.device) for name, in_N in counted(self.method, valid, core.count).items()}
        shares_N = batch_shares(self.method, counted_N=counted_N, rollout_N=self.rollout_N, stored=core.steps.stored)
        state, readings = self._controlled(core, hidden_ND, chunk)
        core = replace(core, steps=replace(core.steps, readings=readings))

        def terms_of(values: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, dict[str, TokenLoss]]:
            here = {name: share_N[rows] for name, share_N in shares_N.items()}
            step, total = core.steps.step, core.steps.total_steps
            return losses(
                self.method,
                values,
                counted_N={name: in_N[rows] for name, in_N in counted_N.items()},
                shares_N=here,
                step=step,
                total_steps=total,
                readings=readings,
            )

        loss, values = loss_pass(core, hidden_ND, lambda values, rows: terms_of(values, rows)[0], chunk=chunk)
        if outside := hidden_values(self.method, states_ND, signals):
            loss, values = loss + terms_of(outside, slice(None))[0], {**values, **outside}
        terms = terms_of(values, slice(None))[1]
        return TokenLosses(loss, {name: self._spread(term) for name, term in terms.items()}, state)

    def _read(self) -> Steps:
        """The steps with the numbers of the controllers as they are before this batch."""
        states = ((controller, self._state_of(controller)) for controller in self.method.controllers)
        readings = {f"{c.name}.{number}": x for c, state in states for number, x in c.numbers(state).items()}
        return replace(self.steps, readings=readings)

    def _state_of(self, controller: Controller) -> State:
        """What was given of a controller's state, or that at the start of a run."""
        name = controller.name
        given = {key.removeprefix(f"{name}/"): x for key, x in self.state.items() if key.startswith(f"{name}/")}
        return given or controller.init(generator(0, "controllers", name))

    def _controlled(
        self, core: Core, hidden_ND: Tensor, chunk: int | None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The state of all controllers after this batch, flat, and the numbers that its terms read."""
        flat, readings = dict(self.state), dict[str, float]()
        for controller in self.method.controllers:
            name, step, state = controller.name, self.steps.step, self._state_of(controller)
            seen = None
            if core.count:
                rollouts = self.layout.rollouts()
                seen = Seen(
                    self._means(core, controller, hidden_ND, chunk),
                    step,
                    self.steps.total_steps,
                    rollouts.reward_R,
                    rollouts.steps_R,
                    self.layout.longest,
                )
                state = controller.act(state, seen, generator(0, "controllers", name, step))
            readings |= {f"{name}.{number}": x for number, x in controller.numbers(state).items()}
            if seen is not None and not controller.again:
                state = controller.learn(state, seen, {})
            flat |= {f"{name}/{key}": x for key, x in state.items()}
        return flat, readings

    @torch.no_grad()
    def _means(self, core: Core, controller: Controller, hidden_ND: Tensor, chunk: int | None) -> dict[str, float]:
        """Of what a controller sees."""
        if not controller.sees:
            return {}
        values = part_values(controller.sees, controller.against)
        found = per_token(replace(core, values=values), hidden_ND, chunk=chunk)
        return means(found, core.signals[controller.against].valid_N)

    def _with_stats(self, core: Core, hidden_ND: Tensor, chunk: int | None) -> Steps:
        """The steps with what the method reads of the whole batch."""
        with torch.no_grad():
            found = per_token(replace(core, values=stat_values(self.method)), hidden_ND, chunk=chunk)
        valid = {name: signal.valid_N for name, signal in core.signals.items()}
        layout = replace(self.layout, readings=core.steps.readings)
        stats = finish_stats(self.method, found, layout, valid)
        return replace(core.steps, stored={**core.steps.stored, **stats})

    def _weighed(self, core: Core, hidden_ND: Tensor, chunk: int | None) -> Steps:
        """The steps with the weights that a denominator is the sum of."""
        with torch.no_grad():
            found = per_token(
                replace(core, values=stored_values(self.method, weights_only=True)), hidden_ND, chunk=chunk
            )
        return replace(core.steps, stored={**core.steps.stored, **found})

    def _check_lists(self, name: str, signal: TeacherSignal, width: int) -> None:
        """Refuses lists of ids that are shorter than the method needs, or that hold ids the student does not have."""
        for kind, (ids_NK, whole) in signal.lists(width).items():
            wanted = max((need.k for need in self.method.needs(name) if need.kind == kind), default=0)
            kept = ids_NK.shape[1]
            if kept < wanted and not whole:
                asked = f"the top-{wanted} of '{name}', which gives its top-{kept}"
                about = f"log-probs of the student's top-{wanted} from '{name}', which gives those of {kept} ids"
                raise UserError(f"method '{self.method.name}' needs {asked if kind == 'topk' else about}")
            if ids_NK.numel() and int(ids_NK.max()) >= width:
                raise UserError(f"'{name}' names id {int(ids_NK.max())}; the student's vocabulary has {width}")

    def _spread(self, term: TokenLoss) -> TokenLoss:
        """Back to all N steps; 0 where the mask is."""

        def spread(values: Tensor) -> Tensor:
            if len(self.kept_N) == len(self.tokens_N):
                return values
            empty_N = torch.zeros(len(self.tokens_N), dtype=values.dtype, device=values.device)
            return empty_N.index_copy(0, self.kept_N, values)

        return TokenLoss(spread(term.value_N), spread(term.weight_N), spread(term.counted_N))


def _check_own_logp(name: str, values: Tensor | None, mask: Tensor | None) -> None:
    """Refuses numbers of the student's that are no log-probs, where they count; NaN of the engine is "not known"."""
    if values is None:
        return
    kept = values if mask is None else values[mask.bool()]
    bad = kept.isinf() | (kept.isnan() if name == "old_logp" else False)
    if bool(bad.any()):
        raise UserError(
            f"{name} holds {float(kept[bad][0]):g}, which is no log-prob of a token that was written; give finite nats"
        )


def _per_step(values: Tensor, rollout_N: Tensor) -> Tensor:
    """A number per rollout or per step as one per step."""
    # One rollout per step is both; then the index is the identity, or the caller's own order of rollouts.
    return values if values.shape == rollout_N.shape and len(values) != int(rollout_N.max()) + 1 else values[rollout_N]


def as_head(head: Tensor | Head) -> Head:
    """A head, from itself or from its weight [V, D]."""
    return head if isinstance(head, Head) else Head(head)
