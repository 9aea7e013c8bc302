"""A teacher in this process. Axis letters: see `retort.types`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from retort.align.chat import Renderer
from retort.errors import SignalError
from retort.models.core import in_blocks
from retort.models.head import Head
from retort.models.lm import LanguageModel
from retort.signals import Dense, Sampled, TeacherSignal, TopK
from retort.teachers.view import View
from retort.types import Need, NeedKind, Pack, Rollout


class Teacher(Protocol):
    """Whoever answers the tokens of rollouts."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def capabilities(self) -> frozenset[NeedKind]:
        """What it can be asked for."""
        ...

    def answer(self, pack: Pack, needs: frozenset[Need], view: View, temperature: float) -> TeacherSignal:
        """What it says about every step of a pack: what `needs` asks for and no more."""
        ...


class LocalTeacher:
    """A frozen model in this process; it can be asked for anything but text."""

    capabilities: frozenset[NeedKind] = frozenset({"dense"})

    def __init__(
        self,
        lm: LanguageModel,
        *,
        vocab: int,
        stop_map: Mapping[int, int],
        batch_tokens: int,
        thinking: bool = False,
    ) -> None:
        """A teacher.

        Args:
            lm: The model.
            vocab: Ids that it shares with the student.
            stop_map: Swap of the student's stop token with the teacher's: applied to the answers it reads and, the
                same swap, to the distributions it returns, so that what it thinks of *its* stop is taught about the
                student's.
            batch_tokens: Tokens per forward pass.
            thinking: For chat templates that know it.
        """
        self.lm = lm
        self.vocab = vocab
        self.stop_map = dict(stop_map)
        self.batch_tokens = batch_tokens
        self.thinking = thinking
        self.name = lm.name
        self.render = Renderer(lm.tokenizer, thinking=thinking)

    def in_its_own_words(self) -> LocalTeacher:
        """The same teacher about answers that end in its own stop token, such as its own."""
        return LocalTeacher(
            self.lm, vocab=self.vocab, stop_map={}, batch_tokens=self.batch_tokens, thinking=self.thinking
        )

    def about(self, vocab: int) -> LocalTeacher:
        """The same teacher about fewer ids."""
        return LocalTeacher(
            self.lm, vocab=vocab, stop_map=self.stop_map, batch_tokens=self.batch_tokens, thinking=self.thinking
        )

    def answer(self, pack: Pack, needs: frozenset[Need], view: View, temperature: float) -> TeacherSignal:
        """See `Teacher`. A dense need keeps hidden states, [N, D]; others are reduced chunk by chunk at once."""
        hidden_ND, logits = self._hidden(pack, view), self._logits
        version = self.lm.head().weight_VD._version  # pyright: ignore[reportPrivateUsage]

        def rows(index_C: Tensor | slice) -> Tensor:
            head = self.lm.head()
            if head.weight_VD._version != version:  # pyright: ignore[reportPrivateUsage]
                raise SignalError(f"{self.name}: the teacher's head changed after it had scored this batch")
            return logits(head, hidden_ND[index_C])

        dense = Dense(pack.tokens_N.to(self.lm.device), self.name, rows, self.vocab, temperature)
        if any(need.kind == "dense" for need in needs):
            return dense
        return reduced(dense, needs)

    def _hidden(self, pack: Pack, view: View) -> Tensor:
        # Rollouts of one prompt share the object: it is rendered once.
        rendered = {id(rollout.prompt): rollout.prompt for rollout in pack.rollouts}
        prompt_ids = {key: self.render(view.prompt(prompt)) for key, prompt in rendered.items()}
        pairs = (self._sequence(rollout, prompt_ids[id(rollout.prompt)]) for rollout in pack.rollouts)
        tokens, acted = zip(*pairs, strict=True)
        return self.lm.all_hidden(tokens, acted, self.batch_tokens)

    def _sequence(self, rollout: Rollout, prompt_ids: list[int]) -> tuple[Tensor, Tensor]:
        """What the teacher reads: its own rendering of the prompt, then the very tokens that the student wrote."""
        actions = [self.stop_map.get(token, token) for token in rollout.action_ids]
        tokens_L = torch.tensor(prompt_ids + actions)
        return tokens_L, torch.arange(len(tokens_L)) >= len(prompt_ids)

    def _logits(self, head: Head, hidden_CD: Tensor) -> Tensor:
        with torch.no_grad(), self.lm.compute():
            logits_CV = head.logits(hidden_CD, self.vocab)
        if self.stop_map:
            here, there = list(self.stop_map), list(self.stop_map.values())
            logits_CV[:, here] = logits_CV[:, there]  # in place: the product is ours, and large
        return logits_CV


@torch.no_grad()
def reduced(dense: Dense, needs: frozenset[Need]) -> TeacherSignal:
    """The smallest signal that answers the needs, computed chunk by chunk."""
    top_k = max((need.k for need in needs if need.kind == "topk"), default=0)
    with_entropy = any(need.kind == "entropy" for need in needs)
    sampled: list[Tensor] = []
    entropies: list[Tensor] = []
    ids: list[Tensor] = []
    logps: list[Tensor] = []
    for rows in in_blocks(dense, dense.width):
        sampled.append(rows.sampled_logp_N)
        if with_entropy:
            entropies.append(rows.entropy_N)
        if top_k:
            ids_CK, logp_CK = rows.topk(top_k)
            ids.append(ids_CK)
            logps.append(logp_CK)
    if not top_k and not with_entropy:
        return Sampled(dense.tokens_N, dense.source, torch.cat(sampled))
    return TopK(
        dense.tokens_N,
        dense.source,
        ids_NK=torch.cat(ids) if ids else torch.empty(dense.steps, 0, dtype=torch.long),
        logp_NK=torch.cat(logps) if logps else torch.empty(dense.steps, 0),
        sampled_logp_N=torch.cat(sampled),
        entropy_N=torch.cat(entropies) if entropies else None,
        whole=top_k >= dense.width,
    )


def answers(
    teachers: Mapping[str, Teacher],
    views: Mapping[str, View],
    pack: Pack,
    needs: Callable[[str], frozenset[Need]],
    temperature: float,
) -> dict[str, TeacherSignal]:
    """Every view's signal about a pack, checked to be about its very tokens."""
    found = {name: teachers[name].answer(pack, needs(name), view, temperature) for name, view in views.items()}
    for signal in found.values():
        signal.check_tokens(pack.tokens_N)
    return found
