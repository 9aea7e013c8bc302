"""The sections of a run's settings, but the one of its rollouts (`retort.config.rollouts`).

Every setting is here with its default, bounds and words. Bounds and defaults are stated here (and in `retort.config`)
and nowhere else; beyond those bounds every number must be one that can be computed with
(`retort.method.number_problem`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from retort.core.numbers import number_problem, numeric
from retort.errors import UserError, quoted
from retort.files import unnameable
from retort.method import COLDEST, HOTTEST
from retort.wire import CONCURRENCY, KEY_VARIABLE, PATIENCE, TIMEOUT

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Section(BaseModel):
    """Settings that are checked together and never change afterwards."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false where a number is expected: whoever writes them means another setting."""
        if isinstance(value, bool) and numeric(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("number", "must be a number, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _computable(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses numbers that cannot be computed with; a seed only names a stream and may be any."""
        counts = isinstance(value, int | float) and info.field_name != "seed"
        problem = number_problem(value) if counts else None
        if problem is not None:
            raise PydanticCustomError("number", "{problem}", {"problem": problem})
        return value


def _path(name: Any) -> Any:
    return os.fspath(name) if isinstance(name, os.PathLike) else name


def _path_or_name(name: str) -> str:
    problem = unnameable(name)
    if problem is not None:
        raise PydanticCustomError("place", "{problem}", {"problem": problem})
    return name


#: A path (from Python also a `pathlib.Path`), or a name of the hub.
PathOrName = Annotated[str, BeforeValidator(_path), AfterValidator(_path_or_name)]


class ModelSection(Section):
    """A model by its name."""

    path: PathOrName | None = Field(
        default=None, description="model folder, hub name, or address of a server (docs/teachers.md)"
    )
    bits: Literal[8, 4] | None = Field(
        default=None,
        description="round the weights of a frozen model to so many bits when it is loaded (the extra `quantized`); "
        "null: not at all",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="where the weights of a frozen model wait between its passes, so that they take no memory of the "
        "device: cpu, in that of the host (for GPUs); disk, in the model's own files; none: they stay",
    )

    @field_validator("offload", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """A word of the command line that is null elsewhere."""
        return "none" if value is None else value

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was said of the model, and nothing else."""
        left_out = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in handler(self).items() if value != left_out[name]}


#: Models that have a setting of their own: `teacher = "x"` is `[models.teacher]` with `path = "x"`.
SHORTHANDS = ("student", "teacher", "base")


def shorthands(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the models that have a setting of their own are named by that alone.

    Args:
        layer: Nested settings, unchecked.

    Raises:
        UserError: Such a model is named twice, differently; or `models` is no table of models by name.
    """
    models, found = layer.get("models"), {key: value for key, value in layer.items() if key != "models"}
    if models is None:
        return found
    if not isinstance(models, Mapping):
        raise UserError(f"models is a table: give models.NAME.path, not {quoted(models)}")
    others: dict[str, Any] = {}
    for name, model in models.items():
        refuse_name(name)
        unknown = sorted(map(str, set(model) - set(ModelSection.model_fields))) if isinstance(model, Mapping) else []
        if unknown:
            raise UserError(
                f"unknown key 'models.{name}.{unknown[0]}'; a model has a path, and may have "
                f"{' and '.join([*ModelSection.model_fields][1:])}: models.{name}.path"
            )
        if not isinstance(model, Mapping) or not model:
            raise UserError(f"models.{name}: give its folder or hub name as models.{name}.path, not {quoted(model)}")
        if name not in SHORTHANDS:
            others[name] = model
            continue
        besides = {key: value for key, value in model.items() if key != "path"}
        others |= {name: besides} if besides else {}
        if model.get("path") is None:
            continue
        own, path = layer.get(name), _path(model["path"])
        if own is not None and _path(own) != path:
            raise UserError(
                f"{name} is named twice: {name} = {quoted(own)} and models.{name}.path = {quoted(path)}; leave one out"
            )
        found[name] = path
    return found | {"models": others}


def refuse_name(name: Any) -> None:
    """Raises `UserError` if a text cannot be a model's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"models: {quoted(name)} cannot be a model's name; use letters, digits, - and _")


class OptimizerSection(Section):
    """How the student learns. AdamW on fp32 master weights."""

    learning_rate: float = Field(
        default=3e-6, gt=0, le=1000, description="learning rate after the warm-up; an adapter needs a larger one"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="schedule of the learning rate from the end of the warm-up to the end of the run"
    )
    warmup: int = Field(
        default=0, ge=0, description="optimizer steps over which the learning rate rises in a line to its full size"
    )
    final: float = Field(default=0.0, ge=0, le=1, description="share of the learning rate left at the end of the run")
    weight_decay: float = Field(
        default=0.01, ge=0, le=1000, description="weight decay of AdamW, times the learning rate"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW: share kept of the gradient's running mean")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="of AdamW: share kept of the mean of its square")
    grad_clip: float = Field(
        default=1.0, gt=0, description="largest norm of the gradient; a larger gradient is scaled down to it"
    )
    updates: int = Field(default=1, ge=1, description="optimizer steps per batch of rollouts (mini-batches)")
    epochs: int = Field(default=1, ge=1, le=10_000, description="passes over a batch of rollouts")
    batch_tokens: int = Field(
        default=16384,
        ge=1,
        description="most tokens of a forward pass: bounds the memory, and changes nothing but rounding",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: a tenth of their memory, more time"
    )
    vision: Literal["auto", "trained", "frozen"] = Field(
        default="auto",
        description="vision tower and projector of a student that reads images: auto trains them, but puts an adapter "
        "into the text model only",
    )


class LoraSection(Section):
    """An adapter that learns in the place of the student's weights, by `peft` (the extra `lora`)."""

    rank: int = Field(default=0, ge=0, le=65_536, description="rank of the adapter; 0: none, all weights learn")
    alpha: float | None = Field(
        default=None, gt=0, description="the adapter's product counts times this / rank; default: twice the rank"
    )
    dropout: float = Field(default=0.0, description="must be 0: a student learns from what it generated")
    targets: list[str] = Field(
        default_factory=lambda: ["all-linear"],
        min_length=1,
        description="layers by the ends of their names; all-linear leaves out the head, which lm_head adds",
    )
    rslora: bool = Field(default=False, description="the product counts times alpha / sqrt(rank) instead")

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


class ColdStartSection(Section):
    """A first phase of learning from completions that the student did not generate."""

    steps: int = Field(default=0, ge=0, description="so many of the run's steps, the first; 0: no cold start")
    loss: Literal["sft", "forward_kl"] = Field(
        default="sft",
        description="what is learnt: the likelihood of what was written, or the exact forward KL at each of its tokens",
    )
    answers: Literal["teacher", "dataset"] = Field(
        default="teacher",
        description="source of the completions that are learnt from: the teacher, or the data's column `response`",
    )
    attempts: int | None = Field(
        default=3,
        ge=1,
        le=1000,
        description="how often a teacher may try to end a completion by itself; null: cut completions are used",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1000, description="learning rate of the cold start; default: optimizer.learning_rate"
    )


class EvalSection(Section):
    """How the student is evaluated, on prompts it never learns from."""

    data: PathOrName | None = Field(
        default=None, description="data file with answers; default: prompts held out of the training data"
    )
    problems: int = Field(default=64, ge=0, description="number of held-out prompts, at most; 0: no evaluation")
    samples: int = Field(default=8, ge=1, le=100_000, description="completions per prompt: k of avg@k and pass@k")
    temperature: float = Field(default=1.0, ge=COLDEST, le=HOTTEST, description="temperature of held-out completions")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="nucleus sampling of held-out completions: total mass of the tokens kept"
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest held-out completion, tokens; default: rollout.max_new_tokens, as in training",
    )
    every: int = Field(
        default=0, ge=0, description="steps between evaluations during the run; 0: only before and after"
    )
    teacher: bool = Field(default=True, description="evaluate the teacher, too, once")
    pixelated: bool = Field(
        default=True,
        description="answer prompts with an image again with the image pixelated: right answers, and answers that "
        "change; this takes as long as the answers themselves",
    )
    threshold: float = Field(
        default=0.8, ge=0, description="nats of entropy above which a model counts as uncertain in the tables"
    )


class RanksSection(Section):
    """What several ranks divide, see docs/ranks.md; in one process these settings do nothing."""

    head: Literal["auto", "gathered", "vocabulary"] = Field(
        default="auto",
        description="the student's head in the loss: whole on every rank, or each rank its slice of the vocabulary; "
        "auto: by a rule that was measured, see docs/ranks.md",
    )
    teacher: Literal["replicated", "sharded"] = Field(
        default="replicated", description="frozen models: whole on every rank, or their layers sliced over ranks"
    )


class ServerSection(Section):
    """How models are asked that a server holds (docs/teachers.md)."""

    timeout: float = Field(default=TIMEOUT, gt=0, le=86_400, description="seconds that one answer may take")
    patience: float = Field(
        default=PATIENCE,
        ge=0,
        le=1_000_000,
        description="seconds for which a request that failed is tried again; then the run saves a checkpoint and ends",
    )
    requests: int = Field(default=CONCURRENCY, ge=1, le=256, description="requests under way at once")
    payload: Literal["own", "bf16"] = Field(
        default="own",
        description="precision in which hidden states travel: the model's own, or bf16, whose noise a note then gives",
    )
    key: str = Field(
        default=KEY_VARIABLE,
        pattern="^[A-Za-z_][A-Za-z0-9_]{0,99}$",
        description="environment variable that holds the server's key, a bearer token; the key itself is written "
        "nowhere",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="name of the model at a server of completions (docs/endpoints.md); default: its only one",
    )
    tokenizer: PathOrName | None = Field(
        default=None,
        description="folder or hub name with the tokenizer and configuration of the model at a server of completions; "
        "default: the student's",
    )
    check_every: int = Field(
        default=50,
        ge=0,
        description="steps from one check that the server still has the same model to the next; 0: only at the start",
    )
    tolerance: float = Field(
        default=0.02,
        ge=0,
        le=100,
        description="nats by which the log-probs of such a check may differ from those at the start, on average",
    )


class CacheSection(Section):
    """A cache of teachers' scores on disk, which runs share, see docs/cache.md."""

    dir: PathOrName | None = Field(
        default=None, description="folder of the cache, which is made where there is none; null: no cache"
    )
    limit: float = Field(
        default=100.0, gt=0, description="gigabytes that the cache may take; what was used longest ago makes room"
    )
    only: bool = Field(
        default=False,
        description="load no teacher: all scores come from the cache, and one that is not there ends the run",
    )

    @property
    def limit_bytes(self) -> int:
        """Bytes that the cache may take."""
        return int(self.limit * 1e9)

    @model_validator(mode="after")
    def _only_with_a_folder(self) -> CacheSection:
        if self.only and self.dir is None:
            raise PydanticCustomError("cache", "only=true takes scores from a cache, and none is named; give cache.dir")
        return self


class CheckpointSection(Section):
    """When the run is saved."""

    every: int = Field(
        default=50, ge=0, description="steps from one checkpoint to the next; 0: only at the end and when interrupted"
    )
    keep: int = Field(
        default=2, ge=1, description="newest checkpoints kept; the best by held-out avg@k is kept besides"
    )


class RecordSection(Section):
    """What a run records of its rollouts."""

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
