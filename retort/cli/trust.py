"""`retort trust`: what tells, in a run of one's own, how far a token of the teacher's can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retort import config as configuration
from retort import registry
from retort.align.pair import SameIds
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.evaluate.trust import Protocol, Student, branches, trust
from retort.files import write_text
from retort.method import Method
from retort.teachers.local import LocalTeacher
from retort.train.events.observe import Observer, Silent
from retort.train.output.text import token_parts
from retort.train.runner import load
from retort.train.setup.prepare import Prepared
from retort.train.storage import checkpoint

FILE = "trust.json"
HELD_OUT = "held-out prompts"


def measure(
    path: Path,
    observer: Observer | None = None,
    *,
    view: str = "teacher",
    problems: int = 64,
    places: int = 4,
    candidates: int = 2,
    draws: int = 1000,
    seed: int | None = None,
    method: Method | None = None,
) -> dict[str, Any]:
    """Measures a run's student and teacher as they are at its newest checkpoint, and writes `trust.json` beside it.

    The run is only read, and may be at work meanwhile.

    The prompts are the held-out ones of which the view can show something, or else training prompts, and the file says
    which.

    Args:
        path: Folder of a run, or of one of its checkpoints.
        observer: Who watches.
        view: Of the method: whose tokens are forced.
        problems: Most prompts; the intervals are over them.
        places: Positions per completion.
        candidates: Tokens drawn from the view's distribution and forced at each place.
        draws: Of the bootstrap.
        seed: Of places, answers and bootstrap; the run's by default.
        method: The caller's own method, if the run was started with one.

    Raises:
        UserError: No such run or view, no verifier, or nothing to show to the teacher.
    """
    if min(problems, places, candidates, draws) < 1:
        raise UserError("--problems, --places and --candidates must be at least 1")
    folder, _ = checkpoint.find(path)
    config = configuration.read_json(folder / "config.json", method)
    _need_one_turn(config)
    known = method or registry.load(**config.method)
    if view not in known.views:
        raise UserError(f"view '{view}' is none of method '{known.name}': {', '.join(known.views)}")
    run = load(path, observer or Silent(), method=method, asks=False)
    prepared = token_parts(run.output, "retort trust")
    prompts, source = _prompts(prepared, view, problems)
    verifier = prepared.eval_grader if source == HELD_OUT else prepared.source.grader
    if verifier is None:
        raise UserError("nobody can say which answers are right: the data needs an `answer`")
    protocol = Protocol(
        places=places,
        candidates=candidates,
        max_new_tokens=prepared.config.rollout.max_new_tokens,
        temperature=prepared.method.rollout.temperature,
        samples=prepared.method.rollout.samples if prepared.method.views[view].rewards else 1,
        seed=prepared.config.seed if seed is None else seed,
    )
    own = LocalTeacher(
        prepared.student,
        alignment=SameIds(prepared.learner.vocab),
        batch_tokens=prepared.config.optimizer.batch_tokens,
        template_options=prepared.source.render.template_options,
    )
    watcher = run.observer
    found = branches(
        Student(
            prepared.source.engine,
            own,
            own.render,
            prepared.student.stops,
            prepared.config.rollout.parallel,
        ),
        prepared.teachers.behind(prepared.method)[view],
        prepared.method.views[view],
        prompts,
        verifier,
        protocol,
        lambda done, total: watcher.phase("forcing the teacher's tokens", done, total),
    )
    if not found:
        raise UserError(f"view '{view}' had no context for any of {len(prompts)} prompts, so there is nothing to force")
    results = {
        "method": prepared.method.name,
        "view": view,
        "step": run.step,
        "prompts": source,
        **asdict(protocol),
        **trust(found, seed=protocol.seed, draws=draws),
    }
    write_text(run.folder / FILE, json.dumps(results, indent=2) + "\n")
    return results


def _need_one_turn(config: configuration.Config) -> None:
    if config.environment is not None:
        raise UserError(
            f"this run's episodes are played in the environment '{config.environment}', and retort trust forces tokens "
            "in completions of one turn; name a run without an environment"
        )


def _prompts(prepared: Prepared, view: str, problems: int) -> tuple[list[Prompt], str]:
    """Prompts that the view can show something of."""
    columns = prepared.method.views[view].columns
    for source, prompts in ((HELD_OUT, prepared.held_out), ("training prompts", prepared.source.prompts)):
        fit = [prompt for prompt in prompts if all(prompt.shown(column) for column in columns)]
        evaluator = prepared.eval_grader if source == HELD_OUT else prepared.source.grader
        if evaluator is not None:
            fit = [prompt for prompt in fit if evaluator.can_grade(prompt)]
        if fit:
            return fit[:problems], source
    raise UserError(f"no prompt of the run has what view '{view}' shows: {', '.join(columns) or 'an answer'}")
