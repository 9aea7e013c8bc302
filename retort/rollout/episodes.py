"""From prompts to rollouts: by default all episodes advance in lock step, turn by turn. Only environments give rewards.

A single-turn prompt is an episode of one turn in an environment that does not reply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from retort.align.calls import turn_calls
from retort.align.chat import TemplateOptions, rendered
from retort.align.history import Exchange
from retort.align.text import completion_text
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Outcome, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.envs.base import Environment, Episode, FailedEpisode, Reply, SingleTurn
from retort.envs.behind import AtDrawnTurn, BehindExpert
from retort.envs.registry import load
from retort.envs.text import MEASURES
from retort.errors import UserError
from retort.ranks import here
from retort.rollout.conversation import Conversation
from retort.rollout.engines.base import Completion, Engine, Request, Sampling, TurnCache, generated
from retort.rollout.plan import TurnCurriculum
from retort.rollout.visits import Visits
from retort.rollout.waiting import Calls, Waiting, late, never_begun
from retort.wire import Client

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONCE = SingleTurn()


@dataclass(frozen=True)
class Task:
    """A rollout to generate.

    Attributes:
        prompt: The prompt to complete.
        context: Tokens before the first turn, where the environment begins with this very prompt.
        member: Index among the samples of its prompt.
        uniform_stream: Random numbers of every token of every turn.
        visit: See `Rollout`.
    """

    prompt: Prompt
    context: TokenSequence
    member: int
    uniform_stream: UniformStream
    visit: int = 0


@dataclass(frozen=True)
class EpisodeSetup:
    """The environment of the rollouts, and how its replies are rendered.

    Attributes:
        environment: The environment that plays the episodes.
        template_options: Options of the chat template for the environment's messages.
        turns: Most turns of the model in an episode; None: as many as its tokens allow.
        measures: Names of what the environment measures, and of none but these: an episode that ended before it replied
            has 0 of each. Where there are any, `turns` is measured besides.
        history: Number of exchanges that the model reads before each turn, behind the prompt, rendered anew; None: all,
            in a growing conversation.
        waiting: How the environment is waited for.
    """

    environment: Environment = _ONCE
    template_options: TemplateOptions = field(default_factory=TemplateOptions)
    turns: int | None = None
    measures: tuple[str, ...] = ()
    history: int | None = None
    waiting: Waiting = field(default_factory=Waiting)

    @staticmethod
    def named(
        name: str | None,
        template_options: TemplateOptions,
        *,
        turns: int | None = None,
        tools: bool = False,
        history: int | None = None,
        waiting: Waiting | None = None,
        client: Callable[[str], Client] = Client,
    ) -> EpisodeSetup:
        """The setup of an environment by its name, see `retort.envs.registry.load`; None for single-turn prompts."""
        if name is None:
            return EpisodeSetup(template_options=template_options)
        environment, waiting = load(name, tools=tools, client=client), waiting or Waiting()
        measures = (*getattr(environment, "measures", MEASURES), *waiting.measures)
        return EpisodeSetup(environment, template_options, turns, measures, history, waiting)

    @property
    def several_turns(self) -> bool:
        """Whether a turn may follow the first one."""
        return self.turns != 1 and not isinstance(self.environment, SingleTurn)

    def listen(self, say: Callable[[str], object]) -> None:
        """Has what the environment has to tell the user go to `say`."""
        getattr(self.environment, "listen", lambda say: None)(say)

    def metrics(self) -> dict[str, float]:
        """What the environments of all ranks counted since the last call, by the metric's name; all ranks call it."""
        own: Callable[[], Mapping[str, float]] | None = getattr(self.environment, "metrics", None)
        total: dict[str, float] = {}
        for found in [] if own is None else here().each(own):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def within(self, curriculum: TurnCurriculum | None, done: int, seed: int = 0) -> EpisodeSetup:
        """The same with the horizon of a curriculum after so many batches; what it draws is keyed by the seed."""
        if curriculum is None:
            return self
        if curriculum.kind == "drawn":
            if isinstance(self.environment, SingleTurn):  # a completion is the one turn that there is
                return self
            return replace(self, environment=AtDrawnTurn(self.environment, curriculum.decay, seed, done), turns=1)
        horizon = curriculum.horizon(done)
        if curriculum.kind == "backward":
            return replace(self, environment=BehindExpert(self.environment, horizon))
        return replace(self, turns=horizon if self.turns is None else min(horizon, self.turns))


