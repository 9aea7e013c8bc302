"""The configuration of a run: TOML or keywords in, checked; resolved JSON out. Unknown keys are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from retort import registry
from retort.config.cluster import ClusterSection
from retort.config.flow import FlowSection
from retort.config.judge import JudgeSection
from retort.config.precedence import flat, leave_open, merge
from retort.config.rollouts import RolloutSection
from retort.config.sections import (
    SHORTHANDS,
    CacheSection,
    CheckpointSection,
    ColdStartSection,
    EvalSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PathOrName,
    RanksSection,
    RecordSection,
    Section,
    ServerSection,
    shorthands,
)
from retort.config.synonyms import ours_for
from retort.config.teachers import TeachersSection
from retort.config.toml import overrides, read_toml, value
from retort.envs.registry import of_data
from retort.errors import UserError, did_you_mean, quoted, shortened
from retort.files import read_object, write_text
from retort.method import Method
from retort.rewards.user import is_user_defined
from retort.rewards.verify import VERIFIERS

__all__ = [
    "BUILTIN",
    "DEFAULT_FOR_TWO_TOKENIZERS",
    "DEFAULT_METHOD",
    "Config",
    "keys",
    "merge",
    "overrides",
    "read_json",
    "read_toml",
    "recipe",
    "resolve",
    "save",
    "value",
]

DEFAULT_METHOD = "eopd"
#: The same where the teacher has another tokenizer than the student. docs/real.md says why.
DEFAULT_FOR_TWO_TOKENIZERS = "simct"
#: Data that ships with Retort, each with a recipe of that name.
BUILTIN = ("countdown", "ranking", "coached", "bait", "rooms", "shapes", "plane", "glyphs")
RECIPES = Path(__file__).parent / "recipes"


def _task(name: str) -> str:
    if name not in VERIFIERS and not is_user_defined(name):
        file, _, function = name.partition(":")
        hint = f"write it as {Path(file).stem}:{function}" if file.endswith(".py") else did_you_mean(name, VERIFIERS)
        problem = f"there is no task '{shortened(name, 100)}', and it is no module:function; {hint}"
        raise PydanticCustomError("task", "{problem}", {"problem": problem})
    return name


class Config(Section):
    """The settings of a run. `retort train` without arguments takes the recipe `countdown`; others, these defaults."""

    student: PathOrName | None = Field(default=None, description="the model that learns: folder or hub name")
    teacher: PathOrName | None = Field(
        default=None,
        description="the model that is learnt from: folder, hub name or address of a server (docs/teachers.md); null "
        "where the student teaches itself",
    )
    base: PathOrName | None = Field(
        default=None,
        description="model folder or hub name of a second frozen model, for methods that ask one; default: the student "
        "as it was before training",
    )
    models: dict[str, ModelSection] = Field(
        default_factory=dict,
        description="further frozen models by name, e.g. models.critic.path=DIR: for methods of your own whose views "
        "name them, or to teach together (teachers.models); models.teacher.path is another way to write teacher, and "
        "so for student and base",
    )
    data: PathOrName | None = Field(
        default=None,
        description="prompts to learn from: a file, a folder, a glob or a hub name (docs/data.md), with a column "
        "prompt or messages; or countdown, ranking, coached, bait, rooms, shapes, plane, glyphs, which ship with "
        "Retort",
    )
    prompt_template: str | None = Field(
        default=None,
        description="template around the data's prompts, e.g. '{prompt}\\nReason step by step.': a teacher is surest "
        "in the words of its own post-training (arXiv 2604.13016); null: as they are",
    )
    task: Annotated[str, AfterValidator(_task)] | None = Field(
        default=None,
        description="how completions are graded: countdown, ranking, coached, bait, shapes, math, exact, or a verifier "
        "of your own as module:function; default: math-verify where the data has answers",
    )
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": DEFAULT_METHOD},
        description="name and settings of the method: see `retort settings method`; where the teacher has another "
        f"tokenizer than the student, the default is {DEFAULT_FOR_TWO_TOKENIZERS}",
    )
    steps: int | None = Field(default=None, ge=1, description="batches of rollouts; default: once through the data")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63, description="seed of all random streams")
    out: PathOrName | None = Field(default=None, description="folder of the run; default: runs/<method>-<time>")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="precision of products; master weights are always fp32; auto: fp32 on a CPU, on a GPU bf16 unless "
        "its rounding is a third of what there is to learn; a run records the choice",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device of the models; auto: cuda where torch sees one"
    )
    attention: str | None = Field(
        default=None,
        description="attention implementation of transformers, e.g. sdpa or eager; auto measures at the start "
        "and takes the quickest; default: the model's own, so that two starts round alike",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of torch; default: as torch chooses"
    )
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with a model; off unless you ask for it"
    )
    weights: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="what to do about weights that a model's files lack, that the model does not have, that have "
        "another shape or are not finite; warn goes on with a note, and with random numbers for what is missing",
    )
    checks: Literal["refuse", "warn", "skip"] = Field(
        default="refuse",
        description="what a fatal finding of the quick checks of `retort doctor` does to a run before it starts",
    )
    own_method: bool = Field(
        default=False, description="the method is the caller's own, not the published one; a run writes it, you do not"
    )
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        default=None,
        description="tracker that curves are also sent to; null: none, metrics.jsonl and report.html hold them",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name = the file's, where they differ, e.g. columns.prompt=problem"
    )
    templates: dict[str, str] = Field(
        default_factory=dict,
        description="templates around the texts that a teacher is shown, by name, e.g. templates.hint='Hint: {text}'; "
        "the names and defaults are in docs/views.md",
    )
    data_turns: Literal["last", "each"] = Field(
        default="last",
        description="what is learnt of a conversation with several turns of the assistant: its last turn, or each, as "
        "prompts of their own with the given turns before them; eval.data and held-out rows are never split",
    )
    split: str = Field(default="train", description="split of a hub data set that prompts are read from")
    limit: int | None = Field(default=None, ge=1, description="use only so many rows of the data, the first; null: all")
    rollout: RolloutSection = RolloutSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection = LoraSection()
    cold_start: ColdStartSection = ColdStartSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    record: RecordSection = RecordSection()
    ranks: RanksSection = RanksSection()
    cluster: ClusterSection = ClusterSection()
    server: ServerSection = ServerSection()
    teachers: TeachersSection = TeachersSection()
    cache: CacheSection = CacheSection()
    judge: JudgeSection = JudgeSection()
    flow: FlowSection = FlowSection()

    @property
    def builtin(self) -> bool:
        """Whether the data is a task that ships with Retort."""
        return self.data in BUILTIN

    @property
    def environment(self) -> str | None:
        """The environment of the rollouts: the one that is set, or the data's own."""
        return self.rollout.env or (None if self.data is None else of_data(self.data))

    @property
    def further_models(self) -> dict[str, str]:
        """Folder or hub name of every model without a setting of its own."""
        return {name: str(model.path) for name, model in self.models.items() if name not in SHORTHANDS}

    @property
    def model_paths(self) -> dict[str, str]:
        """Folder or hub name of every named model; student, teacher and base first."""
        own = {name: location for name in SHORTHANDS if (location := getattr(self, name)) is not None}
        return own | self.further_models

    def moved(self, where: Callable[[str], str]) -> Config:
        """Returns the settings with every model's path changed by `where`."""
        own = {name: where(location) for name, location in self.model_paths.items() if name in SHORTHANDS}
        paths = {name: where(location) for name, location in self.further_models.items()}
        others = {name: model.model_copy(update={"path": paths.get(name)}) for name, model in self.models.items()}
        return self.model_copy(update={**own, "models": others})

    def set_by_user(self, key: str) -> bool:
        """Whether a setting is the user's: neither a default nor one of the method's paper.

        Args:
            key: Its full name, such as `rollout.prompts`.
        """
        section, _, name = key.rpartition(".")
        holder = getattr(self, section) if section else self
        return (not section or section in self.model_fields_set) and name in holder.model_fields_set

    def value(self, key: str) -> Any:
        """A setting by its full name."""
        section, _, name = key.rpartition(".")
        return getattr(getattr(self, section) if section else self, name)

    def changed(self, key: str, value: Any) -> Config:
        """Returns the settings with one changed that the user left open; it still counts as left open.

        Args:
            key: Its full name.
            value: Valid; it is not checked again.
        """
        section, _, name = key.rpartition(".")
        holder = getattr(self, section) if section else self
        copy = holder.model_copy(update={name: value})
        copy.model_fields_set.discard(name)
        return self.model_copy(update={section: copy}) if section else copy


