"""What plays episodes of verifiers: a thread with an event loop, and the model that an environment of it asks.

The environment's rollout runs as a coroutine. Its model is a server on this machine that speaks OpenAI's chat
completions: a request waits there until the student has written its turn. No part of verifiers is replaced; the chat
loop below is a harness, which is how verifiers names the program that carries a conversation on.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import json
import logging
import queue
import sys
import threading
import urllib.request
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from retort.errors import UserError

__all__ = ["HARNESS", "MALFORMED", "Asked", "Over", "Service", "Session"]

#: The harness's id, under which verifiers imports it.
HARNESS = "retort_chat"
#: Name of a call that cannot be read.
MALFORMED = "malformed"
#: Seconds on the clock that the environment may take to start, and to say something.
SECONDS = 600.0
#: Model turns of an episode.
MOST_TURNS = 64


@dataclass(frozen=True)
class Asked:
    """A request for the student's next turn.

    Attributes:
        messages: The whole conversation, in the form of chat completions.
        tools: The tools in the request, in the form of chat templates.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class Over:
    """The end of an episode.

    Attributes:
        reward: Sum of the task's rewards.
        truncated: Whether a limit ended it.
        error: What went wrong, in words; empty if nothing did.
    """

    reward: float = 0.0
    truncated: bool = False
    error: str = ""


@dataclass(eq=False)
class Session:
    """One episode, seen from the thread that trains."""

    loop: asyncio.AbstractEventLoop
    events: queue.SimpleQueue[Asked | Over] = field(default_factory=queue.SimpleQueue)
    waiting: asyncio.Future[dict[str, Any]] | None = None
    running: Any = None

    def next(self) -> Asked | Over:
        """What the environment says next: it asks for a turn, or is over."""
        try:
            return self.events.get(timeout=SECONDS)
        except queue.Empty:
            return Over(error=f"it said nothing for {SECONDS:,.0f} seconds")

    def answer(self, message: dict[str, Any]) -> None:
        """Answers the request that waits, with an assistant's message."""
        waiting, self.waiting = self.waiting, None
        assert waiting is not None, "no request waits"
        self.loop.call_soon_threadsafe(lambda: waiting.done() or waiting.set_result(message))

    def close(self) -> None:
        """Ends the episode where it stands."""
        if self.running is not None:
            self.running.cancel()


class Service:
    """One environment of verifiers, with the thread that it runs in until the process ends."""

    def __init__(self, taskset: str, settings: dict[str, str]) -> None:
        """Starts it.

        Args:
            taskset: Name of the package of the taskset.
            settings: Settings of the taskset by name, as text.

        Raises:
            UserError: verifiers cannot make this environment, or Retort cannot play it.
        """
        if urllib.request.getproxies().get("http") and not urllib.request.proxy_bypass("127.0.0.1"):
            raise UserError(
                "verifiers asks its model over a local connection, which HTTP_PROXY would send elsewhere; set "
                "NO_PROXY=127.0.0.1,localhost"
            )
        _v1()
        _as_plugin()
        try:
            self.env: Any = _environment(taskset, settings)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"verifiers:{taskset}: {_words(error)}") from error
        self.taskset = self.env.taskset
        self._tasks, self._rest = list[Any](), iter(self.taskset)
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._ready: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._port = 0
        thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        thread.start()
        atexit.register(self._end, thread)
        try:
            failed = self._ready.get(timeout=SECONDS)
        except queue.Empty:
            failed = f"it did not start within {SECONDS:,.0f} seconds"
        if failed:
            raise UserError(f"verifiers:{taskset}: {failed}")

    def task(self, index: int) -> Any:
        """A task by its position in the taskset; None behind the last one."""
        with self._lock:
            while len(self._tasks) <= index:
                task = next(self._rest, None)
                if task is None:
                    return None
                self._tasks.append(task)
            return self._tasks[index]

    def has_tools(self, task: Any) -> bool:
        """Whether a task can be given tools, its own or its taskset's."""
        return bool(task.toolsets(task.config) or self.taskset.toolsets(self.taskset.config))

    def begin(self, task: Any) -> Session:
        """Begins an episode of a task."""
        session = Session(self._loop)
        session.running = asyncio.run_coroutine_threadsafe(self._play(task, session), self._loop)
        return session

    async def _play(self, task: Any, session: Session) -> None:
        v1, ids = _v1(), list[str]()

        def minted(trace: Any) -> None:
            ids.append(trace.id)
            self._sessions[trace.id] = session

        client = v1.EvalClientConfig(base_url=f"http://127.0.0.1:{self._port}/v1", api_key_var="RETORT_HAS_NO_KEY")
        try:
            episode = await self.env.run_episode(task, v1.ModelContext("student", client), on_trace=minted)
            session.events.put(_over(episode))
        except Exception as error:
            session.events.put(Over(error=_words(error)))
        finally:
            for own in ids:
                del self._sessions[own]

    async def _serve(self) -> None:
        """Serves requests for turns until the process ends."""
        web: Any = importlib.import_module("aiohttp.web")
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._turn)
        runner = web.AppRunner(app)
        try:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            async with self.env.serving():
                self._ready.put("")
                await self._stop.wait()
                others = [own for own in asyncio.all_tasks() if own is not asyncio.current_task()]
                for own in others:
                    own.cancel()
                await asyncio.wait(others, timeout=5) if others else None
        except Exception as error:
            self._ready.put(_words(error))
        finally:
            await runner.cleanup()

    async def _turn(self, request: Any) -> Any:
        """A chat completion: waits for the student's turn."""
        web: Any = importlib.import_module("aiohttp.web")
        session = self._sessions.get(request.headers.get("X-Session-ID", ""))
        if session is None:
            return web.json_response({"error": {"message": "no such episode"}}, status=404)
        body = await request.json()
        session.waiting = self._loop.create_future()
        waiting = session.waiting
        session.events.put(Asked(body["messages"], body.get("tools") or []))
        message = await waiting
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return web.json_response(
            {"id": "turn", "object": "chat.completion", "created": 0, "model": "student", "choices": [choice]}
        )

    def _end(self, thread: threading.Thread) -> None:
        if thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(timeout=10)


