"""What a page calls things in runs whose student decides denoising steps; all other runs keep their words.

Plots and tables are the same for both kinds of decisions. Only their words differ: a step is no token, and what comes
of it is a sample and no completion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from retort.report.groups import Group, all_runs, rows
from retort.report.read import RunFiles, as_object

__all__ = ["all_flows", "apart", "flow_facts", "is_by_step", "is_flow", "of_model", "step_of", "words_of"]

#: What only flow runs have in `eval.json`.
OF_FLOWS = ("samples", "kl_by_step", "by_domain")
_BY_STEP = re.compile(r"(.+)/step-(\d{1,6})")
#: The metric that counts what a student decides, if those are denoising steps.
DECIDED = "denoising_steps"
#: Replaced in this order, the longest first.
_WORDS = (
    ("by position in the completion", "along the denoising"),
    ("problems with a right answer among k", "prompts with a right sample among k"),
    ("Accuracy during the run", "Mean reward during the run"),
    ("completions", "samples"),
    ("completion", "sample"),
    ("tokens", "denoising steps"),
    ("token", "denoising step"),
    ("problems", "prompts"),
    ("problem", "prompt"),
)


def step_of(key: str) -> tuple[str, int] | None:
    """The curve and the number of the denoising step of a metric `<curve>/step-<number>`; None of any other."""
    found = _BY_STEP.fullmatch(key)
    return None if found is None else (found[1], int(found[2]))


def is_by_step(key: str) -> bool:
    """Whether a metric is a curve's mean at one denoising step: it is drawn with the other steps."""
    return step_of(key) is not None


def is_flow(run: RunFiles) -> bool:
    """Whether a run's student decides denoising steps, by what its files hold."""
    found = any(name in own for own in (run.eval, *rows(run)) for name in OF_FLOWS)
    return found or DECIDED in run.curves or any(map(is_by_step, run.curves))


def of_model(run: RunFiles, who: str, name: str) -> Any:
    """What `eval.json` holds of one model under a name of `OF_FLOWS`: in the model's row, or beside the table.

    Args:
        run: The files of a run.
        who: Name of the model's row.
        name: The part.
    """
    row = next((row for row in rows(run) if row.get("who") == who), {})
    return row.get(name) or as_object(run.eval.get(name)).get(who)


def all_flows(groups: Sequence[Group]) -> bool:
    """Whether all of at least one run decide denoising steps."""
    runs = all_runs(groups)
    return bool(runs) and all(map(is_flow, runs))


def apart(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Experiments with flows, and those without."""
    flows = [group for group in groups if any(map(is_flow, group.runs))]
    return flows, [group for group in groups if group not in flows]


def flow_facts(run: RunFiles) -> list[tuple[str, str]]:
    """How a flow run's student denoises, for the head of the page; nothing for other runs."""
    own = as_object(run.config.get("flow")) if is_flow(run) else {}
    about = (
        ("Denoising steps", "steps", "{}"),
        ("In evaluations", "eval_steps", "{} steps, no noise"),
        ("Sampler", "sampler", "{}"),
        ("Noise level", "noise_level", "{}"),
        ("Window", "window", "{} steps"),
        ("Guidance", "guidance", "{}"),
    )
    return [(name, words.format(own[key])) for name, key, words in about if own.get(key) not in (None, "", 1.0)]


def words_of(groups: Sequence[Group]) -> Callable[[str], str]:
    """How a page about some runs words what it says: as it is, unless all of them decide denoising steps."""
    return _fitted if all_flows(groups) else str


def _fitted(text: str) -> str:
    """A text of the page in the words of denoising steps."""
    for word, instead in _WORDS:
        text = text.replace(word, instead)
    return text
