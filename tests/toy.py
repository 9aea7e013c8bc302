"""A batch of steps for any method, float64: hidden states and a head for the student and for every view."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from retort.core.losses import TokenLosses
from retort.core.needs import HIDDEN, Need
from retort.core.signals import Ahead, Dense, TeacherSignal
from retort.core.steps import Steps
from retort.functional import linear_token_losses, token_losses
from retort.method import Method

#: Two groups of siblings, each with a success and a failure.
GROUPS = torch.tensor([0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)


class Toy:
    """Five rollouts of two groups, of three turns each, and models that have nothing to do with each other."""

    def __init__(self, steps: int = 37, vocab: int = 23, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.hidden = torch.randn(steps, 6, generator=draw, dtype=torch.float64).requires_grad_()
        self.head = torch.randn(vocab, 6, generator=draw, dtype=torch.float64).requires_grad_()
        # As wide as the student's: some methods compare the two.
        self.teacher_hidden = torch.randn(steps, 6, generator=draw, dtype=torch.float64).requires_grad_()
        self.teacher_head = torch.randn(vocab, 6, generator=draw, dtype=torch.float64).requires_grad_()
        self.tokens = torch.randint(0, vocab, (steps,), generator=draw)
        self.rollouts = torch.arange(steps) * 5 // steps
        #: Of three steps each, the last one of what is left.
        self.turns = Steps.of(self.tokens, self.rollouts).position_N // 3
        self.old = (self.logits.detach().log_softmax(-1).gather(-1, self.tokens[:, None])).squeeze(-1) - 0.1
        self._others: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def logits(self) -> Tensor:
        """The student's."""
        return self.hidden @ self.head.T

    @property
    def teacher_logits(self) -> Tensor:
        """Under the view `teacher`."""
        return self.teacher_hidden @ self.teacher_head.T

    def view(self, name: str) -> tuple[Tensor, Tensor]:
        """Hidden states and head of a view, the same whenever it is asked for."""
        if name == "teacher":
            return self.teacher_hidden, self.teacher_head
        if name not in self._others:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            hidden = torch.randn(len(self.tokens), 7, generator=draw, dtype=torch.float64).requires_grad_()
            head = torch.randn(self.vocab, 7, generator=draw, dtype=torch.float64).requires_grad_()
            self._others[name] = hidden, head
        return self._others[name]

    def others(self, method: Method) -> dict[str, tuple[Tensor, Tensor]]:
        """Of all views but `teacher`."""
        return {name: self.view(name) for name in method.views if name != "teacher"}

    def frozen(self, method: Method) -> tuple[Tensor, ...]:
        """Everything that no gradient may reach."""
        return tuple(tensor for name in method.views for tensor in self.view(name))

    def losses(
        self, method: Method, rows: Tensor | None = None, *, same: bool = False, padded: int = 0, **more: Any
    ) -> TokenLosses:
        """The method on logits.

        Args:
            method: Any.
            rows: Which steps, in order; all by default.
            same: Every view says what the student says.
            padded: Ids that the views have beyond the student's.
            more: Of `token_losses`.
        """
        rows = torch.arange(len(self.tokens)) if rows is None else rows

        def logits(name: str) -> Tensor | TeacherSignal:
            hidden, head = (self.hidden, self.head) if same else self.view(name)
            found = (hidden @ head.T)[rows]
            found = torch.cat([found, torch.full((len(rows), padded), 50.0, dtype=torch.float64)], dim=-1)
            signal = Dense.of(found, self.tokens[rows], temperature=method.temperature, hidden_ND=hidden[rows])
            ahead = self.ahead(method.needs(name), signal, rows)
            return found if ahead is signal and HIDDEN not in method.needs(name) else ahead

        views = {name: logits(name) for name in method.views}
        number = self.rollouts[rows]
        given = {
            "student_logits": self.logits[rows],
            "student_hidden": self.hidden[rows],
            "teacher_logits": views.pop("teacher", None),
            "extra_views": views,
            "tokens": self.tokens[rows],
            "rollouts": number,
            "turns": self.turns[rows],
            "groups": GROUPS[number],
            "rewards": REWARDS[number],
            **more,
        }
        return token_losses(method, **given)

    def ahead(self, needs: frozenset[Need], signal: TeacherSignal, rows: Tensor | None = None) -> TeacherSignal:
        """The signal about some steps, with a look one token ahead where it is needed: any numbers between 0 and 1."""
        k = max((need.k for need in needs if need.kind == "lookahead"), default=0)
        if not k:
            return signal
        rows = torch.arange(len(self.tokens)) if rows is None else rows
        draw = torch.Generator().manual_seed(7)
        sure_NK = torch.rand(len(self.tokens), k, generator=draw, dtype=torch.float64)
        return Ahead.beside(signal, self.logits.detach().topk(k).indices[rows], sure_NK[rows])

    def linear(self, method: Method, **more: Any) -> TokenLosses:
        """The method through the loss core."""
        whole = Dense.of(self.teacher_logits, self.tokens, temperature=method.temperature)
        ahead = self.ahead(method.needs(), whole) if "teacher" in method.views else whole
        told = {} if ahead is whole else {"teacher_hidden": None, "teacher_head": None}
        views = self.others(method) if ahead is whole else {**self.others(method), "teacher": ahead}
        given = {
            "student_hidden": self.hidden,
            "student_head": self.head,
            "teacher_hidden": self.teacher_hidden,
            "teacher_head": self.teacher_head,
            "extra_views": views,
            "tokens": self.tokens,
            "rollouts": self.rollouts,
            "turns": self.turns,
            "groups": GROUPS,
            "rewards": REWARDS,
            **told,
            **more,
        }
        return linear_token_losses(method, **given)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """With respect to the student's hidden states and head."""
        return torch.autograd.grad(loss, (self.hidden, self.head))
