"""Measures how far a teacher's token can be trusted, and what predicts it: entropies or the position.

Three papers gate a self-teacher in three ways. EGRSD (arXiv 2605.13255) trusts it where *its own* entropy is low, DASD
(2605.22263) where the *student's* is, and PW-OPSD (2605.21606) finds that both say little and the *position* much. This
measures all of them on one model: in an answer of the student's, a token of the teacher's is forced at some places, the
student goes on alone, and a verifier says where that ends. The protocol is reconstructed from PW-OPSD's account of its
branch-viability diagnostic. Tokens are drawn from the teacher's distribution, which is what distillation moves a
student towards: the second best of a teacher that is sure is a token that it would never write. Axis letters: see
`retort.core`; M is the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.align.chat import Renderer
from retort.align.stops import StopTokens
from retort.align.text import completion_text
from retort.core.needs import DENSE, can_meet, listed
from retort.core.random_streams import UniformStream, generator, permutation
from retort.core.rollouts import RIGHT_FROM, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import TeacherSignal
from retort.errors import UserError
from retort.evaluate.agreement import spearman
from retort.evaluate.passk import Estimate
from retort.evaluate.ranks import clustered_auroc
from retort.rewards.base import Grader, graded
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import Task, run_episodes
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.view import View

#: What is asked to tell, as a number that is high where the teacher is to be trusted: its name, and who says so.
PREDICTORS = {
    "low teacher entropy": "EGRSD",
    "low student entropy": "DASD",
    "late position": "PW-OPSD",
    "teacher's log-prob": "",
    "log-ratio to the student": "",
}


@dataclass(frozen=True)
class Branch:
    """A token of the teacher's, forced upon the student.

    Attributes:
        problem: Number of the prompt.
        position: Position in the completion, as a share of its length.
        teacher_entropy, student_entropy: At that position, nats.
        teacher_logp, student_logp: Of the forced token, nats.
        viable: Whether the completion that the student then generated is right.
        alone: Whether the completion from the same position without the teacher is right.
        shift: Log-prob of the teacher minus the student's, of the token that the student generated there, nats.
    """

    problem: int
    position: float
    teacher_entropy: float
    student_entropy: float
    teacher_logp: float
    student_logp: float
    viable: bool
    alone: bool
    shift: float

    @property
    def scores(self) -> tuple[float, ...]:
        """In the order of `PREDICTORS`."""
        ratio = self.teacher_logp - self.student_logp
        return -self.teacher_entropy, -self.student_entropy, self.position, self.teacher_logp, ratio


@dataclass(frozen=True, eq=False)
class Protocol:
    """Settings of the measurement.

    Attributes:
        places: Positions per completion, drawn evenly.
        candidates: Tokens drawn from the teacher's distribution and forced at each.
        max_new_tokens: Longest completion, tokens.
        temperature: Sampling temperature of the student.
        samples: Completions per prompt, for views that show siblings; tokens are forced into the first one with a
            context.
        seed: Seed of the positions and of all sampling.
    """

    places: int = 4
    candidates: int = 2
    max_new_tokens: int = 1024
    temperature: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.places, self.candidates, self.samples) < 1:
            counts = f"places ({self.places}), candidates ({self.candidates}) and samples ({self.samples})"
            raise UserError(f"{counts} must be at least 1")


@dataclass(frozen=True, eq=False)
class Student:
    """The student into whose completions tokens are forced.

    Attributes:
        engine: Generates as the student.
        own: Gives the student's own distributions.
        render: Gives the ids of a prompt, as the student reads it.
        stops: Tokens that end its completions.
        parallel: Completions generated at once.
    """

    engine: Engine
    own: Teacher
    render: Renderer
    stops: StopTokens
    parallel: int


@dataclass(frozen=True)
class _Fork:
    """A position of a completion where the teacher's candidates are tried."""

    rollout: int
    place: int
    step: int