def resolve(*layers: Mapping[str, Any], own: Method | None = None, with_recipe: bool = True) -> Config:
    """Resolves nested settings to one configuration; later layers win.

    Beneath them lies the recipe of the method's paper, without what depends on something that they say
    (`retort.config.precedence.FOLLOWS`), and beneath that the defaults.

    Args:
        layers: Nested settings.
        own: A method that is used instead of one that the settings name.
        with_recipe: Take what the user leaves open from the method's paper; else from the defaults here.

    Raises:
        UserError: Unknown key, section, method or setting (with the nearest known name), or a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, shorthands(layer))
    for named, model in merged.get("models", {}).items():
        if named not in SHORTHANDS and model.get("path") is None:
            raise UserError(f"models.{named}: give its folder or hub name as models.{named}.path")
    chosen = merged.get("method", {})
    if not isinstance(chosen, Mapping):
        raise UserError(f"method: give a name, or a table with name and settings (it is {quoted(chosen)})")
    chosen = dict(chosen)
    name = str(chosen.pop("name", DEFAULT_METHOD))
    if own is None:
        _lead(name, chosen)
    made = own or registry.load(name, **chosen)
    paper = leave_open(made.recipe, merged) if with_recipe else {}
    below, merged = paper, merge(paper, merged)
    # Settings are stored with every default filled in, so that a run's config.json says all that it did.
    merged["method"] = {"name": made.name, **made.settings}
    merged["own_method"] = not made.as_published
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_first_problem(error, made)) from None
    for key in flat(below):  # `set_by_user` asks about the user's settings only
        section, _, last = key.rpartition(".")
        (getattr(config, section) if section else config).model_fields_set.discard(last)
    return config


def recipe(name: str) -> dict[str, Any]:
    """Settings of a recipe that ships with Retort."""
    return read_toml(RECIPES / f"{name}.toml")


def save(config: Config, path: Path) -> None:
    """Writes the resolved configuration as JSON. Infinity is written as a word, which every JSON reader accepts."""
    write_text(path, json.dumps(_plain(config.model_dump()), indent=2) + "\n")


def read_json(path: Path, own: Method | None = None) -> Config:
    """A resolved configuration."""
    try:
        settings = read_object(path)
    except UserError as error:
        raise UserError(f"{error}; put the file back as it was, or start a new run with another --out") from None
    if not isinstance(settings.get("method"), dict):
        whose = "a model's, not a run's" if "model_type" in settings or "architectures" in settings else "not a run's"
        raise UserError(f"{path}: these settings are {whose}; name the folder that a run wrote to (its --out)")
    if settings.get("own_method") and own is None:
        raise UserError(
            f"{path.parent}: the method of this run ('{settings['method'].get('name')}') is not the published one; "
            "go on with retort.distill(resume=..., method=...)"
        )
    return resolve(settings, own=own)


def _plain(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return {key: _plain(item) for key, item in thing.items()}
    if isinstance(thing, float) and thing in (float("inf"), float("-inf")):
        return "inf" if thing > 0 else "-inf"
    return thing


def keys() -> Iterator[str]:
    """Full names of all settings, those of methods excepted."""
    for name, field in Config.model_fields.items():
        section = _section(field.annotation)
        yield from [name] if section is None else (f"{name}.{own}" for own in section.model_fields)


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _known(settings: Mapping[str, Any]) -> list[str]:
    return [*keys(), *(f"method.{name}" for name in settings)]


def _lead(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings of a method that are settings elsewhere."""
    known = registry.defaults(name)
    for key in settings:
        ours = ours_for(key, _known(known)) if key not in known else None
        if ours is not None:
            raise UserError(f"method '{name}' has no setting '{key}'; {ours}")


