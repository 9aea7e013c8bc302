"""What every environment must hold, and what episodes make of it; with a little game. A new one is one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from any_rooms import AnyRooms
from scripted import ScriptedEngine
from served import Played
from support import make_tokenizer

from retort.align.chat import TemplateOptions, render
from retort.align.replies import reply_ids
from retort.align.text import decode
from retort.core.random_streams import UniformStream, uniforms
from retort.core.rollouts import Message, Pack, Prompt, Status
from retort.core.sequences import TokenSequence
from retort.envs import registry
from retort.envs.base import Environment, Episode, Reply, SingleTurn
from retort.envs.behind import BehindExpert
from retort.envs.reasoning import ReasoningGym, rows
from retort.envs.text import TextEpisodes
from retort.envs.verifiers import Verifiers
from retort.errors import UserError
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes

ASKED = Prompt("p", (Message("user", "add 3 and 4"),), answer="7")


class Guess:
    """Guess a number below 40 in so many turns: the environment says whether more has to be added."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns
        self.games: list[Game] = []

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        begun = [Game(replace(prompt, messages=(Message("user", "the answer is"),)), self.turns) for _ in members]
        self.games += begun
        return begun


@dataclass(eq=False)
class Game:
    prompt: Prompt
    turns: int
    heard: int = 0
    closed: int = 0

    def reply(self, text: str) -> Reply:
        words, answer = text.split(), int(self.prompt.answer or 0)
        self.heard += 1
        guess = int(words[-1]) if words and words[-1].isdigit() else -1
        if guess == answer:
            return Reply(over=True, reward=1.0)
        if self.heard == self.turns:
            return Reply(over=True, reward=0.0, status=Status.TRUNCATED)
        return Reply((Message("user", "add" if guess < answer else "from"),), reward=0.25)

    def close(self) -> None:
        self.closed += 1


