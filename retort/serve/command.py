"""Loads a model, or makes an environment, and serves it until it is told to stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from retort import config as configuration
from retort.config import Config
from retort.envs.wired import PREFIX as ENVIRONMENT
from retort.errors import UserError, did_you_mean
from retort.models.image_text import Unreadable
from retort.serve import environment, rules
from retort.serve.app import application
from retort.serve.scorer import Scorer
from retort.train.models.models import load
from retort.wire import KEY_VARIABLE, is_url

#: Where a server listens unless told otherwise, and most tokens of one request.
HOST, PORT, MOST_TOKENS = "127.0.0.1", 8000, 131_072
#: Settings that have a meaning here.
_READ = ("precision", "device", "attention", "threads", "trust_remote_code", "weights")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: str,
    words: Sequence[str] = (),
    *,
    host: str = HOST,
    port: int = PORT,
    most_tokens: int = MOST_TOKENS,
    say: Callable[[str], Any] = print,
    listening: Callable[[int], Any] = lambda port: None,
) -> None:
    """Serves a model, or an environment, until the process is interrupted.

    Args:
        model: Folder, hub name, GGUF file, a built-in model such as `countdown:teacher`, a judge by rules such as
            `rules:countdown`, or an environment such as `env:rooms` or `env:my_module:Game`.
        words: Settings as `key=value`: precision, device, attention, threads, trust_remote_code, weights.
        host: Address to listen at; other than loopback only with a key in the environment (`RETORT_TEACHER_KEY`).
        port: Port to listen at; 0: any that is free.
        most_tokens: Most tokens of one request.
        say: Takes a sentence for whoever started it.
        listening: Takes the port, once requests are answered.

    Raises:
        UserError: The model cannot be loaded, or the address cannot be used.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if host not in _LOOPBACK and not key:
        raise UserError(
            f"--host {host} lets other machines ask this server: put a key into the environment variable "
            f"{KEY_VARIABLE}, here and where the run is started, or listen at 127.0.0.1 and use an SSH tunnel"
        )
    if not 0 <= port < 2**16 or most_tokens < 1:
        raise UserError("--port is from 0 to 65535, and --max-tokens at least 1")
    if is_url(model):
        raise UserError(f"{model} is a server already; name a model folder or a hub name")
    given = configuration.overrides(list(words))
    for name in given:
        if name not in _READ:
            raise UserError(f"retort serve does not read '{name}'; {did_you_mean(name, _READ)}")
    config = configuration.resolve(given, with_recipe=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("retort serve needs the package 'uvicorn': pip install 'retort-distill[serve]'") from None
    made = next((own for prefix, own in _OTHERS.items() if model.startswith(prefix)), _of_model)
    app, what = made(config, model, key, most_tokens, say)
    listen(app, what, host=host, port=port, say=say, listening=listening)


def _by_rules(config: Config, model: str, key: str, most_tokens: int, say: Callable[[str], Any]) -> tuple[Any, str]:
    """The application of a judge by rules, and what it is."""
    return rules.application(model, rules.rules_of(model), key=key), f"the judge {model}"


def _environment(config: Config, model: str, key: str, most_tokens: int, say: Callable[[str], Any]) -> tuple[Any, str]:
    """The application of an environment, and what it is."""
    name = model.removeprefix(ENVIRONMENT)
    given = next((setting for setting in _READ if config.set_by_user(setting)), None)
    if given is not None:
        raise UserError(f"retort serve {model} reads no settings of models, and '{given}' is one; leave it out")
    return environment.application(environment.Episodes(name), key=key), f"the environment {name}"


def _of_model(config: Config, model: str, key: str, most_tokens: int, say: Callable[[str], Any]) -> tuple[Any, str]:
    """The application of a model, which is loaded, and what it is."""
    lm = load(config, model, "teacher")
    for note in lm.notes:
        say(f"note: {note}")
    if isinstance(lm.image_tokens, Unreadable):
        say(f"note: it reads text alone: {lm.image_tokens.reason}")
    name = Path(model).name if Path(model).exists() else model
    app = application(Scorer(lm, name=name, most_tokens=most_tokens), key=key)
    return app, f"{name} ({lm.precision} on {lm.device.type})"


#: What is served beside models, by what its name begins with.
_OTHERS = {rules.PREFIX: _by_rules, ENVIRONMENT: _environment}


def listen(
    app: Any, what: str, *, host: str, port: int, say: Callable[[str], Any], listening: Callable[[int], Any]
) -> None:
    """Serves an application until the process is interrupted, and says where once it does.

    Args:
        app: The application.
        what: What it is, for the sentence.
        host: See `serve`, as are all others.
        port: See `serve`.
        say: See `serve`.
        listening: See `serve`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for one in self.servers:
                host, port = one.sockets[0].getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                say(f"serving {what} at http://{shown}:{port}; stop it with Ctrl-C")
                listening(port)

    Server(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)).run()