#: What is said where a list is wanted; a shell takes quotes away that stand alone.
_AS_LIST = """it must be a list, such as '["one","two"]' on a command line"""


def _first_problem(error: ValidationError, method: Method) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return _unknown(location, first["input"], method)
    section = _section(Config.model_fields[location[0]].annotation) if len(location) == 1 else None
    if section is not None and not isinstance(first["input"], Mapping):
        some = ", ".join(list(section.model_fields)[:3])
        return f"{location[0]} is a section: give its settings ({some}, ...), not {quoted(first['input'])}"
    if section is None and len(location) == 1 and isinstance(first["input"], Mapping) and first["input"]:
        return _no_section(location[0], first["input"], method)
    shown = "" if section is not None else f" (it is {quoted(first['input'])})"
    said = _AS_LIST if first["type"] in ("list_type", "tuple_type") else first["msg"]
    return f"{'.'.join(location)}: {said}{shown}"


def _no_section(name: str, value: Mapping[str, Any], method: Method) -> str:
    """The message about settings below a name that is one setting, as verl's `data.train_batch_size` is."""
    whole = _whole([name], value)
    ours = ours_for(whole, _known(method.settings))
    return f"unknown key '{whole}'; {ours or f'{name} is one setting, with none below it'}"


def _whole(location: list[str], value: Any) -> str:
    """The full name of a key, or of the first one below it."""
    leaf = next(iter(flat(value)), "") if isinstance(value, Mapping) else ""
    return ".".join([*location, *([leaf] if leaf else [])])


def _unknown(location: list[str], value: Any, method: Method) -> str:
    """The message about an unknown key: its name here, the nearest name, or all names."""
    whole = _whole(location, value)
    ours = ours_for(whole, _known(method.settings))
    if ours is not None:
        return f"unknown key '{whole}'; {ours}"
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return f"unknown key '{'.'.join(location)}'; {did_you_mean(location[-1], list(section.model_fields))}"