@dataclass(eq=False)
class _Open:
    """An episode in progress."""

    task: Task
    episode: Episode
    talk: Conversation
    completions: list[Completion] = field(default_factory=lambda: [])
    texts: list[str] = field(default_factory=lambda: [])
    rewards: list[float] = field(default_factory=lambda: [])
    outcomes: list[Outcome] = field(default_factory=lambda: [])
    measures: dict[str, float] = field(default_factory=lambda: {})
    feedback: str = ""
    status: Status | None = None
    turn_cache: TurnCache = field(default_factory=TurnCache)

    def request(self, sampling: Sampling, context: int, setup: EpisodeSetup) -> Request:
        """The request for the next turn."""
        turn, room = len(self.completions), self.room(sampling, context, self.talk.sequence)
        uniforms = self.task.uniform_stream.uniforms(turn, count=room)
        return Request(self.talk.sequence, uniforms, self.turn_cache if setup.several_turns else None)

    def room(self, sampling: Sampling, context: int, before: TokenSequence) -> int:
        """Most tokens of the next turn behind these. That a prompt leaves room for the first one is checked before."""
        left = sampling.max_new_tokens - sum(len(own.ids) for own in self.completions)
        return min(left, context - len(before)) if self.completions else left

    def take(self, completion: Completion, engine: Engine) -> Callable[[], Reply] | None:
        """Takes a generated turn; what asks the environment for its reply, or None where the episode has ended."""
        before: list[int] = self.talk.sequence.tokens_L.tolist()
        self.completions.append(completion)
        self.texts.append(text := completion_text(engine.tokenizer, completion.ids, prompt_ids=before))
        self.talk.decide(completion.ids)
        if completion.status != Status.COMPLETED and not isinstance(self.episode, FailedEpisode):
            self.status = completion.status
            return None
        called: Callable[..., Reply] | None = getattr(self.episode, "called", None)
        if called is None:
            return partial(self.episode.reply, text)
        tools = self.episode.prompt.tools
        return partial(
            called, text, turn_calls(engine.tokenizer, completion.ids, text=text, prompt_ids=before, tools=tools)
        )

    def hear(self, reply: Reply, engine: Engine, setup: EpisodeSetup, sampling: Sampling) -> None:
        """Takes the environment's reply to the last turn."""
        self.outcomes.append(Outcome(reply.messages, reply.reward, reply.measures))
        if reply.reward is not None:
            self.rewards.append(reply.reward)
        for name, value in reply.measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value
        if reply.over:
            self.status, self.feedback = reply.status, reply.feedback
            return
        exchange, stop = Exchange(self.texts[-1], reply.messages), self.completions[-1].ids[-1]
        following = self.talk.replied(exchange, stop, engine.tokenizer, setup.template_options, setup.history)
        if len(self.completions) == setup.turns or self.room(sampling, engine.context, following.sequence) < 1:
            self.status = Status.TRUNCATED  # no decision will follow the reply
            return
        self.talk.go_on(following)

    def rollout(
        self, tokenizer: PreTrainedTokenizerBase, setup: EpisodeSetup, source: Literal["student", "teacher"]
    ) -> Rollout:
        """The rollout so far."""
        assert self.status is not None
        measures = dict.fromkeys(setup.measures, 0.0) | self.measures
        several = len(self.completions) > 1
        turns = [torch.full((len(own.ids),), turn) for turn, own in enumerate(self.completions)]
        sequences = self.talk.sequences
        prompt_ids: list[int] = sequences[0].prefix.tokens_L.tolist() if several else []
        ids = [token for own in self.completions for token in own.ids] if several else []
        return Rollout(
            prompt=self.episode.prompt,
            sequences=tuple(sequences),
            turn_A=torch.cat(turns) if several else None,
            engine_logp_A=_joined([own.logp_A for own in self.completions]),
            policy_version=self.completions[0].version,
            member=self.task.member,
            visit=self.task.visit,
            status=self.status,
            source=source,
            text=completion_text(tokenizer, ids, prompt_ids=prompt_ids) if several else self.texts[0],
            reward=sum(self.rewards) if self.rewards else None,
            feedback=self.feedback,
            measures=measures | ({"turns": float(len(self.completions))} if measures else {}),
            outcomes=tuple(self.outcomes) if several or measures else (),
            histories=tuple(self.talk.histories),
        )


