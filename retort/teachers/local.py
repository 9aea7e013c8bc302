"""A teacher in this process. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retort.align.chat import Renderer, TemplateOptions
from retort.align.pair import Alignment
from retort.core.head import Head
from retort.core.needs import Need, NeedKind
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, Pack, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Candidates, Dense, Factors, Sampled, TeacherSignal, TopK
from retort.errors import SignalError
from retort.models.lm import LanguageModel
from retort.teachers.base import ScoreRequest
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput


@dataclass(frozen=True)
class Prompts:
    """The prompts that a teacher reads before the rollouts of a pack.

    Attributes:
        ids: Prompt ids of each rollout; None where there is no context.
        cut: Number of rollouts with a privileged text cut to fit, or to nothing.
        shows: Number of rollouts that a template was shown for, by its name.
    """

    ids: Sequence[list[int] | None]
    cut: int = 0
    shows: Mapping[str, int] = field(default_factory=lambda: {})

    def valid_N(self, pack: Pack) -> Tensor | None:
        """See `TeacherSignal.valid_N`."""
        valid_R = torch.tensor([own is not None for own in self.ids])
        return None if bool(valid_R.all()) else valid_R[pack.steps.rollout_N]

    @property
    def counts(self) -> dict[str, float]:
        """See `TeacherSignal.counts`."""
        read = [len(own) for own in self.ids if own is not None]
        shows = {f"shows/{name}": float(count) for name, count in self.shows.items()}
        return {"no_context": len(self.ids) - len(read), "cut": self.cut, "prompt_tokens": sum(read), **shows}


class LocalTeacher:
    """A frozen model in this process; it meets any need but text."""

    capabilities: frozenset[NeedKind] = frozenset({"dense", "hidden"})

    def __init__(
        self,
        lm: LanguageModel,
        *,
        alignment: Alignment,
        batch_tokens: int,
        template_options: TemplateOptions | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Builds the teacher.

        Args:
            lm: The model.
            alignment: The alignment with the student's ids.
            batch_tokens: Tokens per forward pass.
            template_options: Options of chat templates.
            stage: Data that views may read besides a rollout and its siblings.
        """
        self.lm = lm
        self.alignment = alignment
        self.batch_tokens = batch_tokens
        self.template_options = template_options or TemplateOptions()
        self.stage = stage or Stage()
        self.name = lm.name
        self.render = Renderer(lm.tokenizer, self.template_options)

    def in_own_ids(self) -> LocalTeacher:
        """The same teacher for completions in its own ids with its own stop token, such as its own."""
        return self._changed(alignment=self.alignment.itself())

    def for_vocab(self, vocab: int) -> LocalTeacher:
        """The same teacher for fewer ids of the student's."""
        return self._changed(alignment=self.alignment.for_vocab(vocab))

    def on(self, stage: Stage) -> LocalTeacher:
        """The same teacher with other data for its views."""
        return self._changed(stage=stage)

    def _changed(self, **changed: Any) -> LocalTeacher:
        names = ("alignment", "batch_tokens", "template_options", "stage")
        return type(self)(self.lm, **{name: getattr(self, name) for name in names} | changed)

    def score(
        self, groups: Sequence[Group], request: ScoreRequest, *, head: Callable[[], Head] | None = None
    ) -> TeacherSignal:
        """See `Teacher`. A whole signal (`ScoreRequest.whole`) keeps hidden states, [N, D]; all others are reduced.

        Args:
            groups: The rollouts.
            request: The request.
            head: Gives the current head, where its weights move; None: the model's, which must not change.
        """
        pack, temperature = Pack.of([rollout for group in groups for rollout in group]), request.temperature
        prompts = self.prompts(pack, request.view)
        with self.lm.scoring():
            hidden_ND, logits = self._hidden(pack, prompts), self._logits
            unchanged = head or self._unchanged_head()
        valid_N = prompts.valid_N(pack)

        def rows(index_C: Tensor | slice) -> Tensor:
            return logits(unchanged(), hidden_ND[index_C], temperature)

        dense = Dense(
            pack.steps.tokens_N.to(self.lm.device),
            self.name,
            rows,
            self.alignment.vocab,
            temperature,
            valid_N=None if valid_N is None else valid_N.to(self.lm.device),
            counts=prompts.counts,
            hidden=lambda index_C: hidden_ND[index_C],
            factors=Factors(
                lambda index_C: hidden_ND[index_C],
                lambda hidden_CD, ids: self._logits_of(unchanged(), hidden_CD, ids, temperature),
            ),
        )
        return dense if request.whole else reduced(dense, request.needs, request.student_ids_NK)

    def _unchanged_head(self) -> Callable[[], Head]:
        if self.lm.sharding.spreads_head:
            kept = self.lm.head().each(lambda part: part.detach().clone())  # gathered, and gone after this pass
            return lambda: kept
        version = self.lm.head().weight_VD._version  # pyright: ignore[reportPrivateUsage]

        def head() -> Head:
            found = self.lm.head()
            if found.weight_VD._version != version:  # pyright: ignore[reportPrivateUsage]
                raise SignalError(f"{self.name}: the teacher's head changed after it had scored this batch")
            return found

        return head

    def prompts(self, pack: Pack, view: View) -> Prompts:
        """The prompts before the rollouts of a pack, as long as the stage and the model's context allow."""
        found, cut, shows = list[list[int] | None](), 0, dict[str, int]()
        for rollout, group in zip(pack.rollouts, pack.groups(), strict=True):
            longest = min(self.stage.longest or 2**31, self.lm.context - len(rollout.sequence.continuation))
            view_input = ViewInput(rollout, group, self.stage, shown=set())
            prompt = view.prompt(view_input)
            # A view shows texts that models generated: tokens that they spell must not end a run.
            render = self.render if view.render is None else partial(self.render, split=True)
            ids = None if prompt is None else render(prompt)
            if ids is not None and view.render is not None and len(ids) > longest:
                prompt = view_input.shortened(
                    view.prompt, lambda made, most=longest: len(self.render(made, split=True)) <= most
                )
                ids = None if prompt is None else render(prompt)
                cut += 1
            for name in (view_input.shown or ()) if ids is not None else ():
                shows[name] = shows.get(name, 0) + 1
            found.append(ids)
        return Prompts(found, cut, shows)

    def _hidden(self, pack: Pack, prompts: Prompts) -> Tensor:
        """Hidden states at every step, [N, D]; zeros where there is no context."""
        sequences = [
            self._sequence(rollout, ids)
            for rollout, ids in zip(pack.rollouts, prompts.ids, strict=True)
            if ids is not None
        ]
        valid_N = prompts.valid_N(pack)
        hidden_ND = self.lm.all_hidden(sequences, self.batch_tokens)
        if valid_N is None:
            return hidden_ND
        index_N = valid_N.nonzero().squeeze(-1).to(hidden_ND.device)
        return hidden_ND.new_zeros(len(pack), hidden_ND.shape[1]).index_copy_(0, index_N, hidden_ND)

    def _sequence(self, rollout: Rollout, prompt_ids: list[int]) -> TokenSequence:
        """The sequence that the teacher scores: its own rendering of the prompt, then the student's very tokens.

        Replies of an environment are as the student read them; stops that the student decided are mapped. All ids are
        the teacher's.
        """
        # The student's prompt may hold ids without a row in this model; the teacher renders its own, from text alone.
        self.lm.check_media([rollout.sequence], f"the rollout of prompt '{rollout.prompt.id}'")
        return self.alignment.read(rollout.sequence).with_prefix(TokenSequence.of(prompt_ids))

    def _logits(self, head: Head, hidden_CD: Tensor, temperature: float) -> Tensor:
        with torch.no_grad(), self.lm.compute():
            logits_CW = head.logits(hidden_CD, self.alignment.width)
        return self.alignment.logits(logits_CW, temperature)

    def _logits_of(self, head: Head, hidden_CD: Tensor, ids: slice, temperature: float) -> Tensor:
        """Some columns of `_logits`."""
        with torch.no_grad(), self.lm.compute():
            return self.alignment.logits_of(lambda theirs: head.rows(theirs).logits(hidden_CD), ids, temperature)


