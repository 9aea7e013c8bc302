"""Finds the runs that were evaluated on the same prompts in the same way, or learnt from the same, by digests.

Numbers of runs that were evaluated on different prompts stand in tables of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retort.config import BUILTIN
from retort.report.groups import Group, leaves, seed_text
from retort.report.read import RunFiles, as_object
from retort.report.words import listed

#: `split`: other prompts of the same file, because each seed holds out its own.
Relation = Literal["same", "split", "unknown", "other"]

#: Settings that change what the same prompts and weights come to.
_HOW = ("eval.temperature", "eval.top_p", "eval.max_new_tokens", "eval.threshold", "rollout.thinking", "task")


#: What a setting of those comes to where it is left open.
_OPEN = {"task": "as the data has it", "rollout.thinking": "as the template has it"}


@dataclass(frozen=True)
class Table:
    """A table of runs that may be compared.

    Attributes:
        name: Name of their held-out data, different from that of every other table on the page.
        groups: At least one.
    """

    name: str
    groups: Sequence[Group]


def tables(groups: Sequence[Group]) -> list[Table]:
    """Groups experiments by their evaluation, in order; those that cannot be told apart stay together."""
    found: list[list[Group]] = []
    for group in groups:
        fitting = (members for members in found if not _differing(members[0], group) and _together(members[0], group))
        members = next(fitting, None)
        if members is None:
            found.append([group])
        else:
            members.append(group)
    names = _numbered(_names([_eval_digests(members[0]) for members in found]))
    return [Table(name, members) for name, members in zip(names, found, strict=True)]


def remarks(groups: Sequence[Group]) -> list[str]:
    """Sentences about what keeps runs from being compared; none where all is the same."""
    if len(groups) < 2:
        return []
    split = tables([group for group in groups if group.whos()])
    differences: list[str] = []
    if len(split) > 1:
        parts = [f"{listed([g.name for g in table.groups])} on {table.name}{_how(split[0], table)}" for table in split]
        differences.append(f"Not evaluated alike, so each in a table of its own: {'; '.join(parts)}.")
    for table in split:
        differences += _within(table.groups, _EVALUATED)
    differences += _within(groups, _LEARNT)
    return differences


def source_name(run: RunFiles) -> str:
    """The name of a run's held-out data: a file name, a hub name or a built-in task; empty if it is not known."""
    name = _eval_source(run)
    return name if name in BUILTIN else Path(name).name if Path(name).is_absolute() else name


def same_evaluation(ours: Group, theirs: Group) -> Relation:
    """Whether two experiments were evaluated on the same prompts."""
    digests = [{seed_text(run): run.eval.get("held_out") for run in group.runs} for group in (ours, theirs)]
    same_source = _eval_digests(ours) == _eval_digests(theirs)
    counts = {run.eval.get("problems") for group in (ours, theirs) for run in group.runs if run.eval}
    held = [run.config for group in (ours, theirs) for run in group.runs]
    by_seed = all(not as_object(config.get("eval")).get("data") for config in held)
    return _relation(digests, _eval_digests(ours), same_source, by_seed, alike=len(counts) <= 1)


def _learnt(ours: Group, theirs: Group) -> Relation:
    """Whether two experiments learnt from the same prompts."""
    digests = [{seed_text(run): run.learnt_from for run in group.runs} for group in (ours, theirs)]
    limits = {str(run.config.get("limit")) for group in (ours, theirs) for run in group.runs}
    return _relation(digests, _data(ours), _data(ours) == _data(theirs), True, alike=len(limits) <= 1)


def _relation(
    digests: Sequence[Mapping[str, object]], source: str, same_source: bool, by_seed: bool, *, alike: bool
) -> Relation:
    ours, theirs = digests
    builtin = source in BUILTIN
    if not all(isinstance(digest, str) for side in digests for digest in side.values()):
        if same_source and builtin and alike:
            return "same"
        return "unknown" if same_source and alike else "other"
    common = ours.keys() & theirs.keys()
    equal = all(ours[seed] == theirs[seed] for seed in common)
    if equal and (common or set(ours.values()) == set(theirs.values())):
        return "same"
    return "split" if same_source and by_seed and not builtin and not common else "other"


