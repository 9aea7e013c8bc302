"""Environments of verifiers: what of them is Retort's, and, marked `envs`, the package itself with tasksets of ours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from retort.align.calls import calls_of
from retort.core.rollouts import Message, Status
from retort.data import load_prompts
from retort.envs import registry, verifiers
from retort.envs.base import FailedEpisode, Reply
from retort.envs.verifiers_service import MALFORMED, Asked
from retort.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")  # verifiers
TASKSETS = Path(__file__).with_name("tasksets")
ADD = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'


def test_a_turn_is_an_assistants_message() -> None:
    assert verifiers._plain("<think>3 + 4</think> 7 ") == {
        "role": "assistant",
        "content": "7",
        "reasoning_content": "<think>3 + 4</think>",
    }
    text = f"so {CALL}<tool_call>add 3"
    said = verifiers._assistant(text, calls_of(text), count(5))
    assert said["content"] == "so"
    assert said["tool_calls"] == [
        {"id": "call5", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}},
        {"id": "call6", "type": "function", "function": {"name": MALFORMED, "arguments": "the call is not valid JSON"}},
    ]
    assert verifiers._assistant("the answer is 7", [], count()) == {"role": "assistant", "content": "the answer is 7"}


BEGAN = [{"role": "user", "content": "what is 3 + 4?"}]
TURN = {"role": "assistant", "content": "7"}


def test_only_what_is_new_is_taken_of_a_request() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "are"}, {"type": "text", "text": "you sure?"}]}
    tool = {"role": "tool", "content": "7", "tool_call_id": "call0"}
    new = verifiers._behind(Asked(BEGAN, [ADD]), Asked([*BEGAN, TURN, tool, parts], [ADD]))
    assert new == (Message("tool", "7", {"tool_call_id": "call0"}), Message("user", "are\nyou sure?"))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Asked([*BEGAN, TURN, *BEGAN], []), "other tools"),
        (Asked([{"role": "user", "content": "a summary"}, TURN, *BEGAN], [ADD]), "changed what was said before"),
        (Asked([*BEGAN, *BEGAN], [ADD]), "changed what was said before"),
        (Asked([*BEGAN, TURN], [ADD]), "without saying anything"),
        (Asked([*BEGAN, TURN, *BEGAN, TURN], [ADD]), "spoke for the model"),
        (Asked([*BEGAN, TURN, {"role": "user", "content": [{"type": "image_url"}]}], [ADD]), "is no text"),
    ],
)
def test_a_conversation_that_does_not_grow_is_refused(now: Asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verifiers._behind(Asked(BEGAN, [ADD]), now)


# --- with the package ---


@pytest.fixture
def tasksets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasksets of this folder, importable here and in the servers of their tools."""
    if not registry.ENVIRONMENTS["verifiers"].installed:
        pytest.skip("needs the package verifiers; `make envs` installs it")
    monkeypatch.syspath_prepend(TASKSETS)
    monkeypatch.setenv("PYTHONPATH", str(TASKSETS))


@pytest.fixture
def begun(tasksets: None) -> Iterator[Any]:
    """Begins episodes of a kind, and closes them at the end."""
    made: list[Any] = []

    def begin(kind: str, number: int = 0, members: int = 1, tools: bool = False) -> Any:
        prompt = load_prompts(f"verifiers:{kind}", limit=number + 1)[number]
        made.extend(registry.load("verifiers", tools=tools).begin_group(prompt, range(members)))
        assert not any(isinstance(episode, FailedEpisode) for episode in made), made
        return made[-members:] if members > 1 else made[-1]

    yield begin
    for episode in made:
        episode.close()


@pytest.mark.envs
def test_rows_are_the_tasks_of_a_split(tasksets: None) -> None:
    assert [(row.id, row.text) for row in load_prompts("verifiers:retort_sums,count=2")] == [
        ("retort_sums,count=2-0", "retort_sums,count=2 0"),
        ("retort_sums,count=2-1", "retort_sums,count=2 1"),
    ]
    (row,) = load_prompts("verifiers:retort_sums", split="test", limit=1)
    assert row.text == "retort_sums 1000000"
    (episode,) = registry.load("verifiers").begin_group(row, [0])
    assert "what is 103 + 4?" in episode.prompt.text
    episode.close()


@pytest.mark.envs
def test_an_episode_of_one_turn_is_rewarded_by_the_tasks_rewards(begun: Any) -> None:
    right, wrong = begun("retort_sums", members=2)
    assert right.prompt.messages == (Message("system", "Be brief."), Message("user", "what is 3 + 4?"))
    assert right.prompt.id == "retort_sums-0"
    assert wrong.reply("8") == Reply(over=True, reward=0.0, measures={"success": 0.0, "tool_errors": 0.0})
    assert right.reply("<think>8?</think> 7") == Reply(
        over=True, reward=1.0, measures={"success": 1.0, "tool_errors": 0.0}
    )


@pytest.mark.envs
def test_tools_are_offered_and_called(begun: Any) -> None:
    episode = begun("retort_sums_tool", tools=True)
    assert [tool["function"]["name"] for tool in episode.prompt.tools] == ["add"]
    assert episode.prompt.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
    first = episode.reply(f"I call {CALL}")
    assert [(own.role, own.content) for own in first.messages] == [("tool", "7")]
    assert first.measures == {"success": 0.0, "tool_errors": 0.0}
    for turn, words in (
        ("<tool_call>3 + 4</tool_call>", "error: the call is not valid JSON"),
        ('<tool_call>{"name": "sub", "arguments": {}}</tool_call>', "error: there is no such tool; there are: add"),
    ):
        reply = episode.reply(turn)
        assert (reply.over, reply.messages[0].content, reply.measures["tool_errors"]) == (False, words, 1.0)
    last = episode.reply("7")
    assert (last.over, last.status, last.reward) == (True, Status.COMPLETED, 1.25)


@pytest.mark.envs
def test_an_environment_that_speaks_for_the_user_is_played_turn_by_turn(begun: Any) -> None:
    one, other = begun("retort_game", 1, members=2)
    assert one.reply("3").messages == (Message("user", "higher"),)
    assert other.reply("30").messages == (Message("user", "lower"),)
    assert one.reply("21") == Reply(over=True, reward=1.0, measures={"success": 1.0, "tool_errors": 0.0})
    replies = [other.reply("none") for _ in range(4)]
    assert [reply.over for reply in replies] == [False, False, False, True]
    assert (replies[-1].status, replies[-1].reward) == (Status.COMPLETED, 0.0)


@pytest.mark.envs
def test_rewards_that_raise_end_the_episode_as_an_error(begun: Any) -> None:
    reply = begun("retort_sums", 1).reply("8")
    assert (reply.over, reply.status, reply.reward) == (True, Status.ERROR, None)
    assert "no rubric today" in reply.feedback


@pytest.mark.envs
@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("verifiers:retort_nowhere", "train", "taskset 'retort_nowhere' not found"),
        ("verifiers:retort_sums,count=many", "train", "count"),
        ("verifiers:retort_sums,5", "train", "'5' is no setting of the taskset; write key=value"),
        ("verifiers:retort_game", "test", "has one split only"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(tasksets: None, source: str, split: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_prompts(source, split=split, limit=1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.envs
def test_tools_and_rollout_tools_go_together(begun: Any) -> None:
    with pytest.raises(UserError, match=r"retort_sums_tool of verifiers has tools: set rollout.tools=true"):
        begun("retort_sums_tool")
    with pytest.raises(UserError, match=r"retort_sums of verifiers has no tools to offer"):
        begun("retort_sums", tools=True)