def run_episodes(
    engine: Engine,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    setup: EpisodeSetup | None = None,
    source: Literal["student", "teacher"] = "student",
    on_visit: Callable[[list[Rollout]], list[Rollout]] | None = None,
) -> list[Rollout]:
    """Generates all tasks with the engine, in order; every turn of all open episodes is one call of it.

    With `ready` (see `Waiting`) a call of it continues the episodes whose replies are there: the same rollouts up to
    rounding, because the random numbers of a turn depend on its rollout and its number alone.

    An episode ends when its environment ends it, or truncated when its tokens, its turns or the engine's context are
    used up. Rollouts of one visit to a prompt must be neighbours.

    Args:
        engine: The engine that generates.
        tasks: The rollouts to generate.
        sampling: Settings of sampling; `max_new_tokens` is for all turns of an episode together.
        setup: The environment; None for single-turn prompts.
        source: The source to record in the rollouts.
        on_visit: Makes something of the rollouts of one visit as soon as all of them have ended, in any order of the
            visits: between two turns of others, or while others of one turn are still generated. None: nothing.

    Raises:
        UserError: The environment began other episodes than requested; its messages cannot follow a turn, see
            `Conversation.replied`; or see `Engine.generate`.
    """
    setup = setup or EpisodeSetup()
    with contextlib.ExitStack() as stack:
        calls = Calls(setup.waiting.deadline)
        episodes = _begun(engine, tasks, setup, calls, stack)
        for own in episodes:
            stack.callback(own.turn_cache.clear)

        def made(visit: Sequence[_Open]) -> list[Rollout] | None:
            if any(own.status is None for own in visit):
                return None
            found = [own.rollout(engine.tokenizer, setup, source) for own in visit]
            return found if on_visit is None else on_visit(found)

        visits = Visits(episodes, lambda own: (own.task.prompt.id, own.task.visit), made)
        # Environments are asked in the order of the tasks, and those of one turn have nothing to say.
        early = on_visit is not None and isinstance(setup.environment, SingleTurn)
        while open_ := [own for own in episodes if own.status is None and id(own.episode) not in calls]:
            requests = [own.request(sampling, engine.context, setup) for own in open_]

            def take(place: int, completion: Completion, open_: Sequence[_Open] = open_) -> None:
                ask = open_[place].take(completion, engine)
                if ask is not None:
                    _asked(open_[place], ask, calls, engine, setup, sampling)
                visits.look(open_[place])

            if early:
                generated(engine, requests, sampling, take)
            else:
                for place, completion in enumerate(engine.generate(requests, sampling)):
                    take(place, completion)
            _heard(episodes, calls, engine, setup, sampling)
            for own in episodes:
                if own.status is not None:
                    own.turn_cache.clear()
                    visits.look(own)
    return visits.all