def branches(
    student: Student,
    teacher: Teacher,
    view: View,
    prompts: Sequence[Prompt],
    verifier: Grader,
    protocol: Protocol,
    progress: Callable[[int, int], None] | None = None,
) -> list[Branch]:
    """Generates completions, forces the teacher's tokens into them, and lets the student go on.

    Args:
        student: The model that generates.
        teacher: The model whose tokens are forced.
        view: The teacher's view; prompts for which it has no context are left out.
        prompts: Prompts to complete; the verifier must be able to grade all.
        verifier: Grades completions.
        protocol: The settings of the measurement.
        progress: Called with what has been written and what is to be, answers.

    Raises:
        UserError: A teacher that cannot hand over its whole distribution, from which tokens are drawn.
    """
    if not can_meet(teacher.capabilities, DENSE):
        gives = listed(teacher.capabilities)
        raise UserError(f"trust draws tokens from {DENSE} of the teacher, and {teacher.name} gives only: {gives}")
    spine = _spine(student, prompts, verifier, protocol)
    pack = Pack.of(spine)
    groups = in_groups(spine)
    said = teacher.score(groups, ScoreRequest(view, frozenset({DENSE})))
    forks = _forks(pack, said, protocol)
    if not forks:
        return []
    index_M = torch.tensor([fork.step for fork in forks])
    draw = generator(protocol.seed, "evaluation", "candidates")
    ids_MK = _drawn(said, index_M, protocol.candidates, draw)
    theirs = _at(said, index_M, ids_MK)
    ours = _at(student.own.score(groups, ScoreRequest(View(), frozenset({DENSE}))), index_M, ids_MK)
    tasks: list[Task] = []
    begun: list[TokenSequence] = []
    for number, fork in enumerate(forks):
        before = spine[fork.rollout].sequence.before(fork.place)
        for choice in range(protocol.candidates + 1):
            forced = [] if choice == 0 else [int(ids_MK[number, choice - 1])]
            begun.append(before.then(forced, decided=True))
            uniform_stream = UniformStream(protocol.seed, "evaluation", "branch", number, choice)
            tasks.append(Task(spine[fork.rollout].prompt, begun[-1].read(), choice, uniform_stream, visit=number))
    right = _graded(student, tasks, begun, verifier, protocol, progress)
    found: list[Branch] = []
    for number, fork in enumerate(forks):
        first = number * (protocol.candidates + 1)
        for choice in range(protocol.candidates):
            found.append(
                Branch(
                    problem=fork.rollout // protocol.samples,
                    position=(fork.place + 0.5) / spine[fork.rollout].steps,
                    teacher_entropy=float(theirs["entropy"][number]),
                    student_entropy=float(ours["entropy"][number]),
                    teacher_logp=float(theirs["logp"][number, choice]),
                    student_logp=float(ours["logp"][number, choice]),
                    viable=right[first + 1 + choice],
                    alone=right[first],
                    shift=float(theirs["written"][number] - ours["written"][number]),
                )
            )
    return found


def _spine(student: Student, prompts: Sequence[Prompt], verifier: Grader, protocol: Protocol) -> list[Rollout]:
    """The student's own completions, graded, those to one prompt one after another."""
    longest, tasks = protocol.max_new_tokens, list[Task]()
    for prompt in prompts:
        for member in range(protocol.samples):
            uniform_stream = UniformStream(protocol.seed, "evaluation", "spine", prompt.id, member)
            tasks.append(Task(prompt, student.render(prompt), member, uniform_stream))
    written = run_episodes(student.engine, tasks, Sampling(longest, protocol.temperature))
    return graded(verifier, written)


