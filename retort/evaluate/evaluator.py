"""Evaluating a model on fixed prompts. Axis letters: see `retort.core`.

It draws from its own random stream, keyed by prompt and member only: the same prompts, seed and weights give the same
answers, whenever it is done, and nothing of a run's training is moved by it. Entropies, divergences and log-probs are
those of the models as they are, at temperature 1, whatever the temperature of a method's loss or of the sampling: so
the tables of all methods are about the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retort.align.chat import TemplateOptions, rendered
from retort.config import Config
from retort.config.clients import environment_client
from retort.core.context import Context
from retort.core.needs import DENSE, SPANS, Need, can_meet
from retort.core.per_token import Core, per_token
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Pack, Prompt, Rollout, Status, in_groups
from retort.core.steps import Clock
from retort.evaluate.measures import bounds
from retort.evaluate.passk import Estimate
from retort.evaluate.per_byte import IN_UNITS, against_units, byte_counts, ratios
from retort.evaluate.pixelated import CHANGED, ORIGINAL, PIXELATED, Pixelated
from retort.evaluate.profile import Profile
from retort.evaluate.rewarded import of_parts, of_rewards, tally_parts
from retort.models.lm import LanguageModel
from retort.ranks import Share, here
from retort.rewards.base import Grader, graded
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.rollout.record import token_row
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.view import View

#: Prompts that are generated for and scored at once: this bounds the memory.
_BLOCK = 64
#: Measures that are means of zeros and ones, over tokens or completions.
_SHARES = ("truncated", "uncertain", "student_uncertain", "success", IN_UNITS, ORIGINAL, PIXELATED, CHANGED)


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates models on fixed prompts.

    Attributes:
        prompts: The held-out prompts.
        verifier: Grades completions of the prompts that it can grade; of others only lengths and
            divergences are measured.
        samples: k, completions per prompt.
        seed: The seed of the run.
        max_new_tokens, temperature, top_p: Of sampling.
        vocab: Number of ids that are tokens.
        batch_tokens: Tokens per forward pass.
        template_options: Options passed to chat templates.
        threshold: Nats of entropy above which a model counts as uncertain.
        recorded: Number of prompts whose first completion is kept token by token.
        episodes: The environment that replies to the model.
        pixelated: Whether prompts with an image are answered again with the image pixelated.
    """

    prompts: Sequence[Prompt]
    verifier: Grader | None
    samples: int
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    vocab: int
    batch_tokens: int
    template_options: TemplateOptions
    threshold: float
    recorded: int = 0
    episodes: EpisodeSetup = field(default_factory=EpisodeSetup)
    pixelated: bool = False

    @staticmethod
    def from_config(
        config: Config,
        prompts: Sequence[Prompt],
        verifier: Grader | None,
        *,
        vocab: int,
        episodes: EpisodeSetup | None = None,
    ) -> Evaluator:
        """Builds the evaluator that a run's settings describe, by default with an environment of its own."""
        return Evaluator(
            prompts=prompts,
            verifier=verifier,
            samples=config.eval.samples,
            seed=config.seed,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            vocab=vocab,
            batch_tokens=config.optimizer.batch_tokens,
            template_options=config.rollout.template_options,
            threshold=config.eval.threshold,
            recorded=config.record.answers,
            pixelated=config.eval.pixelated,
            episodes=episodes
            or EpisodeSetup.named(
                config.environment,
                config.rollout.template_options,
                turns=config.rollout.max_turns,
                tools=config.rollout.tools,
                history=config.rollout.history,
                waiting=config.rollout.waiting,
                client=environment_client(config.server),
            ),
        )

    def evaluate(
        self,
        lm: LanguageModel,
        engine: Engine,
        *,
        teacher: Teacher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Computes one row of the before/after table.

        Args:
            lm: The model that is evaluated.
            engine: Generates its completions.
            teacher: The teacher that it is compared with, where that one can give distributions, or scores of units.
            progress: Called with prompts done (at first 0) and prompts in all.

        Returns:
            Estimates with value, low and high, where they could be measured: `avg@k`, `pass@k`, `length`, `truncated`,
            `student_entropy` (the writer's own), `student_uncertain` (share of tokens where it exceeds the threshold),
            and against the teacher `reverse_kl`, `uncertain` (share of tokens where the teacher is), and over those
            tokens alone `forward_kl_uncertain`, `student_entropy_uncertain`, `teacher_entropy_uncertain`. Against a
            teacher with another tokenizer none of these can be measured, but `bytes_in_units`. Against any teacher
            `reverse_kl_per_byte`, where completions are drawn at temperature 1 and `top_p` 1. Both are explained in
            `retort.evaluate.per_byte`. Of an environment's episodes also `success`, `turns`, `tool_errors`. Of prompts
            with an image `right_original`, `right_pixelated`, `changed_pixelated` (`retort.evaluate.pixelated`).
            And what the verifier measures besides (`Grade.parts`), as `reward/<part>`: means over samples, as `avg@k`.
            Besides: `pass_at`, pass@k for k = 1, 2, 4, ...; `profile`, see `Profile.plain`; `answers`, the first
            completion of each of the first `recorded` prompts, token by token; and `given_up`, the number of
            completions that count as wrong because their comparison with the right answer did not finish, if any.
        """
        before = self._given_up()
        rewards: list[list[float]] = []
        first: list[float | None] = []
        tallies: dict[str, tuple[list[float], list[float]]] = {}
        parts: dict[str, list[float]] = {}
        profile, answers = Profile(self.max_new_tokens), list[dict[str, Any]]()
        again = Pixelated(lambda own: self._shared(engine, own), self.samples) if self.pixelated else None
        if progress is not None:
            progress(0, len(self.prompts))
        for start in range(0, len(self.prompts), _BLOCK):
            block = self.prompts[start : start + _BLOCK]
            rollouts = self._shared(engine, block)
            for index in range(len(block)):
                own = rollouts[index * self.samples : (index + 1) * self.samples]
                known = [rollout.reward for rollout in own if rollout.reward is not None]
                first.append(known[0] if known else None)
                if known:
                    rewards.append(known)
                tally_parts(parts, [rollout.reward_parts for rollout in own])
                _tally(tallies, "length", [float(rollout.steps) for rollout in own])
                _tally(tallies, "truncated", [float(rollout.status == Status.TRUNCATED) for rollout in own])
                _tally(tallies, "splits", [float(rollout.splits) for rollout in own])
                for name in own[0].measures:
                    _tally(tallies, name, [rollout.measures[name] for rollout in own])
            for found in [] if again is None else again.measures(block, rollouts):
                for name, numbers in found.items():
                    _tally(tallies, name, numbers)
            values, pack = self._compare(lm, teacher, rollouts)
            self._tally_values(tallies, values, pack)
            if teacher is not None:
                self._tally_ratios(tallies, ratios(values, byte_counts(pack, lm), as_drawn=self.as_drawn), pack)
            profile.add(values, pack.steps.position_N, pack.steps.turn_N)
            for index in range(max(0, min(len(block), self.recorded - start))):
                answers.append(self._recorded(lm, pack, index * self.samples, values, first[start + index]))
            if progress is not None:
                progress(min(start + _BLOCK, len(self.prompts)), len(self.prompts))
        if not any(tallies["splits"][0]):
            del tallies["splits"]
        row = {**self._row(rewards, tallies), **of_parts(parts), "profile": profile.plain()}
        lost = self._given_up() - before
        row |= {"given_up": lost} if lost else {}
        return {**row, "answers": answers} if answers else row

    def _given_up(self) -> int:
        verifier = self.verifier
        return 0 if verifier is None else sum(here().each(lambda: verifier.given_up))

    @property
    def as_drawn(self) -> bool:
        """Whether completions are drawn from the model's own distribution, so that log-ratios estimate a divergence."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def graded(self) -> dict[str, int]:
        """The number of prompts that can be graded, as `graded`, where that is only a part of them."""
        count = 0 if self.verifier is None else sum(map(self.verifier.can_grade, self.prompts))
        return {"graded": count} if 0 < count < len(self.prompts) else {}

    def _shared(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The same, divided between the ranks."""
        return here().divide(prompts, lambda own: self._answers(engine, own), key=id)

    def _answers(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The model's answers to some prompts, graded where somebody grades."""
        tasks: list[Task] = []
        for prompt in prompts:
            context = rendered(prompt, engine.tokenizer, self.template_options, engine.image_tokens)
            for member in range(self.samples):
                uniform_stream = UniformStream(self.seed, "evaluation", prompt.id, member)
                tasks.append(Task(prompt, context, member, uniform_stream))
        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p)
        written = run_episodes(engine, tasks, sampling, setup=self.episodes)
        return written if self.verifier is None else graded(self.verifier, written)

    @torch.no_grad()
    def _compare(
        self, lm: LanguageModel, teacher: Teacher | None, rollouts: Sequence[Rollout]
    ) -> tuple[dict[str, Tensor], Pack]:
        """Entropies, divergences and log-probs at every token of the completions, [N] each, on the CPU."""
        pack, share = Pack.of(list(rollouts)), Share.of(in_groups(rollouts), here())
        asked = in_groups(rollouts)[share.groups]
        own = Pack.of([rollout for group in asked for rollout in group])
        need = None if teacher is None else _comparable(teacher)
        signals = {}
        if teacher is not None and need is not None:
            signals = {"teacher": teacher.score(asked, ScoreRequest(View(), frozenset({need})))}
        was_training = lm.model.training
        lm.model.eval()
        hidden_ND = lm.all_hidden(own.sequences, self.batch_tokens)
        values = {DENSE: _against_teacher, SPANS: against_units, None: _alone}[need]
        steps = own.steps.to(lm.device)
        with lm.compute():
            found = per_token(Core(values, steps, Clock(), signals, lm.head(), self.vocab), hidden_ND)
        lm.model.train(was_training)
        return share.filled({name: values_N.cpu() for name, values_N in found.items()}, len(pack)), pack

    def _tally_values(
        self, tallies: dict[str, tuple[list[float], list[float]]], values: Mapping[str, Tensor], pack: Pack
    ) -> None:
        """Sums the measures of the table per prompt."""
        measures = _measures(values, self.threshold)
        for group in range(int(pack.group_R.max()) + 1):
            inside_N = pack.steps.group_N == group
            for name, values_N in measures.items():
                own_N = values_N[inside_N]
                _tally(tallies, name, own_N[~own_N.isnan()].double().tolist())

    def _tally_ratios(
        self, tallies: dict[str, tuple[list[float], list[float]]], measures: Mapping[str, Sequence[Tensor]], pack: Pack
    ) -> None:
        """Sums the two sides of ratios per prompt."""
        for name, columns in measures.items():
            for group in range(int(pack.group_R.max()) + 1):
                inside_N = pack.steps.group_N == group
                for tally, column_N in zip(tallies.setdefault(name, ([], [])), columns, strict=True):
                    tally.append(float(column_N[inside_N].sum()))

    def _recorded(
        self, lm: LanguageModel, pack: Pack, index: int, values: Mapping[str, Tensor], reward: float | None
    ) -> dict[str, Any]:
        """One completion, token by token, in the form of the lines of `rollouts.jsonl`."""
        named = {**values}
        if "teacher_entropy" in named:
            named["gate"] = (named["teacher_entropy"] > self.threshold).float()
        return token_row(pack, index, named, lm.tokenizer) | {"reward": reward}

    def _row(
        self, rewards: Sequence[Sequence[float]], tallies: dict[str, tuple[list[float], list[float]]]
    ) -> dict[str, Any]:
        row: dict[str, Any] = of_rewards(rewards, self.samples)
        for name, (sums, counts) in tallies.items():
            found = (Estimate.share if name in _SHARES else Estimate.ratio)(sums, counts)
            row[name] = None if found is None else found.within(*bounds(name))
        return {name: value.plain() if isinstance(value, Estimate) else value for name, value in row.items()}


def _comparable(teacher: Teacher) -> Need | None:
    """What a teacher is asked for: its distributions if it has them, else scores of units, else nothing."""
    return next((need for need in (DENSE, SPANS) if can_meet(teacher.capabilities, need)), None)


def _alone(context: Context) -> dict[str, Tensor]:
    return {"student_logp": context.student_logp_N, "student_entropy": context.student_entropy_N}


def _against_teacher(context: Context) -> dict[str, Tensor]:
    rows = context.signal("teacher")
    return {
        **_alone(context),
        "teacher_logp": rows.sampled_logp_N,
        "teacher_entropy": rows.entropy_N,
        "reverse_kl": context.student.reverse_kl(rows.distribution),
        "forward_kl": context.student.forward_kl(rows.distribution),
    }


def _measures(values: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The measures of the table, [N] each; NaN on tokens that a measure leaves out."""
    entropy_N = values["student_entropy"]
    found = {"student_entropy": entropy_N, "student_uncertain": (entropy_N > threshold).float()}
    if "teacher_entropy" not in values:
        return found
    uncertain_N = values["teacher_entropy"] > threshold
    found |= {"reverse_kl": values["reverse_kl"], "uncertain": uncertain_N.float()}
    for name in ("forward_kl", "student_entropy", "teacher_entropy"):
        found[f"{name}_uncertain"] = values[name].masked_fill(~uncertain_N, float("nan"))
    return found


def _tally(tallies: dict[str, tuple[list[float], list[float]]], name: str, values: Sequence[float]) -> None:
    """Adds one prompt's sum and count."""
    sums, counts = tallies.setdefault(name, ([], []))
    sums.append(sum(values))
    counts.append(float(len(values)))
