"""`retort serve`."""

from __future__ import annotations

import argparse
from typing import Any

from retort.errors import visible

_SERVE = (
    "Serves a model, or an environment, to runs in other processes or on other machines, whose settings name its "
    "address: --teacher http://127.0.0.1:8000, or rollout.env=http://127.0.0.1:8000. It listens on this machine alone, "
    "unless --host says otherwise. "
    "If the environment variable RETORT_TEACHER_KEY is set, every request must bring that key."
)


def add_serve(commands: Any) -> None:
    """Adds the command to the parsers of all commands."""
    serve = commands.add_parser("serve", help="serve a teacher or an environment to runs elsewhere", description=_SERVE)
    serve.add_argument(
        "model",
        help="model folder, hub name, a built-in model such as countdown:teacher, a judge by rules such as "
        "rules:countdown, or an environment such as env:rooms or env:my_module:Game",
    )
    serve.add_argument("--host", help="address to listen at; default: 127.0.0.1")
    serve.add_argument("--port", type=int, help="port to listen at, 0 for any that is free; default: 8000")
    serve.add_argument("--max-tokens", type=int, dest="most_tokens", help="most tokens of a request; default: 131072")
    serve.add_argument("words", nargs="*", metavar="key=value", help="settings: precision, device, attention, threads")
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from retort.console.terminal import quiet_libraries
    from retort.serve.command import serve

    quiet_libraries()
    named = {name: getattr(arguments, name) for name in ("host", "port", "most_tokens")}
    given = {name: value for name, value in named.items() if value is not None}
    serve(arguments.model, arguments.words, say=lambda text: print(visible(text), flush=True), **given)
    return 0
