"""Who takes part in `end_to_end.py`: one training run in this process, by Retort or by TRL's `DistillationTrainer`.

Both get the same student, teacher, prompts, dtype, attention and threads, write with transformers' `generate`, learn
the exact reverse KL with AdamW, and are timed from the end of one step to the end of the next, so that everything
between two optimizer steps counts: data, logging, bookkeeping.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import torch


@dataclass(frozen=True)
class Work:
    """What a step consists of.

    Attributes:
        student, teacher: Model folders.
        prompts: Texts; the first `per_step` are of the first step, and so on, round and round.
        per_step: Prompts per step.
        samples: Rollouts per prompt.
        new_tokens: Longest answer.
        prompt_tokens: Longest prompt.
        steps: Optimizer steps; the first warms up and is not counted.
        bf16: Products in bf16 under autocast, weights in fp32.
        batch_tokens: Retort's padded tokens per forward pass.
        parallel: Retort's rollouts written at once.
        device: Of both models.
    """

    student: str
    teacher: str
    prompts: tuple[str, ...]
    per_step: int
    samples: int
    new_tokens: int
    prompt_tokens: int
    steps: int
    bf16: bool = False
    batch_tokens: int = 16_384
    parallel: int = 4096
    device: str = "cpu"


@dataclass
class Clock:
    """Steps as they end: seconds, tokens written and phases of each; peak memory after the first."""

    device: str = "cpu"
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    peak: measure.Peak | None = None
    above: float = 0.0
    last: float = 0.0

    def start(self) -> None:
        """The first step begins."""
        self.last = time.perf_counter()

    def end(self, tokens: int, phases: Mapping[str, float]) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.tokens.append(tokens)
        self.phases.append(dict(phases))
        if self.peak is None:
            # What the first step leaves behind (optimizer state) is the baseline.
            self.peak = measure.Peak(self.device).start()
        self.above = self.peak.stop()
        self.last = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """All of it, without the first step."""
        names = {name for phases in self.phases for name in phases}
        mean = {n: sum(p.get(n, 0.0) for p in self.phases[1:]) / len(self.phases[1:]) for n in sorted(names)}
        return {
            "seconds": self.seconds[1:],
            "first_seconds": self.seconds[0],
            "tokens": self.tokens[1:],
            "phases": mean,
            "peak_rss_mib": measure.highest(),
            "peak_above_mib": self.above,
            "peak_mib": torch.cuda.max_memory_allocated() / measure.MIB if self.device == "cuda" else measure.highest(),
        }


def retort(work: Work, threads: int, *, share: bool = True) -> dict[str, Any]:
    """A run of `retort.distill`, without evaluation and checkpoints between the steps.

    Args:
        work: What to do.
        threads: Of torch.
        share: False computes a prompt once for each of its answers, to see what sharing gains.
    """
    from retort import distill
    from retort.models.lm import LanguageModel
    from retort.train.events.observe import Silent

    if not share:
        never: Any = property(lambda lm: False, lambda lm, value: None)
        LanguageModel.shared_prefixes = never  # this process does nothing else

    clock = Clock(work.device)

    class Timer(Silent):
        def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
            clock.start()

        def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
            phases = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
            phases.pop("step", None)
            clock.end(int(metrics["tokens"]), phases)

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in work.prompts), encoding="utf-8")
        distill(
            student=work.student,
            teacher=work.teacher,
            data=str(data),
            method={
                "name": "gkd",
                "divergence": "reverse_kl",
                "on_policy_fraction": 1.0,
                "temperature": 1.0,
                "samples": work.samples,
            },
            out=str(Path(folder) / "run"),
            steps=work.steps,
            settings=_retort_settings(work, threads),
            observer=Timer(),
        )
    return clock.result()


def _retort_settings(work: Work, threads: int) -> dict[str, Any]:
    return {
        "precision": "bf16" if work.bf16 else "fp32",
        "device": work.device,
        "attention": "sdpa",
        "threads": threads,
        "checks": "warn",  # the large pair's weights are random, and meant to be
        "rollout": {
            "prompts": work.per_step,
            "max_new_tokens": work.new_tokens,
            "max_prompt_tokens": work.prompt_tokens,
            "parallel": work.parallel,
        },
        "optimizer": {"learning_rate": 1e-5, "schedule": "constant", "batch_tokens": work.batch_tokens},
        "eval": {"problems": 0},
        "checkpoint": {"every": 0},
    }


def trl(work: Work, threads: int, *, tuned: bool) -> dict[str, Any]:
    """A run of TRL's trainer: `tuned` (the whole step in one batch, nothing checkpointed) or as its defaults have it.

    By default it learns from 8 rollouts at a time and computes the layers' activations twice; it accumulates then until
    the step has as many rollouts. TRL writes one answer per prompt, so a prompt is given as often as it is answered.
    """
    import transformers
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    rows = [text for text in work.prompts for _ in range(work.samples)]
    rollouts = work.per_step * work.samples
    batch = rollouts if tuned else 8
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = (
        load(name, dtype=torch.float32, attn_implementation="sdpa") for name in (work.student, work.teacher)
    )
    if work.bf16:
        teacher = teacher.to(torch.bfloat16)  # as Retort holds its teacher
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder,
            beta=1.0,
            temperature=1.0,
            max_completion_length=work.new_tokens,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=rollouts // batch,
            gradient_checkpointing=not tuned,
            max_steps=work.steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=work.bf16,
            use_cpu=work.device == "cpu",
            shuffle_dataset=False,
            **QUIET,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=transformers.AutoTokenizer.from_pretrained(work.student, padding_side="left"),
        )
        torch.set_num_threads(threads)
        return _run_trl(trainer, work.device)


#: Nothing is written, drawn or sent.
QUIET = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def _run_trl(trainer: Any, device: str) -> dict[str, Any]:
    """Trains with a clock on the steps, and on the parts of a step that can be told apart from outside."""
    from transformers import TrainerCallback

    clock, tokens, phases = Clock(device), [], {}

    def timing(owner: Any, name: str, phase: str, then: Callable[[Any], None] = lambda _: None) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - start
            then(result)
            return result

        setattr(owner, name, wrapped)

    timing(
        trainer,
        "_generate_and_score_completions",
        "generate",
        lambda written: tokens.append(int(written["completion_mask"].sum())),
    )
    timing(trainer, "compute_loss", "forward, both models")
    timing(trainer.accelerator, "backward", "backward")

    class Timer(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end(sum(tokens), phases)
            tokens.clear()
            phases.clear()

    trainer.add_callback(Timer())
    trainer.train()
    return clock.result()


SYSTEMS: Mapping[str, Callable[[Work, int], dict[str, Any]]] = {
    "retort": retort,
    "retort, prompts not shared": lambda work, threads: retort(work, threads, share=False),
    "trl, tuned": lambda work, threads: trl(work, threads, tuned=True),
    "trl, defaults": lambda work, threads: trl(work, threads, tuned=False),
}