def _forks(pack: Pack, said: TeacherSignal, protocol: Protocol) -> list[_Fork]:
    """Positions that the teacher scores, one drawn from each equal part of every completion."""
    found: list[_Fork] = []
    done = set[int]()
    for number, rollout in enumerate(pack.rollouts):
        index_A = pack.steps_of([number])
        silent = said.valid_N is not None and not bool(said.valid_N[index_A[0]])
        if silent or number // protocol.samples in done:
            continue
        done.add(number // protocol.samples)
        parts = min(protocol.places, rollout.steps)
        for part in range(parts):
            first, end = part * rollout.steps // parts, (part + 1) * rollout.steps // parts
            drawn = permutation(protocol.seed, "evaluation", "place", number, part, count=end - first)[0]
            found.append(_Fork(number, first + drawn, int(index_A[first + drawn])))
    return found


def _drawn(signal: TeacherSignal, index_M: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Tokens from the distributions at some steps, [M, count]; a few steps at a time, since each is over all ids."""
    found = [
        torch.multinomial(signal.rows(part).logp_NV.exp().cpu(), count, replacement=True, generator=draw)
        for part in index_M.split(64)
    ]
    return torch.cat(found)


def _at(signal: TeacherSignal, index_M: Tensor, ids_MK: Tensor) -> dict[str, Tensor]:
    """Entropies at some steps [M], log-probs [M] of what was written there, and those [M, K] of given ids."""
    entropies: list[Tensor] = []
    written: list[Tensor] = []
    logps: list[Tensor] = []
    for part, ids in zip(index_M.split(64), ids_MK.split(64), strict=True):
        rows = signal.rows(part)
        entropies.append(rows.entropy_N.cpu())
        written.append(rows.sampled_logp_N.cpu())
        logps.append(rows.logp_at(ids.to(rows.entropy_N.device)).cpu())
    return {"logp": torch.cat(logps), "entropy": torch.cat(entropies), "written": torch.cat(written)}


def _graded(
    student: Student,
    tasks: Sequence[Task],
    begun: Sequence[TokenSequence],
    verifier: Grader,
    protocol: Protocol,
    progress: Callable[[int, int], None] | None,
) -> list[bool]:
    """Whether each completion, its beginning included, is right; one that has ended already is not continued.

    Args:
        student: The model that generates.
        tasks: The rest of each completion.
        begun: Prompt and beginning of each.
        verifier: Grades completions.
        protocol: The settings of the measurement.
        progress: See `branches`.
    """
    engine, stops = student.engine, set(student.stops.ids)
    whole: dict[int, Rollout] = {}
    # What has been given counts towards the longest completion; where that is full or has ended, nothing is generated.
    rooms = [0 if _ended(own, stops) else protocol.max_new_tokens - own.steps for own in begun]
    if progress is not None:
        progress(0, len(tasks))
    for numbers in _blocks(rooms, [len(task.context) for task in tasks], student.parallel, engine.context):
        # Every token has a uniform random number of its own, so a completion with more room begins like a shorter one.
        room, more = rooms[numbers[0]], list[list[int]]([] for _ in numbers)
        if room > 0:
            chosen = [tasks[number] for number in numbers]
            written = run_episodes(engine, chosen, Sampling(room, protocol.temperature))
            more = [rollout.action_ids for rollout in written]
        for number, ids in zip(numbers, more, strict=True):
            sequence, task = begun[number].then(ids[: rooms[number]], decided=True), tasks[number]
            prompt_ids: list[int] = sequence.prefix.tokens_L.tolist()
            text = completion_text(engine.tokenizer, sequence.actions_A.tolist(), prompt_ids=prompt_ids)
            whole[number] = Rollout(task.prompt, (sequence,), member=task.member, visit=task.visit, text=text)
        if progress is not None:
            progress(len(whole), len(tasks))
    found = graded(verifier, [whole[n] for n in range(len(tasks))])
    return [(rollout.reward or 0.0) >= RIGHT_FROM for rollout in found]


def _ended(sequence: TokenSequence, stops: Set[int]) -> bool:
    """Whether its last token is a stop that was decided."""
    return bool(sequence.action_mask_L[-1]) and int(sequence.tokens_L[-1]) in stops


def _blocks(rooms: Sequence[int], prompts: Sequence[int], most: int, context: int) -> list[list[int]]:
    """Numbers of the answers to be written at once: most room first, and all fit with the room of the first.

    Args:
        rooms: Tokens left for each completion; those without room come last, by themselves.
        prompts: Tokens before each.
        most: Completions in a block.
        context: The longest sequence, tokens.
    """
    blocks: list[list[int]] = []
    for number in sorted(range(len(rooms)), key=lambda number: (-rooms[number], number)):
        first = rooms[blocks[-1][0]] if blocks else 0
        full = not blocks or len(blocks[-1]) == most or prompts[number] + first > context
        if full or (first > 0) != (rooms[number] > 0):
            blocks.append([])
        blocks[-1].append(number)
    return blocks


def trust(found: Sequence[Branch], *, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """Computes what predicts a token's worth: AUROC of each predictor with intervals over problems, and rates by bin.

    Two questions are asked. `viable` is PW-OPSD's: is the answer right that goes on from the teacher's token? That is
    easy late in a right answer, whoever wrote the token. `helps` is ours: where the student with the teacher's token
    and the student alone end differently, was it the one with the token that was right?

    `shift_against_entropy` is Spearman's correlation, over the places, of what the teacher would change about the
    student's own token with the student's entropy; DASD reports +.52.

    Args:
        found: The branches.
        seed: Seed of the bootstrap.
        draws: Resamples of the bootstrap.
    """
    differing = [branch for branch in found if branch.viable != branch.alone]
    rows: list[dict[str, Any]] = []
    for place, (name, claimed) in enumerate(PREDICTORS.items()):
        row: dict[str, Any] = {"predictor": name, "claimed_by": claimed}
        for label, chosen in (("viable", list(found)), ("helps", differing)):
            scores = torch.tensor([branch.scores[place] for branch in chosen], dtype=torch.float64)
            right = torch.tensor([branch.viable for branch in chosen], dtype=torch.bool)
            problems = [branch.problem for branch in chosen]
            cell = clustered_auroc(scores, right, problems, seed=seed, draws=draws)
            row[label] = None if cell is None else cell.plain()
        rows.append(row)
    return {
        "branches": len(found),
        "problems": len({branch.problem for branch in found}),
        "differing": len(differing),
        "viable": _share([branch.viable for branch in found]),
        "alone": _share([branch.alone for branch in found]),
        "shift_against_entropy": spearman(
            torch.tensor([branch.shift for branch in found]), torch.tensor([branch.student_entropy for branch in found])
        ),
        "predictors": rows,
        "bins": {
            "position": _bins(found, [branch.position for branch in found]),
            "teacher_entropy": _bins(found, [branch.teacher_entropy for branch in found]),
            "student_entropy": _bins(found, [branch.student_entropy for branch in found]),
        },
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))


def _bins(found: Sequence[Branch], values: Sequence[float], count: int = 6) -> list[dict[str, float]]:
    """Shares in bins of equally many branches, with intervals over problems."""
    order = sorted(range(len(found)), key=lambda number: values[number])
    bins: list[dict[str, float]] = []
    for part in range(count):
        inside = order[part * len(order) // count : (part + 1) * len(order) // count]
        if not inside:
            continue
        row = {"at": sum(values[number] for number in inside) / len(inside), "branches": float(len(inside))}
        for label in ("viable", "alone"):
            sums: dict[int, float] = {}
            counts: dict[int, float] = {}
            for branch in (found[number] for number in inside):
                sums[branch.problem] = sums.get(branch.problem, 0.0) + float(getattr(branch, label))
                counts[branch.problem] = counts.get(branch.problem, 0.0) + 1.0
            cell = Estimate.share(list(sums.values()), list(counts.values()))
            assert cell is not None  # no bin is empty
            row |= {label: cell.value, f"{label}_low": cell.low, f"{label}_high": cell.high}
        bins.append(row)
    return bins
