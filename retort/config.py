"""What a run is made of: TOML or keywords in, checked; resolved JSON out. Unknown keys are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from retort import registry
from retort.errors import UserError, did_you_mean, quoted
from retort.files import read_object, unnameable, write_text
from retort.method import COLDEST, HOTTEST, Method, number_problem
from retort.toml import overrides, read_toml, value

__all__ = [
    "BUILTIN",
    "DEFAULT_METHOD",
    "Config",
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
#: Data that ships with Retort, each with a recipe of that name.
BUILTIN = ("countdown", "ranking", "coached", "bait")
RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _computable(cls, value: Any, info: ValidationInfo) -> Any:
        """Every number is one that can be computed with, but a seed, which only names a stream."""
        counts = isinstance(value, int | float) and info.field_name != "seed"
        problem = number_problem(value) if counts else None
        if problem is not None:
            raise PydanticCustomError("number", "{problem}", {"problem": problem})
        return value


def _place(name: str) -> str:
    problem = unnameable(name)
    if problem is not None:
        raise PydanticCustomError("place", "{problem}", {"problem": problem})
    return name


#: A path, or a name of the hub.
Place = Annotated[str, AfterValidator(_place)]


class RolloutSection(_Section):
    """How the student writes."""

    prompts: int = Field(default=128, ge=1, description="prompts per batch of rollouts")
    max_new_tokens: int = Field(default=4096, ge=1, description="longest answer, tokens")
    max_prompt_tokens: int = Field(
        default=1024, ge=1, description="longest prompt, tokens; a longer one stops the run before it starts"
    )
    max_view_tokens: int = Field(
        default=10240,
        ge=1,
        description="longest prompt that a teacher is shown, tokens; in a longer one the privileged texts are cut at "
        "their end, which is counted (`view/<name>/cut`)",
    )
    parallel: int = Field(default=256, ge=1, description="rollouts written at once")
    stop: list[str] | None = Field(
        default=None, description="stop tokens; default: those of the student's generation settings"
    )
    thinking: bool = Field(default=False, description="passed to chat templates that know `enable_thinking`")


class OptimizerSection(_Section):
    """How the student learns. AdamW on fp32 master weights."""

    learning_rate: float = Field(default=3e-6, gt=0, le=1000)
    schedule: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="after the warm-up")
    warmup: int = Field(default=0, ge=0, description="optimizer steps")
    final: float = Field(default=0.0, ge=0, le=1, description="share of the learning rate at the end")
    weight_decay: float = Field(default=0.01, ge=0, le=1000)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    updates: int = Field(default=1, ge=1, description="optimizer steps per batch of rollouts (mini-batches)")
    epochs: int = Field(default=1, ge=1, le=10_000, description="passes over a batch of rollouts")
    batch_tokens: int = Field(default=16384, ge=1, description="tokens per forward pass")
    gradient_checkpointing: bool = False


class LoraSection(_Section):
    """An adapter that learns in the place of the student's weights, by `peft` (the extra `lora`)."""

    rank: int = Field(default=0, ge=0, le=65_536, description="of the adapter; 0: none, all weights learn")
    alpha: float | None = Field(default=None, gt=0, description="times 1 / rank, its scale; default: twice the rank")
    dropout: float = Field(default=0.0, description="must be 0: a student is taught about what it wrote")
    targets: list[str] = Field(
        default_factory=lambda: ["all-linear"],
        min_length=1,
        description="layers by the ends of their names; all-linear leaves out the head, which lm_head adds",
    )
    rslora: bool = Field(default=False, description="scale by 1 / sqrt(rank) instead")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise PydanticCustomError(
                "dropout",
                "Retort has no dropout, under which a student would learn about another distribution than the one that "
                "it wrote from; leave it at 0",
            )
        return dropout

    @model_validator(mode="after")
    def _used(self) -> LoraSection:
        if not self.rank and (self.alpha, self.targets, self.rslora) != (None, ["all-linear"], False):
            raise PydanticCustomError("no_rank", "its settings do nothing without a rank; set lora.rank, say 64")
        return self


class ColdStartSection(_Section):
    """A first phase of learning from answers that the student did not write."""

    steps: int = Field(default=0, ge=0, description="of the run's steps; 0 for no cold start")
    loss: Literal["sft", "forward_kl"] = Field(
        default="sft", description="likelihood of what was written, or the exact forward KL at each of its tokens"
    )
    answers: Literal["teacher", "dataset"] = Field(
        default="teacher", description="whose; those of the data are its column `response`"
    )
    attempts: int | None = Field(
        default=3,
        ge=1,
        le=1000,
        description="of the teacher at an answer that comes to an end; null: cut answers are used",
    )
    learning_rate: float | None = Field(default=None, gt=0, le=1000, description="default: that of the optimizer")


class EvalSection(_Section):
    """How the student is judged, on prompts it never learns from."""

    data: Place | None = Field(
        default=None, description="data file with answers; default: prompts held out of the training data"
    )
    problems: int = Field(default=64, ge=0, description="prompts; 0 for no evaluation")
    samples: int = Field(default=8, ge=1, le=100_000, description="k of avg@k and pass@k")
    temperature: float = Field(default=1.0, ge=COLDEST, le=HOTTEST)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: as in training")
    every: int = Field(
        default=0, ge=0, description="steps between evaluations during the run; 0: only before and after"
    )
    teacher: bool = Field(default=True, description="judge the teacher too")
    threshold: float = Field(
        default=0.8, description="nats of entropy above which a model counts as uncertain in the tables"
    )


class CheckpointSection(_Section):
    """When the run is saved."""

    every: int = Field(default=50, ge=0, description="steps; 0: only at the end and when interrupted")
    keep: int = Field(
        default=2, ge=1, description="newest checkpoints kept; the best by held-out avg@k is kept besides"
    )


