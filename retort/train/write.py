"""The batch of rollouts of one step: which prompts, who answers each, and what the verifier says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from retort.align.encode import Spelt, response_ids
from retort.align.text import completion_text
from retort.errors import RunError, UserError
from retort.rewards.verify import GivesFeedback, grade_known, parts_of
from retort.rollout.plan import EasyToHard, RolloutPlan
from retort.rollout.single_turn import Task, write
from retort.schedules import Reading
from retort.sequences import TokenSequence
from retort.streams import generator, permutation, uniforms
from retort.train.moment import Moment
from retort.train.setup import Setup
from retort.train.shelf import Shelf, key
from retort.types import Prompt, Rollout, Status


@dataclass(frozen=True)
class Visit:
    """A prompt, and how many times the run had been through the data when it came to it."""

    prompt: Prompt
    epoch: int


def visits(prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Visit]:
    """The prompts of a step: the data in an order shuffled anew every time through, cut into batches of `count`."""
    return _through(prompts, lambda epoch: permutation(seed, "data", epoch, count=len(prompts)), step, count)


def easy_to_hard(
    prompts: Sequence[Prompt],
    difficulty: Mapping[str, float],
    order: EasyToHard,
    *,
    seed: int,
    moment: Moment,
    count: int,
) -> list[Visit]:
    """The prompts of a step by difficulty, in [0, 1] by the prompt's id; see `EasyToHard`."""
    hard = [difficulty[prompt.id] for prompt in prompts]
    if order.kind == "sorted":

        def ranked(epoch: int) -> list[int]:
            draw = generator(seed, "difficulty", "noise", epoch)
            noisy = torch.tensor(hard, dtype=torch.float64)
            noisy = noisy + order.noise * torch.randn(len(hard), generator=draw, dtype=torch.float64)
            # From a shuffled order, so that what is equally hard does not come in the order of the file.
            shuffled = permutation(seed, "data", epoch, count=len(hard))
            return sorted(shuffled, key=lambda place: float(noisy[place]))

        return _through(prompts, ranked, moment.done, count)
    if order.kind == "balanced":
        chance = uniforms(seed, "data", "balanced", moment.step, count=len(hard))
        # Drawing without replacement by odds w is taking the largest u^(1/w).
        keys = chance ** (1.0 / torch.tensor(order.odds(hard), dtype=torch.float64))
        places: list[int] = torch.argsort(keys, descending=True, stable=True)[:count].tolist()
        return [Visit(prompts[place], moment.step) for place in places]
    limit = max(order.gate(moment.done, moment.total), sorted(hard)[min(count, len(hard)) - 1])
    open_ = [place for place, value in enumerate(hard) if value <= limit]
    chosen = permutation(seed, "data", "gated", moment.step, count=len(open_))[:count]
    return [Visit(prompts[open_[place]], moment.step) for place in chosen]


def _through(prompts: Sequence[Prompt], order: Callable[[int], Sequence[int]], step: int, count: int) -> list[Visit]:
    places = [divmod(step * count + offset, len(prompts)) for offset in range(count)]
    orders = {epoch: order(epoch) for epoch in {epoch for epoch, _ in places}}
    return [Visit(prompts[orders[epoch][place]], epoch) for epoch, place in places]


@dataclass
class _Shared:
    """Who answers which visit of a batch."""

    student: list[Visit] = field(default_factory=list)
    replay: list[Visit] = field(default_factory=list)
    teacher: list[Visit] = field(default_factory=list)
    dataset: list[Visit] = field(default_factory=list)


def write_rollouts(
    setup: Setup, shelf: Shelf, moment: Moment, version: int, difficulty: Mapping[str, float] | None = None
) -> list[Rollout]:
    """The rollouts of a step, graded.

    Args:
        setup: Of the run.
        shelf: What was kept of earlier steps; takes what is to be kept of this one.
        moment: Where the run is.
        version: Optimizer steps done.
        difficulty: Of every prompt, for plans that order by it.

    Raises:
        RunError: Nothing is left to learn from.
    """
    plan, seed, count = setup.method.rollout, setup.config.seed, setup.batch_prompts
    if plan.order is None:
        chosen = visits(setup.train, seed=seed, step=moment.step, count=count)
    else:
        chosen = easy_to_hard(setup.train, difficulty or {}, plan.order, seed=seed, moment=moment, count=count)
    shared = _share(setup, shelf, moment, chosen)
    longest = horizon(setup, moment)
    again = [rollout for visit in shared.replay for rollout in _replayed(setup, shelf, visit, moment, longest)]
    rollouts = [
        *_by_student(setup, shelf, shared.student, longest, version),
        *_by_teacher(setup, shelf, shared.teacher, longest, moment),
        *again,
        *(given_rollout(setup, visit.prompt, visit.epoch, longest) for visit in shared.dataset),
    ]
    if not rollouts:
        raise RunError(
            f"step {moment.step + 1}: the teacher came to an end in none of its answers within "
            f"{setup.config.rollout.max_new_tokens} tokens, so there is nothing to learn; raise rollout.max_new_tokens"
        )
    return rollouts


