"""What a run asks of its parts, and what it leaves behind: both depend on what its student decides.

`retort.train.output.text` is the output of runs whose student decides tokens, `retort.train.flows.output` of those
whose student decides denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from retort.config import Config
from retort.controllers import Probe
from retort.core.rollouts import Group, Prompt, Rollout
from retort.core.signals import TeacherSignal
from retort.core.steps import Clock
from retort.method import Method
from retort.rollout.plan import RolloutPlan
from retort.train.learning.learner import Learner
from retort.train.learning.passes import Batch
from retort.train.source.unended import Unended
from retort.train.storage.checkpoint import Found
from retort.train.teaching.teachers import Teachers

#: Called with what is done and with what there is in all.
Progress = Callable[[int, int], None]


class RolloutSource(Protocol):
    """The party that gives the rollouts of a batch, graded."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The training prompts."""
        ...

    @property
    def count(self) -> int:
        """Number of prompts per batch."""
        ...

    @property
    def given_up(self) -> int:
        """Rollouts so far that count as wrong because their grading did not finish."""
        ...

    @property
    def failed(self) -> Sequence[str]:
        """What went wrong, in words, in each rollout of the last batch that could not be ended."""
        ...

    @property
    def version(self) -> int:
        """Optimizer steps behind the student that wrote the last batch."""
        ...

    @property
    def unended(self) -> Unended:
        """What became of completions of the last batch that did not end within a budget of tokens."""
        ...

    def rollouts(
        self, method: Method, clock: Clock, version: int, difficulty: Mapping[str, float] | None = None
    ) -> list[Group]:
        """The rollouts of a batch, by visit to a prompt; `retort.train.source.source.Source` describes it."""
        ...

    def scored(self) -> Mapping[str, TeacherSignal] | None:
        """What the teachers said of the last batch, if they were asked when it was written; None: ask them now."""
        ...

    def stages(self, times: Mapping[str, float]) -> dict[str, float]:
        """The times of a step by stage, of those (`time/<part>`, seconds) that the loop took, and more about them."""
        ...

    def probed(self, plan: RolloutPlan, probe: Probe, clock: Clock) -> list[Rollout]:
        """Rollouts of the probe prompts."""
        ...

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Keeps its files in a run's folder from now on; nothing is written yet."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores its present state."""
        ...

    def go_back(self, step: int) -> None:
        """Brings its files to a step."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts."""
        ...


class Parts(Protocol):
    """The parts of a run; `retort.train.setup.prepare.Prepared` describes them."""

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        ...

    @property
    def method(self) -> Method:
        """The method, with what comes before it."""
        ...

    @property
    def source(self) -> RolloutSource:
        """Gives the rollouts."""
        ...

    @property
    def batches(self) -> RolloutSource:
        """What the loop asks for a batch: the source, or who has it write ahead."""
        ...

    @property
    def teachers(self) -> Teachers:
        """Score them."""
        ...

    @property
    def learner(self) -> Learner:
        """Learns from them."""
        ...

    @property
    def attention(self) -> str | None:
        """The attention implementation; None for each model's own default, or where there is no such choice."""
        ...

    @property
    def notes(self) -> list[str]:
        """Notes for the user before the run starts."""
        ...

    @property
    def steps(self) -> int:
        """Number of batches in the run."""
        ...

    @property
    def phases(self) -> list[tuple[int, Method]]:
        """The step at which each method of the run begins."""
        ...

    def at(self, step: int) -> tuple[Method, Clock]:
        """The method after so many batches, and the clock."""
        ...

    def spread(self, say: Callable[[str], None]) -> None:
        """Spreads the models over the ranks."""
        ...

    def open(self, folder: Path, step: Callable[[], int]) -> None:
        """Has kept in a run's folder what is asked of a model."""
        ...

    def begin(self, say: Callable[[str], None]) -> None:
        """Starts what works beside this process, before the first batch; `say` takes a line for the user."""
        ...

    def close(self) -> None:
        """Ends what the run started beside itself."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers of a step that the parts counted."""
        ...

    def difficulties(self, plan: RolloutPlan, folder: Path, *, first: bool, progress: Progress) -> dict[str, float]:
        """How hard each prompt is, by its id, for plans that order by it."""
        ...


class Evaluated(Protocol):
    """The evaluations of a run and their table so far; false where nothing is evaluated.

    Attributes:
        results: The before/after table.
    """

    results: dict[str, Any]

    def __bool__(self) -> bool:
        """Whether anything is evaluated."""
        ...

    @property
    def has_begun(self) -> bool:
        """Whether the student was evaluated before it learnt."""
        ...

    def due(self, step: int) -> bool:
        """Whether the student is evaluated after a step."""
        ...

    def teacher(self, progress: Progress) -> None:
        """Evaluates the teachers."""
        ...

    def student(self, progress: Progress, who: str | None = None) -> dict[str, float]:
        """Evaluates the student as it is now, for a row of the table if it has a label; returns the means by name."""
        ...

    def goodness(self, scores: dict[str, float]) -> float | None:
        """The score by which the best checkpoint is chosen; None where there is none."""
        ...


class Output(Protocol):
    """What a run leaves behind."""

    @property
    def decides(self) -> str:
        """What the student decides, many of them, as a metric is named: `tokens`."""
        ...

    @property
    def example(self) -> str:
        """What a model is given as, where a caller gives an object: `(model, tokenizer)`."""
        ...

    @property
    def prepared(self) -> Parts:
        """The parts of the run."""
        ...

    def with_config(self, config: Config) -> Output:
        """The same with other settings, which are resolved further."""
        ...

    def identity(self) -> dict[str, Any]:
        """Settings, digests and versions by which a resumed run notices changes."""
        ...

    def state(self, best: tuple[float, int] | None, advised: Collection[str], identity: Mapping[str, Any]) -> Any:
        """The plain values of a checkpoint, without the learner's counts."""
        ...

    def refuse_other_run(
        self, path: Path, found: Found, identity: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        """Refuses a checkpoint of other data, models or settings, and notes what may only change rounding."""
        ...

    def summary(self) -> dict[str, str]:
        """Lines of the start-up summary, by heading."""
        ...

    def evaluations(self, folder: Path, check: Callable[[], None]) -> Evaluated:
        """The evaluations of the run; `check` is called before anything is written."""
        ...

    def record(self, batch: Batch, values: Mapping[str, Tensor], step: int, folder: Path) -> list[dict[str, Any]]:
        """Lines of `rollouts.jsonl` for a step, and the files in the run's folder that they name."""
        ...

    def metrics(
        self,
        batch: Batch,
        values: Mapping[str, Tensor],
        signals: Mapping[str, TeacherSignal],
        version: int,
        given_up: int,
    ) -> dict[str, float]:
        """What the metrics of a step say of its batch besides the means of the loss."""
        ...

    def save_model(self, folder: Path, results: Mapping[str, Any], step: int, check: Callable[[], None]) -> None:
        """Writes the trained student."""
        ...