def _environment(taskset: str, settings: dict[str, str]) -> Any:
    """The environment with its one agent played by our chat loop on this machine."""
    loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")
    agents: Any = importlib.import_module("verifiers.v1.configs.agent")
    found = loaders.env_config_type(taskset)
    own = {name: place.default for name, place in found.model_fields.items()}
    seats = [name for name, default in own.items() if isinstance(default, agents.AgentConfig)]
    if len(seats) != 1:
        raise UserError(f"verifiers:{taskset}: it has {len(seats)} agents ({', '.join(seats)}); Retort plays one")
    seat = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}, "max_turns": MOST_TURNS}
    config = loaders.resolve_env_config({"taskset": {"id": taskset, **settings}, seats[0]: seat})
    logging.getLogger("verifiers").setLevel(logging.ERROR)  # it warns of every turn that it refuses
    made = loaders.load_environment(config)
    if made.taskset.task_type().NEEDS_CONTAINER:
        raise UserError(f"verifiers:{taskset}: its tasks need a container, and Retort plays on this machine only")
    return made


def _over(episode: Any) -> Over:
    """The end of an episode of verifiers."""
    if len(episode.traces) != 1 or not episode.ok:
        error = next((own for own in (episode.last_error, *(own.last_error for own in episode.traces)) if own), None)
        words = f"{error.type}: {error.message}" if error else f"its agent ran {len(episode.traces)} times"
        return Over(error=" ".join(words.split())[:300])
    (trace,) = episode.traces
    return Over(float(trace.reward), bool(trace.is_truncated))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _v1() -> Any:
    return importlib.import_module("verifiers.v1")


@lru_cache(maxsize=1)
def _as_plugin() -> None:
    """Lets verifiers find the chat loop by its id."""
    module: Any = ModuleType(HARNESS)
    module.__all__ = ["ChatLoop"]
    module.ChatLoop = _chat_loop()
    sys.modules[HARNESS] = module


def _chat_loop() -> type:
    """The harness: asks the model, carries out the calls of its turn, and is over after a turn without one.

    verifiers' own chat loop does the same in a program that it installs with uv when it runs.
    """
    v1 = _v1()
    wire: Any = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire
    mcp: Any = importlib.import_module("verifiers.v1.harnesses.utils.mcp")
    httpx: Any = importlib.import_module("httpx")

    class ChatLoop(v1.Harness[v1.HarnessConfig]):
        APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(
            self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            said = [{"role": "system", "content": system}] if system else []
            said += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(wire, prompt or []))
            config = {"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}
            async with AsyncExitStack() as stack:
                tools, dispatch, servers = await mcp.connect_mcp(config, stack)
                http = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
                while True:
                    asked = {"model": ctx.model, "messages": said, **({"tools": tools} if tools else {})}
                    reply = await http.post(
                        f"{endpoint}/chat/completions", json=asked, headers={"Authorization": f"Bearer {secret}"}
                    )
                    if reply.status_code != 200:  # a refused turn; the trace knows why
                        return v1.ProgramResult(exit_code=1, stdout="", stderr=reply.text)
                    message = reply.json()["choices"][0]["message"]
                    said.append(message)
                    if not message.get("tool_calls"):
                        return v1.ProgramResult(exit_code=0, stdout="", stderr="")
                    for call in message["tool_calls"]:
                        content = await _called(mcp, servers, dispatch, call["function"])
                        said.append({"role": "tool", "tool_call_id": call["id"], "content": content})

    return ChatLoop


async def _called(mcp: Any, servers: Any, dispatch: Any, call: dict[str, str]) -> Any:
    """What a tool returns, or what is wrong with the call."""
    if call["name"] == MALFORMED:
        return f"error: {call['arguments']}"
    if call["name"] not in dispatch:
        return f"error: there is no such tool; there are: {', '.join(dispatch)}"
    try:
        given = json.loads(call["arguments"])
    except ValueError:
        return "error: the arguments are not valid JSON"
    if not isinstance(given, dict):
        return "error: the arguments must be a JSON object"
    try:
        return await mcp.call_mcp(servers, dispatch, call["name"], given)
    except Exception as error:
        return f"error: {_words(error)}"