def horizon(setup: Setup, moment: Moment) -> int:
    """The longest answer now, tokens: the plan's, within the run's limit."""
    limit, dial = setup.config.rollout.max_new_tokens, setup.method.rollout.horizon
    return limit if dial is None else max(1, min(limit, int(moment.at(dial))))


def _share(setup: Setup, shelf: Shelf, moment: Moment, chosen: Sequence[Visit]) -> _Shared:
    """Who answers which prompt, by one number per visit: a growing share only adds visits to the student's."""
    plan, seed, shared = setup.method.rollout, setup.config.seed, _Shared()
    share = moment.at(plan.on_policy_fraction)
    others = shared.teacher if plan.off_policy == "teacher" else shared.dataset
    full = plan.replay is not None and len(shelf.visits) >= plan.replay.capacity
    fresh = moment.at(plan.replay.fresh) if plan.replay is not None and full else 1.0
    for visit in chosen:
        # Streams are keyed: where every answer is the student's own, this number can be left undrawn.
        if share == 1 and fresh == 1:
            shared.student.append(visit)
            continue
        chance = float(uniforms(seed, "mixture", visit.epoch, visit.prompt.id, count=1))
        if chance >= share:
            others.append(visit)
        elif chance < share * fresh:
            shared.student.append(visit)
        else:
            shared.replay.append(visit)
    return shared


def _by_student(setup: Setup, shelf: Shelf, chosen: Sequence[Visit], longest: int, version: int) -> list[Rollout]:
    plan, tasks = setup.method.rollout, list[Task]()
    for visit in chosen:
        context = TokenSequence.of(setup.render(visit.prompt))
        for member in range(plan.samples):
            chance = uniforms(setup.config.seed, "rollouts", visit.epoch, visit.prompt.id, member, count=longest)
            tasks.append(Task(visit.prompt, context, member, chance, visit.epoch))
    written = write(
        setup.engine,
        tasks,
        max_new_tokens=longest,
        temperature=plan.temperature,
        top_p=plan.top_p,
        version=version,
    )
    written = _graded(setup, written)
    if plan.replay is not None:
        size = plan.samples
        groups = [tuple(written[start : start + size]) for start in range(0, len(written), size)]
        shelf.remember(groups, plan.replay.capacity)
    return written


def _replayed(setup: Setup, shelf: Shelf, visit: Visit, moment: Moment, longest: int) -> list[Rollout]:
    """An old visit of the student's, in the place of a new one to this prompt."""
    chance = float(uniforms(setup.config.seed, "replay", moment.step, visit.prompt.id, count=1))
    return [_cut(setup, rollout, longest) for rollout in shelf.visits[int(chance * len(shelf.visits))]]


def _by_teacher(setup: Setup, shelf: Shelf, chosen: Sequence[Visit], longest: int, moment: Moment) -> list[Rollout]:
    """The teacher's answers: kept ones, and new ones for what it has not answered yet."""
    plan, found = setup.method.rollout, dict[tuple[int, int], Rollout]()
    wanted = [(place, member) for place in range(len(chosen)) for member in range(plan.samples)]
    if plan.keep:
        for place, member in wanted:
            kept = shelf.answers.get(key(plan, chosen[place].prompt, member))
            if kept is not None:
                found[place, member] = kept
    missing = [place for place in wanted if place not in found]
    new = _written_by_teacher(setup, [(chosen[place], member) for place, member in missing], longest)
    found.update(zip(missing, new, strict=True))
    if plan.keep:
        shelf.keep(new, plan, moment.step + 1)
    rollouts = [replace(found[place, member], visit=chosen[place].epoch) for place, member in wanted]
    if plan.attempts is not None:
        rollouts = [rollout for rollout in rollouts if rollout.status == Status.COMPLETED]
    return [_cut(setup, rollout, longest) for rollout in rollouts]


