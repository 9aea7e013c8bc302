"""`retort references`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retort.errors import UserError, counted, visible

_REFERENCES = (
    "Has a model that talks answer every prompt of the data a few times, and writes its answers to a file, from which "
    "runs draw their rubrics (judge.references=FILE) without asking for them again. A file that is there already is "
    "added to."
)


def add_references(commands: Any) -> None:
    """Adds the command to the parsers of all commands."""
    parser = commands.add_parser(
        "references", help="store a talking teacher's answers, for rubrics", description=_REFERENCES
    )
    parser.add_argument("data", metavar="DATA", help="file, folder, glob or hub name (docs/data.md)")
    parser.add_argument("--judge", metavar="URL|PATH", help="who answers (docs/judges.md)")
    parser.add_argument("--out", metavar="FILE", help="the file; default: references.jsonl")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, such as method.references=4")
    parser.set_defaults(run=_references)


def _references(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from retort import api, config
    from retort.console.terminal import RichObserver, quiet_libraries
    from retort.core.grading import RubricPlan
    from retort.registry import load
    from retort.rewards.references import store_references
    from retort.train.given.given import CallerObjects
    from retort.train.models.judge import asker, check_settings
    from retort.train.setup.prompts import read_prompts

    quiet_libraries()
    named: dict[str, Any] = {"data": arguments.data, "method": {"name": "ropd"}}
    named |= {} if arguments.judge is None else {"judge": {"model": arguments.judge}}
    settings = api.assemble(named, config.overrides(arguments.words))
    check_settings(settings)
    method, notes = load(**settings.method), list[str]()
    plan = method.grading or RubricPlan()
    asking = asker(settings, say=notes.append)
    if asking is None:
        raise UserError("nobody is named who answers: --judge URL, or a model folder (docs/judges.md)")
    prompts, _ = read_prompts(settings, arguments.data, notes, CallerObjects())
    observer, path = RichObserver(Console(stderr=True)), Path(arguments.out or "references.jsonl")
    for note in notes:
        observer.note(note)

    def progress(done: int, total: int) -> None:
        observer.phase("asking for answers", done, total)

    try:
        failed = store_references(path, prompts, asking, plan, name=asking.name, seed=settings.seed, progress=progress)
    finally:
        observer.close()
    left = f"; {counted(failed, 'prompt')} without a usable answer, ask again" if failed else ""
    print(visible(f"{path}: answers to {len(prompts) - failed} of {counted(len(prompts), 'prompt')}{left}"))
    return 0
