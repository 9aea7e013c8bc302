"""A Python interpreter as a tool: the model writes code, reads what it printed, and answers in a turn without a call.

What the model wrote runs in a process of its own, in an empty folder that is removed afterwards, with the standard
library alone and under limits (`retort.envs.confined`). That bounds accidents. It is no security boundary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retort.align.calls import Call, Malformed, calls_of, refused
from retort.align.text import after_thinking
from retort.core.rollouts import Message, Prompt, Status
from retort.envs.base import Episode, Reply
from retort.envs.dispatch import tool_message
from retort.errors import UserError

__all__ = ["TOOL", "Limits", "PythonTool", "code_of", "run"]

#: The tool in the form of chat templates.
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run a Python program in a fresh interpreter and read what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The whole program."}},
            "required": ["code"],
        },
    },
}
_FENCE = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL)
#: Seconds on the clock per second of processor time that is allowed.
CLOCK = 10.0
#: Exit statuses of a program that the kernel ended by SIGKILL or SIGXCPU, itself or the process that it waits for.
_STOPPED = (-9, -24, 128 + 9, 128 + 24)
_CONFINED = Path(__file__).with_name("confined.py")


@dataclass(frozen=True)
class Limits:
    """Limits of one call and of an episode.

    Attributes:
        seconds: Processor time; on the clock it may take `CLOCK` times as long.
        memory: Bytes of address space.
        file_size: Bytes of each file that is written, and of the output.
        shown: Characters of the output that the model reads.
        turns: Turns of an episode.
    """

    seconds: int = 3
    memory: int = 1 << 30
    file_size: int = 1 << 20
    shown: int = 2000
    turns: int = 8


class PythonTool:
    """The environment: a row of the data is a question. It gives no reward; the run's verifier grades the answer."""

    measures = ("tool_errors",)

    def __init__(self, limits: Limits | None = None, *, tools: bool = False) -> None:
        """Builds the environment.

        Args:
            limits: What a call may take.
            tools: Offer the tool to the chat template, and reply in the role `tool`; else in the role `user`.

        Raises:
            UserError: The system keeps no limits on a process (Windows).
        """
        if importlib.util.find_spec("resource") is None:
            raise UserError("rollout.env = python: this system sets no limits on a process; run it on Linux or macOS")
        self.limits = limits or Limits()
        self.tools = tools

    def begin_group(self, prompt: Prompt, members: Sequence[int]) -> Sequence[Episode]:
        """See `Environment`. The prompt stays as it is, except for the tool that is offered."""
        begun = replace(prompt, tools=(*prompt.tools, TOOL)) if self.tools else prompt
        return [_Session(begun, self.limits, "tool" if self.tools else "user") for _ in members]


@dataclass
class _Session:
    prompt: Prompt
    limits: Limits
    role: str
    turns: int = 0

    def reply(self, text: str) -> Reply:
        return self.called(text, calls_of(text))

    def called(self, text: str, calls: Sequence[Call | Malformed]) -> Reply:
        self.turns += 1
        found = code_of(after_thinking(text), calls)
        if found is None:
            return Reply(over=True, measures={"tool_errors": 0.0})
        if isinstance(found, Malformed):
            said, failed = f"error: {found.words}", True
        else:
            said, failed = run(found, self.limits)
        over = self.turns >= self.limits.turns
        measures = {"tool_errors": float(failed)}
        status = Status.TRUNCATED if over else Status.COMPLETED
        message = Message(self.role, said)
        if self.role == "tool":
            message = tool_message("python", said, calls[0] if calls else Call("python"), self.turns)
        return Reply((message,), over, status=status, measures=measures)

    def close(self) -> None:
        pass


def code_of(text: str, calls: Sequence[Call | Malformed] | None = None) -> str | Malformed | None:
    """The code of the call in a turn; None for a turn without one.

    A call is a fenced block of Python (the last one), or one of the tool `python` (the first one).

    Args:
        text: The turn.
        calls: Its calls, where they are known; else see `calls_of`.
    """
    calls = calls_of(text) if calls is None else calls
    if not calls:
        fences = _FENCE.findall(text)
        return fences[-1] if fences else None
    call = calls[0]
    if isinstance(call, Malformed) and not call.name:
        return call
    if call.name != "python":
        return Malformed(refused(Call(call.name), (TOOL,)) or "")
    code = call.arguments.get("code") if isinstance(call, Call) and set(call.arguments) == {"code"} else None
    return code if isinstance(code, str) else Malformed('the arguments must be {"code": "..."}')


def run(code: str, limits: Limits) -> tuple[str, bool]:
    """Runs a program.

    Returns:
        What it wrote to its output and its errors, cut; and whether it failed.
    """
    with tempfile.TemporaryDirectory(prefix="retort-python-") as folder, tempfile.TemporaryFile() as output:
        command = [sys.executable, "-s", "-S", "-P", "-B", str(_CONFINED)]
        process = subprocess.Popen(
            [*command, *map(str, (limits.seconds, limits.memory, limits.file_size))],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(code.encode("utf-8", "surrogatepass"), timeout=CLOCK * limits.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
        output.seek(0)
        said = output.read(limits.file_size).decode("utf-8", "replace").replace(folder, ".").strip()
    if late or process.returncode in _STOPPED:
        return _cut(f"{said}\nerror: stopped, it took too long".strip(), limits.shown), True
    return _cut(said, limits.shown) or "(no output)", process.returncode != 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program with whatever it started in its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 9)
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _cut(text: str, shown: int) -> str:
    """The beginning and the end of a text: the last line of a traceback says what was wrong."""
    if len(text) <= shown:
        return text
    half = shown // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
