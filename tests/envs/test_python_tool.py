"""The Python tool: what a call is, what comes back, and what the program is kept from."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from retort import config as configuration
from retort.align.chat import TemplateOptions
from retort.core.rollouts import Message, Prompt, Status
from retort.envs import python_tool, registry
from retort.envs.python_tool import TOOL, Limits, Malformed, PythonTool, code_of, run
from retort.rewards import ByText
from retort.rollout.episodes import EpisodeSetup
from retort.train.setup.prompts import graders

ROW = Prompt("row 1", (Message("user", "what is 2 + 3?"),), answer="5")
SHORT = Limits(seconds=1)


def call(code: str) -> str:
    return f"```python\n{code}\n```"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the answer is 5", None),
        ("first\n```python\nprint(1)\n```\nthen\n```py\nprint(2)\n```", "print(2)\n"),
        ('<tool_call>\n{"name": "python", "arguments": {"code": "print(1)"}}\n</tool_call>', "print(1)"),
        ('{"name": "python", "parameters": {"code": "print(1)"}}', "print(1)"),
        ('<|python_tag|>{"name": "python", "parameters": {"code": "print(1)"}}', "print(1)"),
        ('{"answer": 5}', None),
        ("{5}", None),
        ("<tool_call>print(1)</tool_call>", Malformed("the call is not valid JSON")),
        ("<tool_call>" + "{" * 5000, Malformed("the call is not valid JSON")),
        ('<tool_call>{"name": "bash", "arguments": {}}', Malformed("there is no such tool; there is: python")),
        ('{"name": "python", "arguments": {"code": 5}}', Malformed('the arguments must be {"code": "..."}')),
        ('{"name": "python", "arguments": "print(1)"}', Malformed('the arguments must be {"code": "..."}')),
    ],
)
def test_what_a_call_is(text: str, found: Any) -> None:
    assert code_of(text) == found


def test_an_episode_of_calls_and_an_answer() -> None:
    (episode,) = PythonTool(SHORT).begin_group(ROW, [0])
    assert episode.prompt is ROW
    first = episode.reply("<think>" + call("print(9)") + "</think>" + call("print(2 + 3)"))
    assert (first.messages, first.over, first.measures) == ((Message("user", "5"),), False, {"tool_errors": 0.0})
    second = episode.reply(call("1 / 0"))
    assert second.messages[0].content.endswith("ZeroDivisionError: division by zero")
    assert "confined" not in second.messages[0].content
    assert second.measures == {"tool_errors": 1.0}
    third = episode.reply("<tool_call>5</tool_call>")
    assert (third.messages[0].content, third.over) == ("error: the call is not valid JSON", False)
    last = episode.reply("it is 5")
    assert (last.over, last.reward, last.status) == (True, None, Status.COMPLETED)


def test_calls_without_an_answer_end_truncated() -> None:
    (episode,) = PythonTool(Limits(turns=2)).begin_group(ROW, [0])
    assert not episode.reply("<tool_call>5</tool_call>").over
    last = episode.reply("<tool_call>5</tool_call>")
    assert (last.over, last.status) == (True, Status.TRUNCATED)


def test_the_tool_is_offered_where_it_is_asked_for() -> None:
    (episode,) = PythonTool(tools=True).begin_group(ROW, [0])
    assert episode.prompt.tools == (TOOL,)
    assert episode.reply("<tool_call>5</tool_call>").messages[0].role == "tool"
    assert isinstance(registry.load("python", tools=True), PythonTool)


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("x = [0] * 10**10", "MemoryError"),
        ("open('big', 'w').write('x' * 10**8)", "OSError: [Errno 27] File too large"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("def f(", "SyntaxError: '(' was never closed"),
        ("while True: pass", "error: stopped, it took too long"),
        ("raise SystemExit(3)", "(no output)"),
    ],
)
def test_a_program_that_fails_says_so(code: str, ending: str) -> None:
    said, failed = run(code, SHORT)
    assert said.endswith(ending)
    assert failed


def test_a_sleeping_program_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_tool, "CLOCK", 1.0)
    said, failed = run("import time; time.sleep(600)", SHORT)
    assert said == "error: stopped, it took too long"
    assert failed


def test_long_output_is_cut_in_the_middle() -> None:
    said, failed = run("print('a' * 50_000 + 'b' * 50_000)", Limits(shown=100))
    assert said == f"{'a' * 50}\n... 99,900 characters left out ...\n{'b' * 50}"
    assert not failed


def test_it_runs_in_an_empty_folder_with_nothing_of_the_runs_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_SECRET", "5")
    said, _ = run("import os; print(os.listdir('.'), os.environ.get('RETORT_SECRET'), hash('a') == hash('a'))", SHORT)
    assert said == "[] None True"
    assert run("print(hash('a'))", SHORT) == run("print(hash('a'))", SHORT)


def has_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, "-Urnp", "true"], capture_output=True).returncode


def test_there_is_no_network_and_nothing_goes_on_where_the_kernel_has_namespaces(tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("this kernel gives an unprivileged process no namespaces")
    assert run("import os; print(os.getpid(), os.listdir('/sys/class/net') and 1)", SHORT)[0].startswith("1 ")
    said, failed = run("import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)", SHORT)
    assert "Network is unreachable" in said or "Cannot assign requested address" in said
    assert failed
    lock = tmp_path / "lock"
    code = f"""
import fcntl, os, time
held = open({str(lock)!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
print("gone")
"""
    assert run(code, SHORT) == ("gone", False)
    with lock.open("w") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while anyone holds it


def test_the_runs_verifier_grades_the_answer() -> None:
    config = configuration.resolve({"data": "x.jsonl", "rollout": {"env": "python"}, "task": "exact"})
    train, _ = graders(config, [ROW], [ROW], [])
    assert isinstance(train, ByText)
    assert train.name == "exact"
    assert EpisodeSetup.named("python", TemplateOptions()).measures == ("tool_errors",)