def _written_by_teacher(setup: Setup, wanted: Sequence[tuple[Visit, int]], longest: int) -> list[Rollout]:
    """New answers in order; where the plan says so, the teacher begins again where it came to no end."""
    if not wanted:
        return []
    plan, limit = setup.method.rollout, setup.config.rollout.max_new_tokens
    # What is kept serves at every later length, what has to come to an end gets the room for it.
    room = limit if plan.keep or plan.attempts else longest
    found: dict[int, Rollout] = {}
    for attempt in range(plan.attempts or 1):
        open_ = [index for index in range(len(wanted)) if index not in found or _unfinished(found[index])]
        tasks: list[Task] = []
        for visit, member in (wanted[index] for index in open_):
            epoch = "kept" if plan.keep else visit.epoch
            chance = uniforms(setup.config.seed, "teacher", epoch, visit.prompt.id, member, attempt, count=room)
            tasks.append(Task(visit.prompt, TokenSequence.of(setup.render(visit.prompt)), member, chance, visit.epoch))
        assert setup.teacher_writer is not None  # a plan with the teacher's answers asks for a teacher
        written = setup.teacher_writer.write(tasks, max_new_tokens=room, temperature=plan.temperature, top_p=plan.top_p)
        found.update(zip(open_, written, strict=True))
    return _graded(setup, [found[index] for index in range(len(wanted))])


def _unfinished(rollout: Rollout) -> bool:
    return rollout.status != Status.COMPLETED


def _graded(setup: Setup, rollouts: list[Rollout]) -> list[Rollout]:
    if setup.verifier is None:
        return rollouts
    grade = setup.verifier
    rewards = grade_known(grade, [rollout.prompt for rollout in rollouts], [rollout.text for rollout in rollouts])
    explain = grade.feedback if isinstance(grade, GivesFeedback) else None
    return [
        replace(
            rollout,
            reward=reward,
            reward_parts=parts_of(grade, rollout.prompt, rollout.text),
            feedback="" if explain is None or reward is None else explain(rollout.prompt, rollout.text),
        )
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]


def _cut(setup: Setup, rollout: Rollout, longest: int) -> Rollout:
    """A rollout within the horizon."""
    if rollout.steps <= longest:
        return rollout
    before, ids = rollout.sequence.prefix.tokens_L.tolist(), rollout.action_ids[:longest]
    return rollout.cut(longest, completion_text(setup.student.tokenizer, ids, prompt_ids=before))


def given_rollout(setup: Setup, prompt: Prompt, epoch: int, longest: int) -> Rollout:
    """The data's own answer to a prompt, closed with the student's stop token."""
    assert prompt.response is not None  # checked by `prepare`
    prompt_ids = setup.render(prompt)
    try:
        ids = response_ids(prompt_ids, prompt.response, setup.student.tokenizer)
    except Spelt as error:
        raise UserError(
            f"row '{prompt.id}': its response spells the control token {error.token!r}, which the student's tokenizer "
            "cannot encode as ordinary text; take it out of the response, or drop the row"
        ) from None
    outside = [token for token in ids if token >= setup.vocab]
    if outside:
        raise UserError(
            f"row '{prompt.id}': its response holds token id {outside[0]}, which student and teacher do not share"
        )
    ids = [*ids, setup.student.stops.primary]
    status = Status.COMPLETED if len(ids) <= longest else Status.TRUNCATED
    return Rollout(
        prompt=prompt,
        sequence=TokenSequence.of(prompt_ids).then(ids[:longest], decided=True),
        status=status,
        visit=epoch,
        source="dataset",
        text=prompt.response,
    )


def plan_summary(plan: RolloutPlan, prompts: int) -> str:
    """One line on who writes, for the start-up summary."""
    share, other = plan.on_policy_fraction, "the teacher" if plan.off_policy == "teacher" else "the data"
    mixed = ""
    if share == 0:
        mixed = f", answered by {other}"
    elif isinstance(share, Reading):
        mixed = f", as many as {share} says (else by {other})"
    elif not isinstance(share, int | float):
        mixed = f", a share that moves (else by {other})"
    elif share != 1:
        mixed = f", {share:.0%} of prompts (else {other}'s answer)"
    replayed = f", replayed from {plan.replay.capacity} visits" if plan.replay else ""
    kind = None if plan.order is None else plan.order.kind
    ordered = "" if kind is None else ", balanced by difficulty" if kind == "balanced" else ", easy to hard"
    return f"{prompts} prompts x {plan.samples} at temperature {plan.temperature:g}{mixed}{replayed}{ordered}"