class RecordSection(_Section):
    """What is written down of the rollouts."""

    rollouts: int = Field(default=2, ge=0, description="rollouts per step recorded token by token")
    overlap: int = Field(
        default=16, ge=0, description="k of the comparison of student's and teacher's top-k; 0: no such comparison"
    )
    overlap_every: int = Field(
        default=10,
        ge=1,
        description="batches from one such comparison to the next; at 150,000 ids one costs as much as a "
        "tenth of a step",
    )
    gradient_variance_every: int = Field(
        default=0,
        ge=0,
        description="batches from one measurement of the gradient's variance from prompt to prompt to the next, each a "
        "further pass forward and back over a batch; 0: none",
    )
    answers: int = Field(default=6, ge=0, description="held-out prompts whose first answer is recorded, per evaluation")


class Config(_Section):
    """A run. `retort train` without arguments takes the recipe `countdown`; all else starts from these defaults."""

    student: Place | None = Field(default=None, description="model folder or hub name")
    teacher: Place | None = Field(default=None, description="model folder or hub name")
    base: Place | None = Field(
        default=None,
        description="model folder or hub name of a second frozen model, for methods that ask one; default: the student "
        "as it was before training",
    )
    data: Place | None = Field(
        default=None, description="JSON lines, Parquet or hub name; columns prompt or messages, ..."
    )
    prompt_template: str | None = Field(
        default=None,
        description="what the data's prompts are put into, e.g. '{prompt}\\nReason step by step.': a teacher is surest "
        "in the words of its own post-training (arXiv 2604.13016)",
    )
    task: Literal["countdown", "ranking", "coached", "bait", "math", "exact"] | None = Field(
        None, description="how answers are graded; default: math-verify where the data has answers"
    )
    method: dict[str, Any] = Field(default_factory=lambda: {"name": DEFAULT_METHOD}, description="name and settings")
    steps: int | None = Field(default=None, ge=1, description="batches of rollouts; default: once through the data")
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    out: Place | None = Field(default=None, description="folder of the run; default: runs/<method>-<time>")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of products; master weights are always fp32; auto: fp32 on a CPU, on a GPU bf16 unless what it "
        "rounds away is a third of what there is to learn",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str | None = Field(
        default=None,
        description="attention implementation of transformers, e.g. sdpa or eager; auto measures at the start; "
        "default: the model's own, so that two starts round alike",
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of torch")
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with a model; off unless you ask for it"
    )
    weights: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="what weights do that a model's files lack, that the model has no place for, that have another "
        "shape or are no numbers; warn goes on with a note, and with random numbers for what is missing",
    )
    checks: Literal["refuse", "warn", "skip"] = Field(
        default="refuse",
        description="what a fatal finding of the quick checks of `retort doctor` does to a run before it starts",
    )
    own_method: bool = Field(default=False, description="the method is the caller's own, not the published one")
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name = the file's, where they differ, e.g. columns.prompt=problem"
    )
    templates: dict[str, str] = Field(
        default_factory=dict,
        description="words around what a teacher is shown, by name, e.g. templates.hint='Hint: {text}'; the names and "
        "defaults are in docs/views.md",
    )
    split: str = Field(default="train", description="of a hub data set")
    limit: int | None = Field(default=None, ge=1, description="use only the first rows of the data")
    rollout: RolloutSection = RolloutSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection = LoraSection()
    cold_start: ColdStartSection = ColdStartSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    record: RecordSection = RecordSection()

    @property
    def builtin(self) -> bool:
        """Whether this is a task that ships with Retort."""
        return self.data in BUILTIN


def resolve(*layers: Mapping[str, Any], own: Method | None = None, with_recipe: bool = True) -> Config:
    """One configuration from nested settings; later layers win, the recipe of the method's paper lies beneath.

    Args:
        layers: Nested settings.
        own: A method that is used instead of one that the settings name.
        with_recipe: Take what the user leaves open from the method's paper; else from the defaults here.

    Raises:
        UserError: Unknown key, section, method or setting (with the nearest known name), or a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    chosen = merged.get("method", {})
    if not isinstance(chosen, Mapping):
        raise UserError(f"method: give a name, or a table with name and settings (it is {quoted(chosen)})")
    chosen = dict(chosen)
    name = str(chosen.pop("name", DEFAULT_METHOD))
    made = own or registry.load(name, **chosen)
    merged = merge(dict(made.recipe) if with_recipe else {}, merged)
    # Settings are stored with every default filled in, so that a run's config.json says all that it did.
    merged["method"] = {"name": made.name, **made.settings}
    merged["own_method"] = not made.as_published
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `above` winning. Another method's name drops the settings of the one below."""
    merged = dict(below)
    for key, given in above.items():
        value = {"name": given} if key == "method" and isinstance(given, str) else given
        old = merged.get(key)
        if key == "method" and isinstance(value, Mapping) and isinstance(old, Mapping):
            if value.get("name", old.get("name")) != old.get("name"):
                # Only what the other method also understands is carried over (say, the number of samples).
                known = registry.defaults(str(value["name"]))
                old = {name: setting for name, setting in old.items() if name in known}
            merged[key] = {**old, **value}
        else:
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def recipe(name: str) -> dict[str, Any]:
    """Settings of a recipe that ships with Retort."""
    return read_toml(RECIPES / f"{name}.toml")


def save(config: Config, path: Path) -> None:
    """Writes the resolved configuration as JSON. Infinity is written as the word, so that any reader can read it."""
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


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in place[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        return f"unknown key '{key}'; {did_you_mean(place[-1], known)}"
    return f"{key}: {first['msg']} (it is {quoted(first['input'])})"
