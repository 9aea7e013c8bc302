"""The section of a run's settings about its rollouts."""

from __future__ import annotations

import sys
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from retort.align.chat import TemplateOptions
from retort.config.sections import Section
from retort.envs.registry import refuse_unknown
from retort.errors import UserError
from retort.rollout.waiting import Waiting


def _env(name: str) -> str:
    try:
        refuse_unknown(name)
    except UserError as error:
        raise PydanticCustomError("env", "{problem}", {"problem": str(error)}) from None
    return name


class RolloutSection(Section):
    """How the student generates."""

    prompts: int = Field(default=128, ge=1, description="prompts per batch of rollouts")
    max_new_tokens: int = Field(default=4096, ge=1, description="longest completion, tokens")
    max_prompt_tokens: int = Field(
        default=1024, ge=1, description="longest prompt, tokens; a longer one stops the run before it starts"
    )
    max_view_tokens: int = Field(
        default=10240,
        ge=1,
        description="longest prompt that a teacher is shown, tokens; in a longer one the privileged texts are cut at "
        "their end, which is counted (`view/<name>/cut`)",
    )
    parallel: int = Field(default=256, ge=1, description="completions generated at the same time, at most")
    stop: list[str] | None = Field(
        default=None, description="stop tokens; default: those of the student's generation settings"
    )
    thinking: bool | None = Field(
        default=None,
        description="passed to chat templates as `enable_thinking`; default: not passed, so that each does what it "
        "does by itself",
    )
    date: str | None = Field(
        default=None,
        description="day for chat templates that write today's, e.g. 2026-11-29; default: the day on which the run "
        "starts, written down so that it reads its prompts the same on any other",
    )
    rendered: bool = Field(
        default=False,
        description="the data's prompts are rendered already: no chat template is applied to them, and the control "
        "tokens that they spell count",
    )
    env: Annotated[str, AfterValidator(_env)] | None = Field(
        default=None,
        description="environment that replies to the student's turns: a name that `retort envs` lists, one of your "
        "own as module:name, or the address of a server that plays it, http://HOST:PORT, or several with commas "
        "between (docs/rooms.md); the data's prompts are then its tasks, and it grades; null: none, or the one of "
        "data=rooms",
    )
    max_turns: int | None = Field(
        default=None, ge=1, description="most turns of an episode; null: as many as its environment allows"
    )
    history: int | None = Field(
        default=None,
        ge=0,
        description="exchanges that the student reads before each turn, behind the first prompt and rendered anew, so "
        "that every turn is a sequence of its own (docs/rooms.md); 0: the last reply; null: a growing conversation",
    )
    tools: bool = Field(
        default=False, description="show the environment's tools to the model, for chat templates that can"
    )
    turns: Literal["lockstep", "ready"] = Field(
        default="lockstep",
        description="lockstep: every episode waits for the replies to all, and a resumed run has the same bits; ready: "
        "for slow environments, an episode goes on when its own reply is there, the same up to rounding",
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="seconds that the environment has for a reply; a later one ends its episode as truncated "
        "(docs/rooms.md); null: as long as it takes",
    )

    engine: Literal["own", "continuous", "vllm", "auto"] = Field(
        default="own",
        description="who writes the rollouts: own, a loop in this process; continuous, transformers' continuous "
        "batching in this process; vllm, in a process of its own, to which the student's weights are sent; auto: vllm "
        "where vllm_python is given and the student is no small one and reads text alone, else own (docs/engines.md)",
    )
    vllm_python: str | None = Field(
        default=None,
        min_length=1,
        description="interpreter of the environment that has vLLM; null: this one, where it has vLLM",
    )
    vllm_options: list[str] = Field(
        default=[], description="further arguments of vLLM's server, such as --tensor-parallel-size=2"
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="processes besides that generate, each with a copy of the student, which the own loop drives or "
        "vLLM holds, whichever rollout.engine says (docs/engines.md); 0: the run's own, or one vLLM",
    )
    worker_timeout: float = Field(
        default=300.0,
        gt=0,
        le=1e6,
        description="seconds without a sign of life after which a worker is killed and started again",
    )
    noise_bound: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="nats by which log-probs of a probe by vLLM or workers may differ from the student's on average; "
        "beyond that the run stops",
    )
    correction: Literal["truncated", "none"] = Field(
        default="truncated",
        description="truncated: where another program than the trainer writes, policy gradients are weighed by "
        "min(p_trainer / p_engine, 2) (docs/engines.md); none: they are not",
    )

    staleness: int = Field(
        default=0,
        ge=0,
        le=64,
        description="steps of the student between the weights that write a batch and those that learn from it, at "
        "most: so many batches are written ahead (docs/overlap.md); 0: none, every batch is written when it is due",
    )

    partial: Literal["wait", "drop", "resume"] = Field(
        default="wait",
        description="completions that have not ended after segment_tokens tokens of a batch: wait, there is no such "
        "budget, and a batch waits for the longest; drop, they are left out and counted; resume, they are kept and go "
        "on in the next batch (docs/overlap.md)",
    )
    segment_tokens: int | None = Field(
        default=None,
        ge=1,
        description="most tokens that a completion gets in one batch, where rollout.partial is drop or resume; less "
        "than max_new_tokens; null: as many as it needs, with wait",
    )

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        """Accepts a day in ISO 8601 as text, or TOML's own date."""
        if value is None:
            return None
        try:
            return (value if type(value) is date else datetime.strptime(value, "%Y-%m-%d")).strftime("%Y-%m-%d")
        except (TypeError, ValueError):
            raise PydanticCustomError("day", "must be a day such as 2026-11-29") from None

    @property
    def template_options(self) -> TemplateOptions:
        """The options with which prompts become ids."""
        return TemplateOptions(self.thinking, self.date, self.rendered)

    @property
    def vllm(self) -> tuple[str, ...]:
        """The interpreter of the vLLM that writes, and further arguments of its server; empty where none writes."""
        return (self.vllm_python or sys.executable, *self.vllm_options) if self.engine == "vllm" else ()

    @property
    def placed(self) -> int:
        """How many workers a cluster places: vLLM is always one, so that its CPUs and GPUs are counted."""
        return self.workers or int(self.engine == "vllm")

    @property
    def waiting(self) -> Waiting:
        """How the environment is waited for, with a record of its own of what came too late."""
        return Waiting(self.deadline, self.turns)
