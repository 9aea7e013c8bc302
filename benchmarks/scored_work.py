"""What `teachers.py` has scored, by whom, and what is read of the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.align.pair import SameIds
from retort.core.needs import DENSE, ENTROPY, HIDDEN, SAMPLED, Need, logp_at
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, Message, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.models.endpoint import Endpoint
from retort.models.load import load_model
from retort.models.server import Server
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.tasks import countdown
from retort.teachers.base import ScoreRequest
from retort.teachers.endpoint import EndpointTeacher
from retort.teachers.local import LocalTeacher
from retort.teachers.served import ServedTeacher
from retort.teachers.view import View
from retort.wire import Client

#: Kept ids of a top-k and of candidates.
K = 16
#: Tokens of one pass, as a run's default has it.
BUDGET = 16_384
#: What a method may ask for, by its name in the table.
KINDS: Mapping[str, frozenset[Need]] = {
    "log-prob of the sampled token": frozenset({SAMPLED}),
    f"top-{K} and entropy": frozenset({SAMPLED, Need("topk", K), ENTROPY}),
    f"log-probs of {K} ids of the student's": frozenset({SAMPLED, logp_at(K)}),
    "hidden states": frozenset({HIDDEN}),
    "whole distribution": frozenset({DENSE}),
}


@dataclass(frozen=True, eq=False)
class Work:
    """What is scored.

    Attributes:
        groups: Rollouts.
        tokens_N: Their generated tokens.
        ids_NK: Ids of the student's choice at each of their tokens.
        vocab: Number of ids.
    """

    groups: list[Group]
    tokens_N: Tensor
    ids_NK: Tensor
    vocab: int

    @property
    def steps(self) -> int:
        """Scored tokens."""
        return len(self.tokens_N)

    @staticmethod
    def of(contexts: Sequence[tuple[Prompt, TokenSequence]], written: Sequence[Sequence[int]], vocab: int) -> Work:
        """Completions behind their contexts; the student's ids are drawn."""
        pairs = zip(contexts, written, strict=True)
        rollouts = [
            Rollout(prompt, (context.then(list(own), decided=True),), member=member)
            for member, ((prompt, context), own) in enumerate(pairs)
        ]
        groups = in_groups(rollouts)
        tokens_N = Pack.of([own for group in groups for own in group]).steps.tokens_N
        draw = torch.Generator().manual_seed(1)
        ids_NK = torch.stack([torch.randint(vocab, (8 * K,), generator=draw).unique()[:K] for _ in tokens_N])
        return Work(groups, tokens_N, ids_NK, vocab)


def random_work(vocab: int, prompts: int, samples: int, length: int) -> Work:
    """Random completions of random prompts, all of one length."""
    draw = torch.Generator().manual_seed(0)
    contexts, written = list[tuple[Prompt, TokenSequence]](), list[list[int]]()
    for number in range(prompts):
        ids = torch.randint(1, vocab, (length,), generator=draw).tolist()
        prompt = Prompt(f"p{number}", (Message("user", " ".join(f"w{token}" for token in ids)),))
        for _ in range(samples):
            contexts.append((prompt, TokenSequence.of(ids)))
            written.append(torch.randint(1, vocab, (length,), generator=draw).tolist())
    return Work.of(contexts, written, vocab)


def written_work(prompts: int, longest: int = 12) -> Work:
    """Completions that the built-in student generates."""
    from retort.align.chat import Renderer

    lm = load(str(countdown.student_path()))
    render, draw = Renderer(lm.tokenizer), torch.Generator().manual_seed(0)
    contexts = list[tuple[Prompt, TokenSequence]]()
    for row in countdown.rows("train", prompts):
        prompt = Prompt(str(row["id"]), (Message("user", str(row["prompt"])),))
        contexts.append((prompt, render(prompt)))
    asked = [Request(own, torch.rand(longest, generator=draw, dtype=torch.float64)) for _, own in contexts]
    written = HFEngine(lm, vocab=lm.head().width, max_parallel=len(asked)).generate(asked, Sampling(longest))
    return Work.of(contexts, [own.ids for own in written], lm.head().width)


def load(name: str, **settings: Any) -> Any:
    """A frozen model in this process, in fp32 unless told otherwise."""
    given = {"precision": "fp32", "device": torch.device("cpu"), **settings}
    return load_model(name, role="teacher", **given)


def served(url: str, vocab: int, *, narrow: bool = False, precision: str = "fp32") -> ServedTeacher:
    """The teacher behind a `retort serve`."""
    lm = load(url, source=Server.at(Client(url), narrow=narrow), precision=precision)
    return ServedTeacher(lm, alignment=SameIds(vocab), batch_tokens=BUDGET)


def endpoint(url: str, lm: Any, vocab: int) -> EndpointTeacher:
    """The teacher behind a vLLM server of the same model."""
    model = Endpoint.at(Client(url), None, "", same=True).open(lm.tokenizer, lm.stops)
    return EndpointTeacher(model, alignment=SameIds(vocab), batch_tokens=BUDGET)


def local(lm: Any, vocab: int) -> LocalTeacher:
    """The teacher in this process."""
    return LocalTeacher(lm, alignment=SameIds(vocab), batch_tokens=BUDGET)


def gives(teacher: Any, kind: str) -> bool:
    """Whether a teacher is asked for that kind: vLLM has no hidden states, and not so many ids in a distribution."""
    return not isinstance(teacher, EndpointTeacher) or KINDS[kind].isdisjoint({HIDDEN, DENSE})


def numbers(teacher: Any, work: Work, kind: str) -> list[Tensor]:
    """What a method reads of one kind; of vLLM without the entropy, which it has not.

    A whole distribution is multiplied out block by block, and summed rather than kept.
    """
    needs = KINDS[kind]
    if isinstance(teacher, EndpointTeacher):
        needs -= {ENTROPY}
    ids_NK = work.ids_NK if logp_at(K) in needs else None
    signal = teacher.score(work.groups, ScoreRequest(View(), needs, 1.0, ids_NK))
    if HIDDEN in needs:
        return [signal.hidden_states()]
    if DENSE in needs:
        return [torch.cat([block.logp_NV.sum(-1) for block in in_blocks(signal, work.vocab)])]
    rows = signal.rows(slice(None), work.vocab)
    found = [rows.sampled_logp_N]
    found += [rows.logp_at(ids_NK)] if ids_NK is not None else []
    found += [rows.topk(K)[1]] if Need("topk", K) in needs else []
    return [*found, rows.entropy_N] if ENTROPY in needs else found


def logp_NV(teacher: Any, work: Work) -> Tensor:
    """All log-probs of a teacher with a small vocabulary."""
    return teacher.score(work.groups, ScoreRequest(View(), KINDS["whole distribution"])).rows(slice(None)).logp_NV


@dataclass
class Spent:
    """What a call took: seconds, and seconds of CPU of this process; and what came out."""

    wall: float
    cpu: float
    found: list[Tensor]

    @staticmethod
    def by(run: Callable[[], list[Tensor]]) -> Spent:
        """Calls it."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = run()
        return Spent(time.perf_counter() - wall, time.process_time() - cpu, found)


def apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of what both hold."""
    return max(float((one.float() - other.float()).abs().max()) for one, other in zip(some, others, strict=False))