@torch.no_grad()
def reduced(dense: Dense, needs: frozenset[Need], student_ids_NK: Tensor | None = None) -> TeacherSignal:
    """The smallest signal that meets the needs, computed chunk by chunk.

    Args:
        dense: The whole distribution.
        needs: The needs.
        student_ids_NK: The ids of a need `logp_at`.
    """
    kinds, top_k = {need.kind for need in needs}, max((need.k for need in needs if need.kind == "topk"), default=0)
    blocks: list[dict[str, Tensor]] = []
    start = 0
    for rows in in_blocks(dense, dense.width):
        block = {"sampled": rows.sampled_logp_N}
        here = slice(start, start + len(block["sampled"]))
        if "entropy" in kinds:
            block["entropy"] = rows.entropy_N
        if top_k:
            block["ids"], block["logp"] = rows.topk(top_k)
        if student_ids_NK is not None:
            block["at"] = rows.logp_at(student_ids_NK[here].to(dense.tokens_N.device))
        blocks.append(block)
        start = here.stop
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    tokens_N, valid_N, counts = dense.tokens_N, dense.valid_N, dense.counts
    top = TopK(
        tokens_N,
        dense.source,
        ids_NK=found.get("ids", tokens_N.new_empty(dense.steps, 0)),
        logp_NK=found.get("logp", tokens_N.new_empty(dense.steps, 0, dtype=torch.float32)),
        sampled_logp_N=found["sampled"],
        entropy_N=found.get("entropy"),
        whole=top_k >= dense.width,
        valid_N=valid_N,
        counts=counts,
    )
    if student_ids_NK is None and (top_k or "entropy" in kinds):
        return top
    if student_ids_NK is None:
        return Sampled(tokens_N, dense.source, found["sampled"], valid_N=valid_N, counts=counts)
    ids_NK = student_ids_NK.to(tokens_N.device)
    return Candidates(
        tokens_N, dense.source, ids_NK, found["at"], found["sampled"], top, valid_N=valid_N, counts=counts
    )
