"""`retort train`."""

from __future__ import annotations

import argparse
from typing import Any

from retort.cli import descriptions
from retort.files import named


def add_train(commands: Any) -> None:
    """Adds the command to the parsers of all commands."""
    parser = commands.add_parser(
        "train", help="train a student; by default on the built-in task", description=descriptions.TRAIN
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.toml|key=value", help=descriptions.WORDS)
    parser.add_argument("--method", help="name of a method; `retort methods` lists them")
    parser.add_argument("--student", help="model folder or hub name")
    parser.add_argument("--teacher", help="model folder, hub name, or address of a server")
    parser.add_argument("--base", help="second frozen model of some methods; default: the student before training")
    parser.add_argument("--judge", metavar="URL|PATH", help="model that is asked in conversation (docs/judges.md)")
    parser.add_argument("--data", help="file, folder, glob or hub name (docs/data.md)")
    parser.add_argument("--cache", metavar="DIR", help="cache of the teacher's scores (docs/cache.md)")
    parser.add_argument("--out", help="folder of the run; default: a new one in runs/")
    parser.add_argument("--steps", type=int, help="number of steps; a step is one batch of rollouts")
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument(
        "--resume", metavar="DIR", help="continue a run: its folder (newest checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--cluster",
        metavar="auto|ADDRESS",
        help="have Ray start the run's processes (docs/cluster.md): in the cluster at HOST:PORT, or with auto in the "
        "one that RAY_ADDRESS names, else on this machine alone",
    )
    parser.set_defaults(run=train)


def given(arguments: argparse.Namespace, *names: str) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The TOML files, the options of these names, and the words that a command was given."""
    from retort import config

    files = [word for word in arguments.words if word.endswith(".toml")]
    pairs = config.overrides([word for word in arguments.words if not word.endswith(".toml")])
    flags: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    cache, judge = getattr(arguments, "cache", None), getattr(arguments, "judge", None)
    flags |= {} if arguments.method is None else {"method": {"name": arguments.method}}
    flags |= {} if cache is None else {"cache": {"dir": cache}}
    flags |= {} if judge is None else {"judge": {"model": judge}}
    return files, flags, pairs


def train(arguments: argparse.Namespace) -> int:
    """Runs the command in this process, or has Ray start its processes."""
    from rich.console import Console

    from retort.cluster.job import perform
    from retort.console.terminal import RichObserver, lasting_console, quiet_libraries

    if arguments.cluster is not None:
        return _on_cluster(arguments)
    job = _job(arguments)
    quiet_libraries()
    console = lasting_console()
    perform(
        job,
        lambda leads: RichObserver(console if leads else Console(quiet=True)),
        lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False),
    )
    return 0


def _on_cluster(arguments: argparse.Namespace) -> int:
    from retort.cluster import guard
    from retort.cluster.connect import address_of

    address = address_of(arguments.cluster)
    code = guard.apart()  # what follows happens in a process of its own
    if code is not None:
        return code
    from retort.cluster.driver import drive
    from retort.console.terminal import RichObserver, lasting_console, quiet_libraries

    own = arguments.resume is not None
    cluster = {}
    if own:  # the settings of the cluster are those of this start
        words = [word for word in arguments.words if word.startswith("cluster.")]
        arguments.words = [word for word in arguments.words if word not in words]
        from retort import config

        cluster = config.overrides(words).get("cluster", {})
    job = _job(arguments)
    quiet_libraries()
    console = lasting_console()
    observer = RichObserver(console)
    drive(
        job,
        address,
        observer,
        lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False),
        cluster=cluster,
    )
    return 0


def _job(arguments: argparse.Namespace) -> Any:
    """The run that a command line asks for.

    Raises:
        UserError: It is resumed with other settings, or a file cannot be read.
    """
    from retort import config
    from retort.cluster.job import Job
    from retort.config.resumed import changed_by

    files, flags, pairs = given(arguments, "student", "teacher", "base", "data", "out", "steps", "seed")
    if arguments.resume is not None:
        changed = changed_by(pairs, *(set(flags) - {"steps"}), *files)
        return Job(resume=arguments.resume, steps=arguments.steps, changed=changed)
    return Job([*[config.read_toml(named(file)) for file in files], flags, pairs])
