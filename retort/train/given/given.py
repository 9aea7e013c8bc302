"""Objects that a caller of the Python API passes instead of names: models, rows, a verifier.

In the settings of a run a text that begins with `in memory: ` stands for each. Models and verifiers must be given again
when the run is resumed; rows are kept in the folder of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, cast

from retort.config import Config
from retort.config.sections import SHORTHANDS
from retort.core.rollouts import Prompt
from retort.data import load_prompts, prompts_from_rows
from retort.data.images import spelt as image_text
from retort.data.load import numbered
from retort.data.values import plain
from retort.errors import UserError, quoted
from retort.files import parse_object, reason, write_bytes
from retort.flows.base import VelocityModel
from retort.models.in_memory import InMemoryModel
from retort.ranks import CLUSTER, here, local_size
from retort.rewards.base import Grader
from retort.rewards.user import IN_MEMORY, UserGrading, imported, is_user_defined, name_of, user_grader
from retort.train.given.arguments import path_argument

#: Rows that can be given, by the setting, with the argument of `retort.distill` and the file that keeps them.
ROWS = {"data": ("data", "given-data.jsonl"), "eval.data": ("eval_data", "given-eval-data.jsonl")}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of data that the caller holds.

    Attributes:
        rows: The mappings, as given.
        where: Their name in messages.
    """

    rows: Sequence[Mapping[str, Any]]
    where: str = "data"

    @staticmethod
    def from_iterable(setting: str, rows: Any, limit: int | None) -> Rows:
        """Reads rows from what the caller passed.

        Args:
            setting: The setting, for messages.
            rows: A list, a `datasets.Dataset` or any other iterable of mappings.
            limit: Number of rows to take; None for all.

        Raises:
            UserError: The object is not an iterable of mappings.
        """
        where = ROWS[setting][0]
        return Rows([row for _, row in islice(numbered(rows, where), limit)], where)

    @staticmethod
    def kept(path: Path) -> Rows:
        """Reads rows that the folder of a run keeps.

        Raises:
            UserError: The file is missing or damaged.
        """
        again = "put the file back as it was, or start a new run"
        try:
            lines = [line for line in path.read_bytes().split(b"\n") if line]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {reason(error)}; {again}") from None
        rows: list[Mapping[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(parse_object(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; {again}") from None
        return Rows(rows)

    @cached_property
    def content(self) -> bytes:
        """The rows as JSON lines, which are read as the rows themselves are.

        Raises:
            UserError: A cell, perhaps of a column that nobody reads, is nothing that JSON can spell.
        """
        return b"".join(_line(self.where, number, row) for number, row in enumerate(self.rows))

    @property
    def label(self) -> str:
        """The placeholder of these rows in the settings."""
        return f"{IN_MEMORY}{len(self.rows)} rows, {hashlib.sha256(self.content).hexdigest()[:8]}"


@dataclass(frozen=True, eq=False)
class CallerObjects:
    """Objects that the caller passed.

    Attributes:
        models: Models by their placeholder.
        flows: Velocity models by their placeholder.
        rows: Rows by their setting.
        grade: A verifier.
    """

    models: Mapping[str, InMemoryModel] = field(default_factory=lambda: {})
    rows: Mapping[str, Rows] = field(default_factory=lambda: {})
    grade: UserGrading | None = None
    flows: Mapping[str, VelocityModel] = field(default_factory=lambda: {})

    def flow(self, name: str) -> VelocityModel | None:
        """The velocity model behind a placeholder; None for any other text."""
        return self.flows.get(name)

    def source(self, name: str) -> InMemoryModel | None:
        """The model behind a placeholder; None for any other text."""
        return self.models.get(name)

    def prompts(self, config: Config, setting: str, path: str, limit: int | None, notes: list[str]) -> list[Prompt]:
        """The prompts of a setting: from the rows that were given for it, or from the path that it names."""
        rows = self.rows.get(setting)
        if rows is not None:
            where = ROWS[setting][0]
            return prompts_from_rows(rows.rows, where=where, limit=limit, columns=config.columns, notes=notes)
        return load_prompts(path, split=config.split, limit=limit, columns=config.columns, notes=notes)

    def verifier(self, config: Config, prompts: Sequence[Prompt]) -> Grader | None:
        """The user's own verifier, given or named; None where a task of Retort's grades.

        Raises:
            UserError: It cannot be imported, or does not work.
        """
        task = config.task
        if task is None or not is_user_defined(task):
            return None
        own = imported(task) if self.grade is None else self.grade
        return user_grader(own, task.removeprefix(IN_MEMORY), prompts[0])

    def again(self, config: Config, folder: Path) -> CallerObjects:
        """Collects the objects of a resumed run: those given now, and the rows that its folder keeps.

        Raises:
            UserError: Something that was given is not given again, or something is given that the run has by name.
        """
        inside = [name for name, path in config.model_paths.items() if path == in_memory(name)]
        for name in inside:
            if in_memory(name) not in {*self.models, *self.flows}:
                raise _absent(folder, name, _again(name))
        for name in (text.removeprefix(IN_MEMORY) for text in (*self.models, *self.flows)):
            if name not in inside:
                raise _named(folder, name, "named in its settings")
        task = str(config.task or "")
        if self.grade is None and task.startswith(IN_MEMORY):
            raise _absent(folder, "verifier", f"verifier={task.removeprefix(IN_MEMORY)}")
        if self.grade is not None and name_of(self.grade) != task:
            raise UserError(
                f"{folder}: its verifier is {task or 'none of your own'}, not {name_of(self.grade)}; give the one that "
                "it was started with"
            )
        rows: dict[str, Rows] = {}
        for setting, path in {"data": config.data, "eval.data": config.eval.data}.items():
            inside = str(path or "").startswith(IN_MEMORY)
            if setting in self.rows:
                raise _named(
                    folder, ROWS[setting][0], f"kept in {ROWS[setting][1]}" if inside else "named in its settings"
                )
            if inside:
                rows[setting] = Rows.kept(folder / ROWS[setting][1])
        return replace(self, rows=rows)

    @property
    def notes(self) -> list[str]:
        """Notes about what cannot be checked of objects that are given again."""
        if self.grade is None or not name_of(self.grade).startswith(IN_MEMORY):
            return []
        name = name_of(self.grade).removeprefix(IN_MEMORY)
        return [
            f"the verifier is called {name}, as the one that the run was started with; that it grades like that one is "
            "not checked"
        ]

    def keep(self, folder: Path) -> None:
        """Writes the rows into the folder of a run.

        Raises:
            RunError: They cannot be written.
        """
        for setting, rows in self.rows.items():
            write_bytes(folder / ROWS[setting][1], rows.content)


def going_on(config: Config, folder: Path, example: str = "(model, tokenizer)") -> str:
    """The command that resumes a run, or the Python call where the run was given objects.

    Args:
        config: The settings of the run.
        folder: Its folder.
        example: What a model is given as.
    """
    again = [_again(name, example) for name, path in config.model_paths.items() if path == in_memory(name)]
    again += ["method=..."] if config.own_method else []
    again += ["verifier=..."] if str(config.task or "").startswith(IN_MEMORY) else []
    if not again:
        return f"{_command()} --resume {folder}"
    return f"retort.distill(resume={str(folder)!r}, {', '.join(again)}), with the same objects"


def _command() -> str:
    """The command as this process was started: by itself, or with its fellows by Ray or torchrun."""
    cluster = os.environ.get(CLUSTER)
    if cluster is not None:
        return f"retort train --cluster {cluster}"
    if here().size == 1:
        return "retort train"
    machines = "" if local_size() == here().size else "... "
    return f"torchrun {machines}--nproc-per-node {local_size()} -m retort train"


def collect(named: Mapping[str, Any], settings: Mapping[str, Any], grade: Any) -> tuple[dict[str, Any], CallerObjects]:
    """Splits the arguments of `retort.distill` into settings and objects.

    Args:
        named: By the setting (`student`, `models.NAME.path`, `data`, `eval.data`, ...): a path or name, or an object;
            None for absent.
        settings: The settings given besides, for their limits.
        grade: A verifier: a function, an object with a method `grade(group)`, or a text that names one; None for
            absent.

    Raises:
        UserError: An object of a kind that is not taken.
    """
    found: dict[str, Any] = {}
    models: dict[str, InMemoryModel] = {}
    flows: dict[str, VelocityModel] = {}
    rows: dict[str, Rows] = {}
    for name, thing in named.items():
        if thing is None:
            continue
        if isinstance(thing, (str, PathLike)):
            found[name] = path_argument(ROWS[name][0] if name in ROWS else name, thing)
        elif name not in ROWS:
            model = name.removeprefix("models.").removesuffix(".path")
            found[name] = in_memory(model)
            if isinstance(thing, VelocityModel):
                flows[in_memory(model)] = thing
            elif hasattr(thing, "velocity"):
                raise UserError(f"{model}: a {type(thing).__name__} is no velocity model: it has no {_lacking(thing)}")
            else:
                models[in_memory(model)] = InMemoryModel.from_pair(model, thing)
        else:
            evaluated = settings.get("eval")
            evaluated = cast("Mapping[str, Any]", evaluated) if isinstance(evaluated, Mapping) else {}
            limit = settings.get("limit") if name == "data" else evaluated.get("problems")
            rows[name] = Rows.from_iterable(name, thing, limit if isinstance(limit, int) and limit > 0 else None)
            found[name] = rows[name].label
    if isinstance(grade, str):
        found["task"] = grade
    elif grade is not None:
        found["task"] = name_of(grade)
    return found, CallerObjects(models, rows, None if isinstance(grade, str) else grade, flows)


def _lacking(thing: object) -> str:
    """What an object lacks to be a velocity model."""
    wanted = ("module", "latent_shape", "identity", "condition", "velocity", "sigmas", "decoded", "save")
    return ", ".join(name for name in wanted if not hasattr(thing, name))


def in_memory(name: str) -> str:
    """The placeholder of a model that was given as an object."""
    return f"{IN_MEMORY}{name}"


def _again(name: str, example: str = "(model, tokenizer)") -> str:
    """The argument that gives a model again."""
    return f"{name}={example}" if name in SHORTHANDS else f"models={{{name!r}: {example}}}"


def _absent(folder: Path, what: str, example: str) -> UserError:
    return UserError(
        f"{folder}: the {what} of this run was given as an object, which no folder keeps; give it again: "
        f"retort.distill(resume=..., {example})"
    )


def _named(folder: Path, what: str, how: str) -> UserError:
    return UserError(f"{folder}: the {what} of this run is {how}, so none can be given; leave it out")


def _line(where: str, number: int, row: Mapping[Any, Any]) -> bytes:
    """A row as a line of JSON."""
    cells: list[str] = []
    for name, value in row.items():
        # A column whose name is no text is never read; it makes room for one that is called like that.
        if not isinstance(name, str) and _key(name) in row:
            continue
        try:
            cells.append(f"{json.dumps(_key(name))}: {json.dumps(_spelt(plain(value)))}")
        except (ValueError, RecursionError) as error:  # a circle, or a number of thousands of digits
            why = "nested too deeply, or within itself" if isinstance(error, RecursionError) else str(error)
            raise UserError(
                f"{where}, row {number}: the column {quoted(name, 40)} cannot be kept in the run's folder ({why}); "
                "leave it out"
            ) from None
    return f"{{{', '.join(cells)}}}\n".encode()


def _spelt(value: Any) -> Any:
    """A plain cell in JSON's types, so that it is read as it is itself (see `retort.data.values`)."""
    if isinstance(value, Mapping):
        texts = {key for key in value if isinstance(key, str)}
        return {_key(key): _spelt(item) for key, item in value.items() if key in texts or _key(key) not in texts}
    if isinstance(value, list):
        return [_spelt(item) for item in value]
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    if value is None or isinstance(value, str | int | float):
        return value
    # Images become data URLs. Nobody reads what is still something else: such a cell is refused where it is read.
    return image_text(value) or str(value)


def _key(key: Any) -> str:
    """The name of a column or of a part as JSON has it."""
    if isinstance(key, str):
        return key
    return json.dumps(key) if key is None or isinstance(key, int | float) else str(key)