def _together(ours: Group, theirs: Group) -> bool:
    return not (ours.whos() and theirs.whos()) or same_evaluation(ours, theirs) != "other"


@dataclass(frozen=True)
class _Use:
    """A use of prompts: how two runs relate in it, the source of one, and its wording."""

    relation: Callable[[Group, Group], Relation]
    source: Callable[[Group], str]
    did: str
    lacks: str


def _within(groups: Sequence[Group], use: _Use) -> list[str]:
    """Sentences on how experiments relate to the first of them."""
    first, *others = groups
    by: dict[Relation, list[Group]] = {}
    for group in others:
        by.setdefault(use.relation(first, group), []).append(group)
    differences: list[str] = []
    for kind, members in by.items():
        whose = listed([first.name, *(group.name for group in members)])
        files = listed(list(dict.fromkeys(_names([use.source(group) for group in (first, *members)]))))
        if kind == "other":
            one = len({use.source(group) for group in (first, *members)}) == 1
            which = f"not the same prompts of {files}" if one else f"different data ({files})"
            differences.append(f"{whose} {use.did} {which}.")
        elif kind == "split" and use is _EVALUATED:
            differences.append(
                f"{whose} {use.did} other prompts of {files}: each seed holds out its own (eval.data fixes them)."
            )
        elif kind == "unknown":
            differences.append(
                f"Whether {whose} {use.did} the same prompts of {files} is not known: their {use.lacks} do not say."
            )
    return differences


def _differing(ours: Group, theirs: Group) -> list[tuple[str, Any, Any]]:
    """Evaluation settings that differ: name and both values. A missing one is no difference."""
    if not (ours.whos() and theirs.whos()):
        return []
    flat = [leaves(group.runs[0].config) for group in (ours, theirs)]
    for settings in flat:
        if settings.get("eval.max_new_tokens") is None and "rollout.max_new_tokens" in settings:
            settings["eval.max_new_tokens"] = settings["rollout.max_new_tokens"]
    both = [name for name in _HOW if all(name in settings for settings in flat)]
    return [(name, flat[0][name], flat[1][name]) for name in both if flat[0][name] != flat[1][name]]


def _how(first: Table, table: Table) -> str:
    found = _differing(first.groups[0], table.groups[0])
    shown = ", ".join(f"{name} = {_value(name, theirs)} (there {_value(name, ours)})" for name, ours, theirs in found)
    return f", with {shown}" if shown else ""


def _value(name: str, value: Any) -> str:
    """A setting's value as text; where it was left open, its default."""
    return _OPEN.get(name, "the default") if value is None else str(value)


def _eval_source(run: RunFiles) -> str:
    return str(as_object(run.config.get("eval")).get("data") or run.config.get("data") or "")


def _eval_digests(group: Group) -> str:
    return _eval_source(group.runs[0])


def _data(group: Group) -> str:
    return str(group.runs[0].config.get("data") or "")


_EVALUATED = _Use(same_evaluation, _eval_digests, "were evaluated on", "files")
_LEARNT = _Use(_learnt, _data, "learnt from", "checkpoints")


def _numbered(names: Sequence[str]) -> list[str]:
    seen = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [f"{name} ({n})" if names.count(name) > 1 else name for name, n in zip(names, seen, strict=True)]


def _names(sources: Sequence[str]) -> list[str]:
    """File names, or as much more of the paths as tells different ones apart; the same one twice is numbered."""
    kinds = list(dict.fromkeys(sources))
    parts = [Path(source).parts if Path(source).is_absolute() else (source,) for source in kinds]
    longest = max((len(part) for part in parts), default=1)
    ends = (["/".join(part[-length:]) or "the data" for part in parts] for length in range(1, longest + 1))
    names = next((found for found in ends if len(set(found)) == len(found)), kinds)
    return [dict(zip(kinds, names, strict=True))[source] for source in sources]