def _asked(
    own: _Open, ask: Callable[[], Reply], calls: Calls, engine: Engine, setup: EpisodeSetup, sampling: Sampling
) -> None:
    """Asks for the reply to an episode's last turn, and hears it unless others go on meanwhile."""
    waiting = setup.waiting
    words = waiting.timeouts.words(own.task.uniform_stream, len(own.completions), own.talk.sequence)
    if words is not None:
        own.hear(late(words), engine, setup, sampling)
    elif waiting.direct:
        own.hear(ask(), engine, setup, sampling)
    else:
        calls.ask(id(own.episode), ask)
        if waiting.turns == "lockstep":
            _heard([own], calls, engine, setup, sampling)


def _heard(episodes: Sequence[_Open], calls: Calls, engine: Engine, setup: EpisodeSetup, sampling: Sampling) -> None:
    """Waits until an episode can go on, if any is waited for, and hears what was replied; late ones end."""
    numbered = {id(own.episode): own for own in episodes}
    while len(calls):
        for number, future in calls.arrived():
            own = numbered[number]
            if future is not None:
                own.hear(future.result(), engine, setup, sampling)
                continue
            turn = len(own.completions)
            words = setup.waiting.words(turn)
            setup.waiting.timeouts.add(own.task.uniform_stream, turn, own.talk.sequence, words=words)
            own.hear(late(words), engine, setup, sampling)
        if any(own.status is None and id(own.episode) not in calls for own in episodes):
            return


def _begun(
    engine: Engine, tasks: Sequence[Task], setup: EpisodeSetup, calls: Calls, stack: contextlib.ExitStack
) -> list[_Open]:
    """Begins every episode, before its first turn; the stack closes them."""
    found: list[_Open] = []
    for _, group in groupby(tasks, key=lambda task: (task.prompt.id, task.visit)):
        own = list(group)
        episodes = _group(own, setup)
        for episode in episodes:
            stack.callback(calls.close, id(episode), episode)
        _check(own[0].prompt, len(own), episodes)
        for task, episode in zip(own, episodes, strict=True):
            context = task.context
            if episode.prompt is not task.prompt:
                own_prompt, images = episode.prompt, engine.image_tokens
                context = rendered(own_prompt, engine.tokenizer, setup.template_options, images)
                _check_room(episode.prompt, context, engine)
            talk = Conversation(episode.prompt, [context], image_tokens=engine.image_tokens)
            found.append(_Open(task, episode, talk))
    return found


def _group(tasks: Sequence[Task], setup: EpisodeSetup) -> Sequence[Episode]:
    """Begins the episodes of one visit to a prompt; those that fail where that takes too long, now or as recorded."""
    first, members, waiting = tasks[0], [task.member for task in tasks], setup.waiting
    words = waiting.timeouts.words(first.uniform_stream, 0, first.context)
    if words is None:
        episodes = waiting.begun(setup.environment, first.prompt, members)
        if episodes is not None:
            return episodes
        words = waiting.words(0)
        waiting.timeouts.add(first.uniform_stream, 0, first.context, words=words)
    return [never_begun(first.prompt, words) for _ in members]


def _check(prompt: Prompt, members: int, episodes: Sequence[Episode]) -> None:
    """Refuses episodes that would be stored under other rollouts."""
    if len(episodes) != members:
        raise UserError(
            f"prompt '{prompt.id}': the environment began {len(episodes)} episodes for {members} members; begin_group "
            "gives one for each"
        )
    other = next((episode.prompt.id for episode in episodes if episode.prompt.id != prompt.id), None)
    if other is not None:
        raise UserError(
            f"prompt '{prompt.id}': an episode of it has a prompt with the id '{other}', under which it would be taken "
            "for a completion of another prompt; keep the id"
        )


def _check_room(prompt: Prompt, context: TokenSequence, engine: Engine) -> None:
    if len(context) >= engine.context:
        raise UserError(
            f"prompt '{prompt.id}': its environment begins with {len(context):,} tokens, and the model reads "
            f"{engine.context:,} at most, so no turn has room; use a model that reads more, or shorter observations"
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