def of_package(name: str, task: str) -> Callable[[], Environment]:
    """An environment of another package with a task of its own, in at most 30 turns."""

    def make() -> Environment:
        episodes = registry.load(name)
        assert isinstance(episodes, TextEpisodes)
        game = episodes.make

        class Short:
            max_turns = 30

            def __init__(self) -> None:
                self.game = game()
                self.step = self.game.step

            def reset(self, _: str, seed: int) -> str:
                return self.game.reset(task, seed)

        return TextEpisodes(Short, name)

    return make


ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "single turn": SingleTurn,
    "guess": Guess,
    "rooms": lambda: TextEpisodes(AnyRooms, "rooms"),
    "rooms, behind the expert": lambda: BehindExpert(TextEpisodes(AnyRooms, "rooms"), 3),
    "python": lambda: registry.load("python"),
}
#: Those that need a package, by their names in Retort: `make envs`.
PACKAGES: dict[str, Callable[[], Environment]] = {
    "reasoning_gym": lambda: registry.load("reasoning_gym"),
    "textworld": of_package("textworld", "coin_collector-2 1"),
    "minigrid": of_package("minigrid", "BabyAI-GoToLocal-v0 1"),
    "gymnasium": of_package("gymnasium", "FrozenLake-v1 1"),
    "verifiers": lambda: registry.load("verifiers"),
}
#: Those that a server in a process of its own plays, by what it is told to play.
SERVED = {
    "rooms, elsewhere": "any_rooms:AnyRooms",
    "rooms, elsewhere, behind the expert": "any_rooms:AnyRooms",
    "python, elsewhere": "python",
}
SCRIPTS = [
    ["3", "answer", "7", *["go north", "go east"] * 20],
    ["7", *["go south", "take red"] * 20],
    ["answer"] * 40,
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts a server of an environment, once for each; its address."""
    played: dict[str, Played] = {}

    def url(name: str) -> str:
        if name not in played:
            played[name] = Played(tmp_path_factory.mktemp("played"), name)
        return played[name].url

    yield url
    for own in played.values():
        own.end()


@pytest.fixture(params=[*ENVIRONMENTS, *SERVED, *(pytest.param(name, marks=pytest.mark.envs) for name in PACKAGES)])
def environment(request: pytest.FixtureRequest) -> Environment:
    name = request.param
    if name in SERVED:
        there = registry.load(request.getfixturevalue("elsewhere")(SERVED[name]))
        return BehindExpert(there, 3) if name.endswith("expert") else there
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]()
    if not registry.ENVIRONMENTS[name].installed:
        pytest.skip(f"needs the package {registry.ENVIRONMENTS[name].package}; `make envs` installs it")
    request.getfixturevalue("monkeypatch").syspath_prepend(Path(__file__).parents[1] / "envs" / "tasksets")
    return PACKAGES[name]()


@pytest.fixture
def asked(environment: Environment) -> Prompt:
    """A row that the environment can play."""
    if isinstance(environment, Verifiers):
        return Prompt("p", (Message("user", "retort_game 0"),))
    if not isinstance(environment, ReasoningGym):
        return ASKED
    row = next(rows("basic_arithmetic", 0))
    return Prompt(row["id"], (Message("user", row["prompt"]),), answer=row["answer"])


def played(episode: Episode, texts: Sequence[str]) -> list[Reply]:
    found: list[Reply] = []
    for text in texts:
        found.append(episode.reply(text))
        if found[-1].over:
            break
    episode.close()
    return found


def test_an_episode_for_every_member_that_ends_and_says_something_until_then(
    environment: Environment, asked: Prompt
) -> None:
    episodes = environment.begin_group(asked, [0, 1, 2])
    assert len(episodes) == 3
    for episode, texts in zip(episodes, SCRIPTS, strict=True):
        assert episode.prompt.id == asked.id
        assert episode.prompt.messages
        *between, last = played(episode, texts)
        assert last.over
        assert all(reply.messages and not reply.over for reply in between)
        assert last.status in (Status.COMPLETED, Status.TRUNCATED)


def test_episodes_know_nothing_of_each_other_and_repeat(environment: Environment, asked: Prompt) -> None:
    alone = [played(environment.begin_group(asked, [member])[0], texts) for member, texts in enumerate(SCRIPTS)]
    episodes = environment.begin_group(asked, [0, 1, 2])
    together: list[list[Reply]] = [[], [], []]
    for turn in range(40):
        for found, episode, texts in zip(together, episodes, SCRIPTS, strict=True):
            if turn < len(texts) and not (found and found[-1].over):
                found.append(episode.reply(texts[turn]))
    for episode in episodes:
        episode.close()
    assert alone == together


def test_going_on_without_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="must say something"):
        Reply()


# --- what episodes make of it ---


def script(*turns: str, context: int = 128) -> ScriptedEngine:
    """A student that says these turns, whichever it is asked for, and ends each with its stop."""
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    stop = tokenizer.eos_token_id

    def says(request: Request) -> list[int]:
        turn = (request.context.tokens_L.tolist().count(stop) - 1) // 2
        return [*tokenizer.encode(turns[turn], add_special_tokens=False), stop, *[stop] * 40]

    return ScriptedEngine(tokenizer, stop, torch.zeros(len(tokenizer)), context=context, says=says)


def tasks(engine: Any, count: int = 1, prompt: Prompt = ASKED) -> list[Task]:
    context = TokenSequence.of(render(prompt, engine.tokenizer))
    return [
        Task(prompt, context, member, UniformStream(0, "rollouts", 0, prompt.id, member)) for member in range(count)
    ]


def test_a_game_is_one_growing_conversation() -> None:
    engine, game = script("3", "so 9", "the answer 7"), Guess()
    (rollout,) = run_episodes(engine, tasks(engine), Sampling(20), setup=EpisodeSetup(game))
    assert decode(engine.tokenizer, rollout.sequence.tokens_L.tolist()) == (
        "<|im_start|> user the answer is <|im_end|> <|im_start|> assistant 3 <|im_end|> "
        "<|im_start|> user add <|im_end|> <|im_start|> assistant so 9 <|im_end|> "
        "<|im_start|> user from <|im_end|> <|im_start|> assistant the answer 7 <|im_end|>"
    ).replace("user", "<unk>").replace("assistant", "<unk>")
    assert rollout.text == "3 so 9 the answer 7"
    assert rollout.turn_A is not None
    assert rollout.turn_A.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert rollout.engine_logp_A is not None
    assert len(rollout.engine_logp_A) == 9
    assert rollout.prompt.messages == (Message("user", "the answer is"),)
    assert (rollout.reward, rollout.status) == (1.5, Status.COMPLETED)
    assert [own.closed for own in game.games] == [1]


def test_all_open_episodes_are_continued_by_one_call_and_each_turn_has_its_own_chance() -> None:
    engine, game = script("3", "7"), Guess()
    rollouts = run_episodes(engine, tasks(engine, 3), Sampling(20), setup=EpisodeSetup(game))
    assert [len(asked) for asked in engine.asked] == [3, 3]
    assert [rollout.member for rollout in rollouts] == [0, 1, 2]
    first, second = (asked[1].uniforms for asked in engine.asked)
    assert torch.equal(first, uniforms(0, "rollouts", 0, "p", 1, count=20))
    assert torch.equal(second, uniforms(0, "rollouts", 0, "p", 1, "turn", 1, count=18))


def test_a_prompt_that_nobody_answers_is_one_call_with_the_requests_of_old() -> None:
    engine = script("3 4")
    asked = tasks(engine, 2)
    rollouts = run_episodes(engine, asked, Sampling(5))
    assert len(engine.asked) == 1
    for request, task in zip(engine.asked[0], asked, strict=True):
        assert request.context is task.context
        assert torch.equal(request.uniforms, uniforms(0, "rollouts", 0, "p", task.member, count=5))
    for rollout in rollouts:
        assert (rollout.turn_A, rollout.reward, rollout.status) == (None, None, Status.COMPLETED)
        assert rollout.prompt is ASKED
        assert rollout.text == "3 4"


@pytest.mark.parametrize(
    ("limits", "turns"),
    [
        ({"tokens": 4}, [[8, 4], [14, 4]]),  # the budget is of all turns together, and is used up by the second
        ({"tokens": 3}, [[8, 4], [14]]),  # in the middle of the second
        ({"turns": 2}, [[8, 4], [14, 4]]),
        ({"context": 18}, [[8, 4], [14, 4]]),  # no room for a third
        ({"context": 17}, [[8, 4], [14]]),
    ],
    ids=str,
)
def test_what_is_used_up_ends_an_episode_as_truncated(limits: dict[str, int], turns: list[list[int]]) -> None:
    engine, game = script("3", "9", "7", context=limits.get("context", 128)), Guess(9)
    setup = EpisodeSetup(game, turns=limits.get("turns"))
    (rollout,) = run_episodes(engine, tasks(engine), Sampling(limits.get("tokens", 20)), setup=setup)
    assert rollout.action_ids == [token for own in turns for token in own]
    assert rollout.status == Status.TRUNCATED
    assert bool(rollout.sequence.action_mask_L[-1]), "a reply that nothing was decided from"
    assert len(rollout.sequence) <= engine.context
    assert [own.closed for own in game.games] == [1]


def test_episodes_are_closed_when_something_fails() -> None:
    class Broken(Guess):
        def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
            begun = super().begin_group(prompt, members)
            self.games[-1].reply = lambda text: 1 / 0  # type: ignore[method-assign, assignment]
            return begun

    engine, game = script("3", "9"), Broken()
    with pytest.raises(ZeroDivisionError):
        run_episodes(engine, tasks(engine, 2), Sampling(20), setup=EpisodeSetup(game))
    assert [own.closed for own in game.games] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda begun: begun[:-1], "prompt 'p': the environment began 1 episodes for 2 members"),
        (lambda begun: [*begun, begun[0]], "prompt 'p': the environment began 3 episodes for 2 members"),
        (lambda begun: [begun[0], Game(replace(ASKED, id="q"), 3)], "prompt 'p': an episode of it has .* the id 'q'"),
    ],
    ids=["too few", "too many", "another id"],
)
def test_other_episodes_than_were_asked_for_are_refused_in_one_line(change: Callable[..., Any], message: str) -> None:
    """Under another id a rollout would be graded, and shown to its teacher, in another prompt's group."""

    class Odd(Guess):
        def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
            return change(super().begin_group(prompt, members))

    engine, game = script("3", "9"), Odd()
    with pytest.raises(UserError, match=message) as raised:
        run_episodes(engine, tasks(engine, 2), Sampling(20), setup=EpisodeSetup(game))
    assert "\n" not in str(raised.value)
    assert not engine.asked, "nothing is written before"


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    """NaN would count as a rollout that nobody graded."""
    with pytest.raises(ValueError, match="finite"):
        Reply(over=True, reward=reward)


# --- what is said, as ids ---


def test_a_reply_is_what_the_template_writes_behind_the_turn() -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    said = (Message("user", "add 5"), Message("user", "so"))
    ids = reply_ids(ASKED, said, tokenizer.eos_token_id, tokenizer, TemplateOptions())
    turn = [*tokenizer.encode("9", add_special_tokens=False), tokenizer.eos_token_id]
    whole = replace(ASKED, messages=(*ASKED.messages, Message("assistant", "9"), *said))
    assert [*render(ASKED, tokenizer), *turn, *ids] == render(whole, tokenizer)


def test_the_rest_of_a_turns_end_is_written_and_a_stop_that_is_said_is_text() -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>{% endfor %}", "<|im_end|> so {% endfor %}")
    said = (Message("user", "add <|im_end|> 5"),)
    ids = reply_ids(ASKED, said, tokenizer.eos_token_id, tokenizer, TemplateOptions())
    assert ids[0] == tokenizer.convert_tokens_to_ids("so")
    assert ids.count(tokenizer.eos_token_id) == 1, "what is said ended its own turn"


THINKS = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% if message.role == 'assistant' and loop.last %}"
    "so {% endif %}{{ message.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant "
    "{% endif %}"
)
ANEW = (
    "{% for message in messages %}<|im_start|>{% if loop.last %}add {% endif %}{{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
LEAVES_OUT = (
    "{% for message in messages %}{% if message.role not in ('tool', 'critic') %}<|im_start|>{{ message.content }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def test_a_template_that_treats_the_last_turn_otherwise_still_says_what_follows() -> None:
    """Such as Qwen3's, which writes an empty thinking block into an assistant's turn as long as it is the last."""
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    plain = reply_ids(ASKED, (Message("user", "add"),), tokenizer.eos_token_id, tokenizer, TemplateOptions())
    tokenizer.chat_template = THINKS
    assert reply_ids(ASKED, (Message("user", "add"),), tokenizer.eos_token_id, tokenizer, TemplateOptions()) == plain


@pytest.mark.parametrize(
    ("template", "stop", "role", "template_options", "message"),
    [
        (None, 4, "user", TemplateOptions(), "needs a model with a chat template"),
        (THINKS, 4, "user", TemplateOptions(rendered=True), "rollout.rendered=false"),
        (THINKS, 2, "user", TemplateOptions(), r"ends its turns with '<eos>'.*set rollout.stop"),
        (ANEW, 4, "user", TemplateOptions(), "writes earlier turns anew"),
        (LEAVES_OUT, 4, "tool", TemplateOptions(), "leaves out turns of the role 'tool'"),
        (LEAVES_OUT, 4, "critic", TemplateOptions(), "leaves out turns of the role 'critic'"),
    ],
)
def test_what_cannot_follow_is_refused_in_one_line(
    template: str | None, stop: int, role: str, template_options: TemplateOptions, message: str
) -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>", chat=True)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as raised:
        reply_ids(ASKED, (Message(role, "add"),), stop, tokenizer, template_options)
    assert "prompt 'p'" in str(raised.value)
    assert "\n" not in str(raised.value)


# --- and it is learnt from ---


def test_an_episode_of_three_turns_is_learnt_from_like_any_rollout(
    model_folder: Callable[..., Path], tiny_run: dict[str, Any]
) -> None:
    """Loss and gradients of a run are those of plain padded passes over the whole conversations."""
    student = model_folder(seed=1, eos="<|im_end|>", chat=True)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=64, eos="<|im_end|>", chat=True)
    settings = {**tiny_run, "student": str(student), "teacher": str(teacher)}
    setup = pipeline.prepared(settings, "eopd")
    prompts = [replace(own, answer="99") for own in setup.source.prompts[:2]]  # never guessed
    asked = [
        Task(own, TokenSequence.of(setup.source.render(own).ids), member, UniformStream(0, "rollouts", own.id, member))
        for own in prompts
        for member in range(2)
    ]
    rollouts = run_episodes(setup.source.engine, asked, Sampling(60), setup=EpisodeSetup(Guess()))
    several = [own for own in rollouts if own.turn_A is not None and int(own.turn_A.max()) == 2]
    assert several, "no episode came to its third turn"
    pack = Pack.of([replace(own, reward=float(own.member)) for own in rollouts])
    engine_N = pipeline.padded_logp(setup, pack)
    torch.testing.assert_close(pack.steps.engine_logp_N, engine_N.float(), rtol=1e-3, atol=1e-3)
    plain = pipeline.by_padding(setup, pack)
    for batch_tokens in (10**6, 1):
        for step in pipeline.as_run(setup, pack, batch_tokens):
            assert step.loss == pytest.approx(plain.loss, rel=1e-5)
            for name, gradient in step.gradients.items():
                largest = float(plain.gradients[name].abs().max())
                torch.testing.assert_close(gradient, plain.gradients[name], rtol=1e-3, atol=1e-4 * max(largest, 1e-6))
